"""The classification networks of everyday use, narrow copies of their structure: captured, and bounded soundly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from tests.cases import random_points


def unit(i: int, o: int, k: int = 1, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), act or nn.ReLU(inplace=True))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = unit(i, o, 3, stride), unit(o, o, 3)[:2]
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.short is None else self.short(x)
        out = self.second(self.first(x))
        out += identity
        return self.relu(out)


class Head(nn.Module):
    """Global mean, flatten, dropout, linear."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2), nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.flatten(self.pool(x), 1)))


def resnet() -> nn.Module:
    stem = [*unit(3, 4, 7, 2), nn.MaxPool2d(kernel_size=3, stride=2, padding=1)]
    return nn.Sequential(*stem, Residual(4, 4, 1), Residual(4, 8, 2), Head(8))


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))  # 4 x 4 comes in: uneven windows
        self.classifier = nn.Sequential(nn.Linear(54, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseLayer(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 4, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.drop_rate = 0.1

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1)), inplace=True))
        x = self.conv2(F.relu(self.norm2(x), inplace=True))
        return F.dropout(x, p=self.drop_rate, training=self.training)


class Dense(nn.Module):
    """DenseNet: each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 4, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList(DenseLayer(4 + 2 * i) for i in range(3))
        self.down = nn.Sequential(
            nn.BatchNorm2d(10), nn.ReLU(True), nn.Conv2d(10, 5, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.classifier = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = F.relu(self.down(torch.cat(features, 1)), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Inception(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [unit(i, 2), nn.Sequential(unit(i, 2), unit(2, 3, 3)), nn.Sequential(unit(i, 2), unit(2, 2, 3)),
             nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), unit(i, 2))]
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class GoogLeNet(nn.Module):
    """With torchvision's change of the input's channels, by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(3, 4, 7, 2), nn.MaxPool2d(3, stride=2, ceil_mode=True))
        self.body = nn.Sequential(Inception(4), nn.MaxPool2d(3, stride=2, ceil_mode=True), Inception(9), Head(9))

    def forward(self, x: Tensor) -> Tensor:
        red = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return self.body(self.stem(torch.cat((red, green, blue), 1)))


class Inverted(nn.Module):
    """MobileNetV2's and MNASNet's block: widen, depthwise, narrow."""

    def __init__(self, i: int, o: int, stride: int, act: type[nn.Module], kernel: int = 3) -> None:
        super().__init__()
        wide = 2 * i
        self.residual = stride == 1 and i == o
        self.body = nn.Sequential(
            unit(i, wide, act=act()),
            unit(wide, wide, kernel, stride, wide, act()),
            nn.Conv2d(wide, o, 1),
            nn.BatchNorm2d(o),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNet(nn.Module):
    def __init__(self, act: type[nn.Module], kernel: int) -> None:
        super().__init__()
        blocks = [Inverted(4, 4, 1, act, kernel), Inverted(4, 6, 2, act, kernel), unit(6, 8, act=act())]
        self.features = nn.Sequential(unit(3, 4, 3, 2, act=act()), *blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Shuffle(nn.Module):
    """ShuffleNetV2's block."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, o // 2
        self.left = nn.Sequential()
        if stride > 1:
            self.left = nn.Sequential(*unit(i, i, 3, stride, i)[:2], *unit(i, half))
        first = i if stride > 1 else half
        self.right = nn.Sequential(*unit(first, half), *unit(half, half, 3, stride, half)[:2], *unit(half, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, x = x.chunk(2, dim=1)
            out = torch.cat((kept, self.right(x)), dim=1)
        else:
            out = torch.cat((self.left(x), self.right(x)), dim=1)
        batch, channels, high, wide = out.size()
        return (
            out.view(batch, 2, channels // 2, high, wide).transpose(1, 2).contiguous().view(batch, channels, high, wide)
        )


def shufflenet() -> nn.Module:
    return nn.Sequential(*unit(3, 4, 3, 2), nn.MaxPool2d(3, 2, 1), Shuffle(4, 8, 2), Shuffle(8, 8, 1), Head(8))


ARCHITECTURES = {
    "ResNet": resnet,
    "VGG": Vgg,
    "DenseNet": Dense,
    "GoogLeNet": GoogLeNet,
    "MobileNetV2": lambda: MobileNet(nn.ReLU6, 3),
    "MNASNet": lambda: MobileNet(nn.ReLU, 5),
    "ShuffleNetV2": shufflenet,
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = ARCHITECTURES[name]()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.running_mean, std=0.2)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
                nn.init.uniform_(m.weight, -1.2, 1.2)
    return net.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_captured_and_bounded(name):
    net = made(name).double()
    network = ox.capture(net, (3, 16, 16))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    region = ox.LinfBall(x, 0.02, clip=(0.0, 1.0))
    points = torch.cat([random_points(region, 20), region.lower[None], region.upper[None]])
    with torch.no_grad():
        values = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        torch.testing.assert_close(network(points.flatten(0, 1)).unflatten(0, points.shape[:2]), values)
        widths = []
        for relaxation in ("box", "crown-ibp"):
            found = ox.bounds(network, region, relaxation)
            assert ((found.lower <= values + 1e-9) & (values - 1e-9 <= found.upper)).all(), relaxation
            widths.append(float(found.width.mean()))
    assert 0 < widths[1] < widths[0] < 1e6


@pytest.mark.parametrize("name", ["DenseNet", "ShuffleNetV2"])
def test_gradients_reach_every_weight(name):
    """At eps = 0 the bound is the output, and so are its derivatives."""
    net = made(name).double()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low = ox.bounds(ox.capture(net, (3, 16, 16)), ox.LinfBall(x, 0.0), "crown-ibp").lower
    found = torch.autograd.grad(low.sum(), list(net.parameters()))
    wanted = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
