"""ONNX files that the library writes: what the reference evaluator and a reader make of them is the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optrelax as ox
from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks import convolutions, images, linear_maps, views
from optrelax.networks.graph import Network, Node
from optrelax.networks.onnx_files import read_onnx
from tests.onnx_models import reference


class Function(nn.Module):
    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer or nn.Identity()

    def forward(self, x):
        return self.function(self.layer(x))


def norm():
    layer = nn.BatchNorm2d(2)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0)
    return layer


IMAGE = (2, 6, 6)
SMOOTH = (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Softsign)
NETWORKS = {
    "fc": (lambda: ox.models.fc(8, 10, 3, seed=0), (8,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)), IMAGE),
    "rows": (lambda: nn.Linear(6, 4), IMAGE),
    "batch norm": (norm, IMAGE),
    "normalised": (lambda: Function(lambda x: (x - 0.5) / 0.25 * 2 + 1), IMAGE),
    "residual": (lambda: Function(lambda x: x - F.relu(x) + 2 * x, nn.Conv2d(2, 2, 3, padding=1)), IMAGE),
    "leaky": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.LeakyReLU(0.25)), (8,)),
    "clamped": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Hardtanh(-0.5, 0.3), nn.ReLU6()), (8,)),
    "smooth": (lambda: nn.Sequential(*(m() for m in SMOOTH)), (8,)),
    "powers": (lambda: Function(lambda x: (x.exp() + 0.5).sqrt().reciprocal() + x**3 + torch.rsqrt(x * x + 1)), (8,)),
    "average": (lambda: nn.AvgPool2d(3, 2, 1), IMAGE),
    "average, padding not counted": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "greatest": (lambda: nn.MaxPool2d(2, 2, 1), IMAGE),
    "greatest, rounded up": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_written_networks_equal_themselves(name, dtype, tmp_path):
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    net = make().to(dtype).eval()
    weights = any(True for _ in net.parameters())
    path = tmp_path / "net.onnx"
    ox.save(net, path, input_shape=shape)
    x = torch.randn(3, *shape, dtype=dtype if weights else torch.float32)
    want = net(x)
    size = 1e-5 if x.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(reference(str(path), x), want, rtol=size, atol=size)
    torch.testing.assert_close(ox.load(path)(x), want, rtol=size, atol=size)


def random(*shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return lambda: values


GEOMETRY = ConvGeometry((2,), (1,), (2,), 2)
OPS = {
    "convolution 1d": convolutions.Convolution((2, 9), random(4, 1, 3), random(4), GEOMETRY),
    "permute": views.Permute((2, 3, 4), (2, 0, 1)),
    "pad and cut": views.Pad((2, 3, 4), [(0, 0), (1, 2), (-1, 1)]),
    "cut": views.Pad((2, 3, 4), [(0, -1), (0, 0), (-1, -2)]),
    "nothing cut": views.Pad((2, 3), [(0, 0), (0, 0)]),
    "gather": views.Gather((2, 3), torch.tensor([[5, 0], [0, 3]])),
    "sum": linear_maps.Sum((2, 3, 4), (0, 2)),
    "mean": linear_maps.Sum((2, 3, 4), (1,), keepdim=True, divisor=3.0),
    "divisor of its own": images.AveragePool2d((2, 6, 6), (3, 3), ConvGeometry((2, 2), (1, 1)), divisor=5.0),
}


@pytest.mark.parametrize("name", OPS)
def test_written_ops_equal_themselves(name, tmp_path):
    op = OPS[name]
    path = tmp_path / "net.onnx"
    (shape,) = op.input_shapes
    ox.save(Network(nn.Identity(), (Node("a", "a", op, ("input",), op.shape),), "a", shape), path)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(reference(str(path), x), op.apply(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read_onnx(path)(x), op.apply(x), rtol=1e-5, atol=1e-5)


def test_written_branches_are_joined(tmp_path):
    op = views.Concatenate([(2, 3), (4, 3)], 0)
    nodes = (
        Node("a", "a", views.Pad((6, 3), [(0, -4), (0, 0)]), ("input",), (2, 3)),
        Node("b", "b", views.Pad((6, 3), [(-2, 0), (0, 0)]), ("input",), (4, 3)),
        Node("c", "c", op, ("b", "a"), (6, 3)),
    )
    path = tmp_path / "net.onnx"
    ox.save(Network(nn.Identity(), nodes, "c", (6, 3)), path)
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(reference(str(path), x), torch.cat([x[:, 2:], x[:, :2]], 1))


def test_what_has_no_form_is_refused_by_name_and_nothing_written(tmp_path):
    nodes = (
        Node("a", "first", views.Gather((1, 3), torch.tensor([0, -1, 2])), ("input",), (3,)),
        Node("b", "second", views.Gather((3,), torch.tensor([0, -1])), ("a",), (2,)),
    )
    path = tmp_path / "net.onnx"
    with pytest.raises(ox.UnsupportedOpError) as error:
        ox.save(Network(nn.Identity(), nodes, "b", (1, 3)), path)
    assert [(p.where, p.op) for p in error.value.problems] == [("first", "Gather"), ("second", "Gather")]
    assert not path.exists()
    with pytest.raises(ValueError, match="extra"):
        ox.save(ox.models.fc(8, 10, 3, seed=0), path, extra={"eps": 0.1})
