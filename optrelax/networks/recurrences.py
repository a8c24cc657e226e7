"""Recurrent layers step by step: sums and products of sigmoids and hyperbolic tangents, the batch in front of each."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optrelax.networks.replicas import Replica

State = tuple[Tensor, ...]
"""What a step hands on: [batch, hidden] each; first what it gives."""
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Of the input and of the state, then their biases."""


def unroll(replica: Replica) -> None:
    """Recurrent layers and cells of a replica compute the same by ops that have rules."""
    for module in replica.module.modules():
        kind = next((kind for kind in _STEPS if type(module).forward is kind.forward), None)
        if kind is None or "forward" in vars(module):
            continue
        if isinstance(module, nn.RNNCellBase):
            module.forward = functools.partial(_cell, module, kind.forward)
        elif isinstance(module, nn.RNNBase):
            module.forward = functools.partial(_layers, module, kind.forward)


def _cell(cell: nn.RNNCellBase, forward: Callable[..., object], x: Tensor, hx: Tensor | State | None = None) -> object:
    """What a cell's forward gives: the state after one step."""
    if x.dim() != 2:
        return forward(cell, x, hx)
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    state = _start(cell, x, (hx,) if isinstance(hx, Tensor) else hx)
    found = _STEPS[_kind(cell)](cell, x, state, weights)
    return found if len(found) > 1 else found[0]


def _layers(layer: nn.RNNBase, forward: Callable[..., object], x: object, hx: Tensor | State | None = None) -> object:
    """What a recurrent layer's forward gives: outputs [batch, steps, hidden] or [steps, batch, hidden], last states."""
    if not isinstance(x, Tensor) or x.dim() != 3:
        return forward(layer, x, hx)
    time = 1 if layer.batch_first else 0
    steps = [x.select(time, t) for t in range(x.shape[time])]
    given = (hx,) if isinstance(hx, Tensor) else hx
    ends: list[State] = []
    for depth in range(layer.num_layers):
        if depth and layer.dropout:
            steps = [F.dropout(step, layer.dropout, layer.training) for step in steps]
        ways = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            names = (f"{name}_l{depth}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            weights = tuple(getattr(layer, name, None) for name in names)
            projection = getattr(layer, f"weight_hr_l{depth}{suffix}", None)
            start = None if given is None else tuple(part.select(0, len(ends)) for part in given)
            state, way = _start(layer, x.select(time, 0), start), []
            for step in reversed(steps) if suffix else steps:
                state = _STEPS[_kind(layer)](layer, step, state, weights)
                if projection is not None:
                    state = (F.linear(state[0], projection), *state[1:])
                way.append(state[0])
            ends.append(state)
            ways.append(way[::-1] if suffix else way)
        steps = [torch.cat(at, -1) if len(at) > 1 else at[0] for at in zip(*ways, strict=True)]
    last = tuple(torch.stack(part) for part in zip(*ends, strict=True))
    return torch.stack(steps, time), last if len(last) > 1 else last[0]


def _start(module: nn.RNNBase | nn.RNNCellBase, x: Tensor, given: State | None) -> State:
    """The given state, or zeros for inputs [batch, n]."""
    if given is not None:
        return given
    sizes = [getattr(module, "proj_size", 0) or module.hidden_size]
    if "LSTM" in _kind(module).__name__:
        sizes.append(module.hidden_size)
    return tuple(x.new_zeros(x.shape[0], size) for size in sizes)


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in _STEPS if isinstance(module, kind))


def _gates(x: Tensor, h: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    w_x, w_h, b_x, b_h = weights
    return F.linear(x, w_x, b_x), F.linear(h, w_h, b_h)


def _plain(module: nn.Module, x: Tensor, state: State, weights: Weights) -> State:
    of_x, of_h = _gates(x, state[0], weights)
    return (F.relu(of_x + of_h) if module.nonlinearity == "relu" else torch.tanh(of_x + of_h),)


def _gated(module: nn.Module, x: Tensor, state: State, weights: Weights) -> State:
    (reset, update, new), (reset_h, update_h, new_h) = (g.chunk(3, 1) for g in _gates(x, state[0], weights))
    kept = torch.sigmoid(update + update_h)
    found = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    return ((1 - kept) * found + kept * state[0],)


def _long(module: nn.Module, x: Tensor, state: State, weights: Weights) -> State:
    of_x, of_h = _gates(x, state[0], weights)
    taken, kept, new, given = (of_x + of_h).chunk(4, 1)
    cell = torch.sigmoid(kept) * state[1] + torch.sigmoid(taken) * torch.tanh(new)
    return torch.sigmoid(given) * torch.tanh(cell), cell


_STEPS: dict[type[nn.Module], Callable[..., State]] = {
    nn.RNN: _plain,
    nn.RNNCell: _plain,
    nn.GRU: _gated,
    nn.GRUCell: _gated,
    nn.LSTM: _long,
    nn.LSTMCell: _long,
}
