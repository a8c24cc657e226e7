"""Entries that a constant condition chooses, and those that minus infinity hides from a softmax.

A hidden entry is 0 in the network's value, which every relaxation can bound; the value says which entries are shown,
and only rules that know what that means take it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from optrelax.networks.calls import HIDDEN, Call, Refused, Value, is_value
from optrelax.networks.ops import Add, Scale, Shape, Source, wide
from optrelax.networks.registry import rule
from optrelax.networks.rules.moves import widened

aten = torch.ops.aten


def shifted(call: Call, value: Value, factor: Source | None, shift: Source) -> Value:
    """value * factor + shift, both constant; an entry where the shift is minus infinity is hidden."""
    now = shift().detach()
    if bool((now == -torch.inf).any()):
        shown = partial(_shown, shift, value.shape)
        call.keep(shown, shown())
        if value.shown is not None:
            shown = partial(_both, value.shown, shown)
        found = call.add(Scale(value.shape, partial(_of_shown, factor, shown), partial(_finite, shift)), value)
        return replace(found, shown=shown)
    return replace(call.add(Scale(value.shape, factor, shift), value), shown=value.shown)


def shows(mask: Source, value: Value) -> Value:
    """The value with the entries hidden where a constant mask is False."""
    return replace(value, shown=lambda: mask().expand(value.shape))


def _shown(shift: Source, shape: Shape) -> Tensor:
    return (shift().detach() != -torch.inf).expand(shape)


def _both(first: Source, second: Source) -> Tensor:
    return first() & second()


def _of_shown(factor: Source | None, shown: Source) -> Tensor:
    chosen = shown().double()
    return chosen if factor is None else chosen * factor()


def _finite(shift: Source) -> Tensor:
    read = shift()
    return read.masked_fill(read == -torch.inf, 0.0)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, hidden=True)
def where(call: Call) -> Value:
    """Chosen by a constant condition: each side times 1 or 0."""
    condition = call.elementwise(0)
    first, second = (widened(call, a, call.output) if is_value(a) else None for a in call.args[1:])
    if first is None or second is None:
        value, place = (second, 1) if first is None else (first, 2)
        assert value is not None
        return _filled(call, value, condition if place == 1 else lambda: ~condition(), call.elementwise(place))
    if first.shown is not None or second.shown is not None:
        raise Refused(HIDDEN)
    parts = [
        call.add(Scale(call.output, partial(_number, chosen), None), value)
        for value, chosen in ((first, condition), (second, lambda: ~condition()))
    ]
    return call.add(Add(call.output, (1.0, 1.0)), *parts)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, hidden=True)
def masked_fill(call: Call) -> Value:
    return _filled(call, widened(call, call.only(0), call.output), call.elementwise(1), call.elementwise(2))


def _filled(call: Call, value: Value, mask: Source, fill: Source) -> Value:
    """The value, and where a constant mask is True a constant."""
    now = fill()
    if bool((~now.isfinite() & (now != -torch.inf)).any()):
        raise Refused("an infinite constant has no bounds")
    return shifted(call, value, lambda: _number(lambda: ~mask()), partial(_where, mask, fill))


def _number(condition: Source) -> Tensor:
    return condition().double()


def _where(mask: Source, fill: Source) -> Tensor:
    read = wide(fill())
    return torch.where(mask(), read, torch.zeros_like(read))
