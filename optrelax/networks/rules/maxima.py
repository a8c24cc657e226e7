"""Maxima and minima: of two values, along dimensions, with constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from optrelax.networks import activations
from optrelax.networks.calls import Call, Value, as_source
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Reshape, Scale, Source
from optrelax.networks.registry import rule
from optrelax.networks.rules.moves import widened
from optrelax.networks.views import Concatenate

aten = torch.ops.aten
_MINUS = torch.tensor(-1.0, dtype=torch.float64)


@rule(aten.maximum, aten.max.other, aten.fmax)
def maximum(call: Call) -> Value:
    return _larger(call, 1)


@rule(aten.minimum, aten.min.other, aten.fmin)
def minimum(call: Call) -> Value:
    return _larger(call, -1)


def _larger(call: Call, sign: int) -> Value:
    """The larger of two arguments, or for sign -1 the smaller: minus the larger of both negated."""
    if len(call.values) == 2:
        shape = call.output
        rows = (1, *shape)
        values = [_signed(call, widened(call, v, shape), sign) for v in call.values]
        both = call.add(Concatenate([rows, rows], 0), *(call.add(Reshape(shape, rows), v) for v in values))
        return _signed(call, call.add(Greatest.over((2, *shape), (0,)), both), sign)
    (place,) = call.traced
    value = widened(call, call.values[0], call.output)
    return beyond(call, value, call.elementwise(1 - place), sign)


def beyond(call: Call, value: Value, constant: Source, sign: int) -> Value:
    """The larger of a value and a constant, or for sign -1 the smaller: c + relu(x - c), c - relu(c - x)."""
    shape = value.shape
    if sign > 0:
        moved = call.add(Scale(shape, None, lambda: -constant()), value)
    else:
        moved = call.add(Scale(shape, lambda: _MINUS, constant), value)
    positive = call.add(activations.relu(), moved)
    return call.add(Scale(shape, None if sign > 0 else lambda: _MINUS, constant), positive)


def _signed(call: Call, value: Value, sign: int) -> Value:
    return value if sign > 0 else call.add(Scale(value.shape, lambda: _MINUS, None), value)


@rule(aten.amax)
def greatest(call: Call) -> Value:
    return _along(call, call["dim"], call["keepdim"], 1)


@rule(aten.amin)
def least(call: Call) -> Value:
    return _along(call, call["dim"], call["keepdim"], -1)


@rule(aten.max.dim)
def greatest_with_index(call: Call) -> tuple[Value, None]:
    return _along(call, call["dim"], call["keepdim"], 1), None


@rule(aten.min.dim)
def least_with_index(call: Call) -> tuple[Value, None]:
    return _along(call, call["dim"], call["keepdim"], -1), None


def _along(call: Call, dims: Any, keepdim: bool, sign: int) -> Value:
    value = _signed(call, call.only(0), sign)
    return _signed(call, call.add(Greatest.over(value.shape, call.dims(dims), keepdim), value), sign)


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
