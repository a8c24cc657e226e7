"""Recurrent layers and cells, in the forms in which their inputs, states and outputs are passed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import inputs, random_points
from torch import Tensor, nn

import optrelax as ox


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.read = layer, read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer, x)


def zeros(x: Tensor, layers: int) -> Tensor:
    return torch.zeros(layers, x.size(0), 2).to(x)


def cell(layer: Any, x: Tensor, state: Any = None) -> Tensor:
    for step in x.unbind(1):
        state = layer(step, state)
    return state[0] if isinstance(state, tuple) else state


def first_in_time(layer: Any, x: Tensor) -> Tensor:
    outputs, (h, c) = layer(x.permute(1, 0, 2))
    return torch.cat([outputs[-1], outputs.transpose(0, 1).contiguous()[:, 0], h[-1], c[0]], 1)


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "outputs": (lambda: nn.LSTM(2, 2, batch_first=True), lambda m, x: m(x)[0][:, -1]),
    "states": (lambda: nn.GRU(2, 2, batch_first=True, bias=False), lambda m, x: m(x)[1].squeeze(0)),
    "both ways": (
        lambda: nn.GRU(2, 1, batch_first=True, bidirectional=True),
        lambda m, x: (lambda h: torch.cat([h[-2], h[-1]], 1))(m(x)[1]),
    ),
    "given state": (
        lambda: nn.LSTM(2, 2, 2, batch_first=True),
        lambda m, x: m(x, (zeros(x, 2), zeros(x, 2).detach()))[0].mean(1),
    ),
    "first in time": (lambda: nn.LSTM(2, 2), first_in_time),
    "projected": (lambda: nn.LSTM(2, 3, batch_first=True, proj_size=1), lambda m, x: m(x)[0].flatten(1)),
    "relu": (lambda: nn.RNN(2, 2, nonlinearity="relu", batch_first=True), lambda m, x: m(x)[0][:, -1]),
    "RNNCell": (lambda: nn.RNNCell(2, 2), cell),
    "GRUCell": (lambda: nn.GRUCell(2, 2), lambda m, x: cell(m, x, x.new_ones(len(x), 2))),
    "LSTMCell": (lambda: nn.LSTMCell(2, 2), cell),
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_bounds_hold_the_layers_own_outputs(form):
    make, read = FORMS[form]
    net = Recurrent(make(), read).double().eval()
    region = ox.LinfBall(inputs((2, 2), 2), 0.2)
    network = ox.capture(net, (2, 2))
    torch.testing.assert_close(network(region.x), net(region.x), rtol=1e-12, atol=1e-12)
    next(net.parameters()).mul_(2)  # read at each use
    y = net(random_points(region, 50).flatten(0, 1)).unflatten(0, (50, 2))
    for name in ("box", "crown"):
        found = ox.bounds(network, region, name, rounding="outward")
        assert bool(((found.lower <= y) & (y <= found.upper)).all())


def test_gradients_reach_every_weight():
    net = Recurrent(*(part() if i == 0 else part for i, part in enumerate(FORMS["given state"])))  # type: ignore[arg-type]
    ox.lower_bounds(net, ox.LinfBall(torch.rand(2, 2, 2), 0.1), torch.eye(2), "crown-ibp").sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.layer.parameters() if p.dim() > 1)


def test_a_batch_taken_for_time_is_refused():
    net = Recurrent(nn.RNN(2, 2), lambda m, x: m(x)[0])
    assert "mixes the batch" in str(ox.check(net, (2, 2)))
    dropping = Recurrent(nn.GRU(2, 2, 2, batch_first=True, dropout=0.5), lambda m, x: m(x)[0])
    assert "random in training mode" in str(ox.check(dropping, (2, 2)))
    assert ox.check(dropping.eval(), (2, 2)).ok
