"""Parts of a value written anew: what `h[:, 1] = y` and its kin become once a graph changes nothing in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optrelax.networks.calls import Call, Refused, Value, is_value
from optrelax.networks.ops import Add, Scale, Source
from optrelax.networks.registry import rule
from optrelax.networks.rules.moves import MIXES, move, numbers, widened

aten = torch.ops.aten


def writing(function: Callable[..., object], source: int) -> Callable[[Call], Value]:
    """The rule of a function that puts a tensor (argument `source`) in the place of entries of its first one."""

    def write_by(call: Call) -> Value:
        given = [call.args[0], call.args[source]]
        total = math.prod(given[0].shape)
        index = _written(function, call, source, total).long() - 1
        parts = [index.where(index < total, -1), (index - total).clamp_min(-1)]
        moved = [move(call, v, i) for v, i in zip(given, parts, strict=True) if is_value(v) and (i >= 0).any()]
        fixed = [partial(_gathered, c, i) for c, i in zip(given, parts, strict=True) if not is_value(c)]
        if not moved:  # a constant in the place of all
            moved = [_nothing(call, call.values[0])]
        value = call.add(Add(call.output, (1.0, 1.0)), *moved) if len(moved) > 1 else moved[0]
        return call.add(Scale(call.output, None, fixed[0]), value) if fixed else value

    return write_by


def _written(function: Callable[..., Any], call: Call, source: int, total: int) -> Tensor:
    """Of an example the numbers that stand in each entry then: those of the target first, and of the source next."""
    target, new = numbers(call.args[0].shape), numbers(call.args[source].shape) + total
    count = target.numel() + new.numel()
    # A constant that has no batch is the same for every example.
    alike = not is_value(call.args[source]) and not call.args[source].batched
    arguments = [a if i in (0, source) else call.fixed(a) for i, a in enumerate(call.args)]
    arguments[0] = torch.stack([target, target + count])
    arguments[source] = new if alike else torch.stack([new, new + count])
    found: Tensor = function(*arguments)
    first = found[0]
    if not torch.equal(found[1], first + count * (first <= total) if alike else first + count):
        raise Refused(MIXES)
    return first


def _gathered(read: Source, index: Tensor) -> Tensor:
    """Entries of a constant, 0 where the index is -1."""
    flat = read().reshape(-1)
    place = index.to(flat.device)
    return torch.where(place >= 0, flat[place.clamp_min(0)], torch.zeros_like(flat[:1]))


def _nothing(call: Call, value: Value) -> Value:
    return move(call, value, torch.full(call.output, -1, device="cpu"))


rule(aten.slice_scatter)(writing(aten.slice_scatter, 1))
rule(aten.select_scatter)(writing(aten.select_scatter, 1))
rule(aten.diagonal_scatter)(writing(aten.diagonal_scatter, 1))


@rule(aten.index_put.default)
def index_put(call: Call) -> Value:
    if call["accumulate"]:
        raise Refused("adds to entries that may be written twice; add what a new tensor holds")
    return writing(aten.index_put, 2)(call)


@rule(aten.copy.default, aten.fill.Tensor, aten.fill.Scalar)
def copy(call: Call) -> Value:
    if is_value(call.args[1]):
        return widened(call, call.args[1], call.output)
    return call.add(Scale(call.output, None, call.elementwise(1)), _nothing(call, call.value()))


@rule(aten.zero)
def zero(call: Call) -> Value:
    return _nothing(call, call.value())
