"""Parts of a tensor that forward writes: what comes out is the module's, bounded; examples keep to themselves."""

from collections.abc import Callable

import pytest
import torch
from cases import inputs, random_points
from torch import Tensor, nn

import optrelax as ox


class Written(nn.Module):
    """A function that writes into what a layer gives, or into a tensor of its own."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4).double()
        self.register_buffer("number", torch.tensor([0.5, -2.0]).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def columns(m: Written, x: Tensor) -> Tensor:
    h = m.layer(x)
    h[:, 1] = h[:, 0] * 2
    h[:, 2:].mul_(-1)
    return h


def views(m: Written, x: Tensor) -> Tensor:
    h = m.layer(x).view(-1, 2, 2)
    turned = h.transpose(1, 2)
    turned[:, 0].add_(1)
    torch.relu_(h[:, 1])
    return (turned + h).flatten(1)


def filled(m: Written, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    out[:, ::2] = m.layer(x)[:, :3]
    out[:, 1] = out[:, 0].clone().relu()
    out[:, 3] = 5.0
    out[:, 4] = m.layer.bias[0]
    out[:, [0, 2]] += x[:, :2]
    out[:, torch.tensor([True, False, False, False, False, True])] = 3.0
    torch.diagonal(out.view(-1, 2, 3), dim1=1, dim2=2).mul_(2)
    out[:, 1:3] -= m.number
    return out


def emptied(m: Written, x: Tensor) -> Tensor:
    h = m.layer(x)
    h[:, 0].zero_()
    h[:, 1].fill_(2.0)
    h[:, 2:] = m.number
    return h


def given(m: Written, x: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return m.layer(x)


@torch.no_grad()
@pytest.mark.parametrize("function", [columns, views, filled, emptied, given])
def test_what_is_written_is_the_modules(function):
    net = Written(function)
    held, region = ox.capture(net, (4,)), ox.LinfBall(inputs((4,), 2), 0.2)
    for _ in range(2):
        for size in (1, 3, 8):
            x = inputs((4,), size)
            torch.testing.assert_close(held(x), net(x.clone()))
        y = net(random_points(region, 50).flatten(0, 1)).unflatten(0, (50, 2))
        for name in ("box", "crown"):
            found = ox.bounds(net, region, name, rounding="outward")
            assert bool(((found.lower <= y) & (y <= found.upper)).all())
        net.number.mul_(3)
        net.layer.bias.add_(1)


def first(m: Written, x: Tensor) -> Tensor:
    h = m.layer(x)
    h[0] = 0.0
    return h


def moved(m: Written, x: Tensor) -> Tensor:
    h = m.layer(x)
    h[1:] = h[:-1].clone()
    return h


def found(m: Written, x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], 4, dtype=x.dtype)
    return torch.matmul(x, m.layer.weight, out=out)


def twice(m: Written, x: Tensor) -> Tensor:
    return m.layer(x).index_put((torch.arange(2)[:, None], torch.tensor([0, 0])), x[:2, :2], accumulate=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (first, "mixes the batch"),
        (moved, "mixes the batch"),
        (found, "empty: holds what its memory happened to hold"),
        (twice, "mixes the batch|written twice"),
    ],
)
def test_what_is_written_across_examples_or_nowhere_is_refused(function, message):
    with pytest.raises(ox.UnsupportedOpError, match=message):
        ox.capture(Written(function), (4,))
