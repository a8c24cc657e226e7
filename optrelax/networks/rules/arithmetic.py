"""Sums, differences, products and quotients with constants."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from optrelax.networks import activations
from optrelax.networks.calls import BATCH, HIDDEN, Call, Refused, Value, is_value
from optrelax.networks.ops import Add, Divide, Scale, Source, constant, wide
from optrelax.networks.registry import rule
from optrelax.networks.rules.masks import shifted
from optrelax.networks.rules.moves import widened
from optrelax.networks.rules.products import times

aten = torch.ops.aten


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def subtract_from(call: Call) -> Value:
    this, other, *_ = call.args
    alpha = call["alpha"]
    if alpha is BATCH:
        raise Refused("mixes the batch: an argument depends on the batch size")
    if is_value(this):
        this = call.scaled(this, float(alpha))
    elif alpha != 1:
        raise Refused("a constant times alpha less a value: multiply first")
    return _sum(replace(call, args=(other, this, 1)), -1.0)


def _sum(call: Call, sign: float) -> Value:
    """First argument + sign * alpha * second."""
    alpha = call["alpha"]
    if alpha is BATCH:
        raise Refused("mixes the batch: an argument depends on the batch size")
    factor = sign * alpha
    first, second = call.args[:2]
    shape = call.output
    if is_value(first) and is_value(second):
        if first.shown is not None or second.shown is not None:
            raise Refused(HIDDEN)
        first, second = widened(call, first, shape), widened(call, second, shape)
        return call.add(Add(shape, (1.0, 1.0 if factor > 0 else -1.0)), first, call.scaled(second, float(abs(factor))))
    value = widened(call, call.values[0], shape)
    if is_value(first):
        return shifted(call, value, None, _times(call.elementwise(1), factor))
    return shifted(call, value, None if factor == 1 else constant(float(factor)), call.elementwise(0))


def _times(source: Source, factor: float) -> Source:
    """A constant times a number; as it is where the number is one."""
    if factor == 1:
        return source
    if factor == -1:
        return lambda: -source()
    return lambda: wide(source()) * factor


rule(aten.add.Tensor, aten.add.Scalar, hidden=True)(partial(_sum, sign=1.0))
rule(aten.sub.Tensor, aten.sub.Scalar)(partial(_sum, sign=-1.0))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def multiply(call: Call) -> Value:
    if len(call.values) == 2:
        return times(call, *(widened(call, value, call.output) for value in call.values))
    value = widened(call, call.values[0], call.output)
    return call.add(Scale(call.output, call.elementwise(1 - call.traced[0]), None), value)


@rule(aten.div.Tensor, aten.div.Scalar)
def divide(call: Call) -> Value:
    if is_value(call.args[1]):
        reciprocal = call.add(activations.reciprocal(), widened(call, call.args[1], call.output))
        if is_value(call.args[0]):
            return times(call, widened(call, call.args[0], call.output), reciprocal)
        return call.add(Scale(call.output, call.elementwise(0), None), reciprocal)
    value = widened(call, call.value(0), call.output)
    return call.add(Divide(call.output, call.elementwise(1)), value)


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def divide_and_round(call: Call) -> Value:
    if call["rounding_mode"] is not None:
        raise Refused("rounding_mode has no rule")
    return divide(call)


rule(aten.neg)(lambda call: call.scaled(call.only(0), -1.0))


@rule(aten.lerp.Scalar)
def lerp(call: Call) -> Value:
    """(1 - w) a + w b."""
    if len(call.values) != 2:
        raise Refused("wants two values of the network; write it out with constants")
    weight = float(call["weight"])
    both = zip(call.values, (1 - weight, weight), strict=True)
    parts = [call.scaled(widened(call, value, call.output), factor) for value, factor in both]
    return call.add(Add(call.output, (1.0, 1.0)), *parts)
