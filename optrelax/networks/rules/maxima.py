"""Maxima and minima: of two values, along dimensions, with constants."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from optrelax.networks import activations
from optrelax.networks.calls import Call, Value, as_source
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Reshape, Scale, Source, constant
from optrelax.networks.registry import rule
from optrelax.networks.rules.moves import widened
from optrelax.networks.views import Concatenate

aten = torch.ops.aten


def _larger(call: Call, sign: int) -> Value:
    """The larger of two arguments, or for sign -1 the smaller: minus the larger of both negated."""
    if len(call.values) == 2:
        shape = call.output
        rows = (1, *shape)
        values = [call.scaled(widened(call, v, shape), sign) for v in call.values]
        both = call.add(Concatenate([rows, rows], 0), *(call.add(Reshape(shape, rows), v) for v in values))
        return call.scaled(call.add(Greatest.over((2, *shape), (0,)), both), sign)
    (place,) = call.traced
    value = widened(call, call.values[0], call.output)
    return beyond(call, value, call.elementwise(1 - place), sign)


rule(aten.maximum, aten.max.other, aten.fmax)(partial(_larger, sign=1))
rule(aten.minimum, aten.min.other, aten.fmin)(partial(_larger, sign=-1))


def beyond(call: Call, value: Value, edge: Source, sign: int) -> Value:
    """The larger of a value and a constant, or for sign -1 the smaller: c + relu(x - c), c - relu(c - x)."""
    shape, read = value.shape, None if sign > 0 else constant(-1.0)
    moved = call.add(Scale(shape, read, (lambda: -edge()) if sign > 0 else edge), value)
    return call.add(Scale(shape, read, edge), call.add(activations.relu(), moved))


def _along(call: Call, sign: int) -> Value:
    """The greatest entry along dimensions, or for sign -1 the least."""
    value = call.scaled(call.only(0), sign)
    return call.scaled(call.add(Greatest.over(value.shape, call.dims(call["dim"]), call["keepdim"]), value), sign)


def _along_with_index(call: Call, sign: int) -> tuple[Value, None]:
    return _along(call, sign), None


rule(aten.amax)(partial(_along, sign=1))
rule(aten.amin)(partial(_along, sign=-1))
rule(aten.max.dim)(partial(_along_with_index, sign=1))
rule(aten.min.dim)(partial(_along_with_index, sign=-1))


@rule(aten.clamp.Tensor, aten.clip.Tensor)
def clamp_by_tensors(call: Call) -> Value:
    value = widened(call, call.only(0), call.output)
    for position, sign in ((1, 1), (2, -1)):
        if as_source(call.args[position]) is not None:
            value = beyond(call, value, call.elementwise(position), sign)
    return value


@rule(aten.clamp_min.Tensor)
def clamp_min_by_tensor(call: Call) -> Value:
    return clamp_by_tensors(replace(call, args=(*call.args, None)))


@rule(aten.clamp_max.Tensor)
def clamp_max_by_tensor(call: Call) -> Value:
    return clamp_by_tensors(replace(call, args=(call.args[0], None, call.args[1])))
