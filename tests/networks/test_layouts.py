"""Values whose batch stands elsewhere on the way, while each example keeps its own numbers: captured and bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from tests.cases import random_points

Shape = tuple[int, ...]


class Layers(nn.Module):
    """A function of two layers and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.f, self.g = nn.Linear(4, 6), nn.Linear(6, 4)
        self.position = nn.Parameter(torch.randn(5, 1, 4) * 0.1)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def heads(m: Any, x: Tensor, parts: Callable[[Tensor], Any]) -> Tensor:
    """Attention as image transformers write it: queries, keys and values in front of the batch."""
    batch, n, c = x.shape
    q, k, v = parts(m.qkv(x).reshape(batch, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4))
    return ((q @ k.transpose(-2, -1) * 0.7).softmax(-1) @ v).transpose(1, 2).reshape(batch, n, c)


def windows(m: Any, x: Tensor) -> Tensor:
    batch, h, w, c = x.shape
    inner = x.view(batch, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    inner = heads(m, F.relu(inner), lambda qkv: (qkv[0], qkv[1], qkv[2]))
    return inner.view(batch, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(batch, h, w, c)


def qkv(function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Layers(function, qkv=nn.Linear(4, 12))


def stacked(m: Any, x: Tensor) -> Tensor:
    return torch.stack([F.relu(m.f(x)), F.relu(m.f(-x))])


TAKEN: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "heads by index": (lambda: qkv(lambda m, x: heads(m, x, lambda t: (t[0], t[1], t[2]))), (3, 4)),
    "heads unbound": (lambda: qkv(lambda m, x: heads(m, x, lambda t: t.unbind(0))), (3, 4)),
    "windows": (lambda: qkv(windows), (2, 4, 4)),
    "steps folded": (lambda: Layers(lambda m, x: m.g(F.relu(m.f(x.reshape(-1, 4)))).view(x.size(0), 3, 4)), (3, 4)),
    "groups folded": (lambda: Layers(lambda m, x: m.f(x.view(-1, 2, 4)).relu().view(-1, 2, 12).amax(2)), (4, 4)),
    "axial": (lambda: Layers(lambda m, x: m.f(x.transpose(1, 2).flatten(0, 1)).view(-1, 3, 2, 6).mean(2)), (2, 3, 4)),
    "steps in front": (lambda: Layers(lambda m, x: m.g(F.relu(m.f(x.permute(1, 0, 2))))[-1]), (3, 4)),
    "positions": (lambda: Layers(lambda m, x: (x.transpose(0, 1) + m.position[:3]).relu().mean(0)), (3, 4)),
    "features in front": (lambda: Layers(lambda m, x: (torch.relu(m.f.weight @ x.T) + m.f.bias[:, None]).T), (4,)),
    "several": (lambda: Layers(lambda m, x: m.g(stacked(m, x).mean(0)) - stacked(m, x).max(0)[0][:, :4]), (4,)),
    "layer": (
        lambda: Layers(
            lambda m, x: m.torchs(x.transpose(0, 1)).transpose(0, 1), torchs=nn.TransformerEncoderLayer(4, 2, 5)
        ),
        (3, 4),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", TAKEN)
def test_the_graph_is_the_module_and_bounds_hold(kind):
    torch.manual_seed(0)
    make, shape = TAKEN[kind]
    net = make().double().eval()
    network = ox.capture(net, shape)
    for size in (1, 2, 5):
        x = torch.randn(size, *shape).double()
        torch.testing.assert_close(network(x), net(x))
    region = ox.LinfBall(torch.randn(2, *shape).double(), 0.02)
    values = net(random_points(region, 100).flatten(0, 1)).unflatten(0, (100, 2))
    for relaxation in ("box", "crown"):
        found = ox.bounds(network, region, relaxation, rounding="outward")
        assert bool(((found.lower <= values) & (values <= found.upper)).all()), relaxation


MIXING: dict[str, tuple[Callable[[Any, Tensor], Tensor], Shape]] = {
    "softmax over examples": (lambda m, x: m.f(x.transpose(0, 1)).softmax(1).transpose(0, 1), (3, 4)),
    "steps made examples": (lambda m, x: m.f(x.transpose(0, 1).reshape(x.shape)), (3, 4)),
    "examples summed": (lambda m, x: m.f(x.reshape(-1, 4)).sum(0, keepdim=True) + m.f(x[:, 0]), (3, 4)),
    "products of examples": (lambda m, x: (lambda t: (t @ t.mT).transpose(0, 1))(x.transpose(0, 1)), (3, 4)),
    "neighbours of the next": (lambda m, x: F.relu(m.f(x.view(-1, 4))).view(-1, 6)[: len(x)], (3, 4)),
    "a constant each": (lambda m, x: (x.t() + torch.arange(3.0)).t(), (4,)),
    "one dimension more": (lambda m, x: (x.transpose(0, 1) + m.position[:3, None]).sum(2), (3, 4)),
}


@pytest.mark.parametrize("kind", MIXING)
def test_what_mixes_examples_is_refused(kind):
    function, shape = MIXING[kind]
    with pytest.raises(ox.UnsupportedOpError, match=r"mixes the batch|sizes of the batch|another function"):
        ox.capture(Layers(function).eval(), shape)
