"""Sums, differences, products and quotients with constants."""

from __future__ import annotations

from dataclasses import replace

import torch

from optrelax.networks.calls import BATCH, PRODUCT, Call, Op, Refused, Value
from optrelax.networks.ops import Add, Divide, Scale, Source, wide
from optrelax.networks.registry import rule

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.add.Scalar)
def add(call: Call) -> Op | Value:
    return _sum(call, 1.0)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def subtract(call: Call) -> Op | Value:
    return _sum(call, -1.0)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def subtract_from(call: Call) -> Op | Value:
    this, other, *alpha = call.args
    if call["alpha"] != 1:
        raise Refused("alpha other than 1 has no rule; multiply first")
    return _sum(replace(call, args=(other, this, *alpha)), -1.0)


def _sum(call: Call, sign: float) -> Op | Value:
    """First argument + sign * alpha * second."""
    alpha = call["alpha"]
    if alpha is BATCH:
        raise Refused("mixes the batch: an argument depends on the batch size")
    factor = sign * alpha
    first, second = call.args[:2]
    shape = call.output
    if isinstance(first, Value) and isinstance(second, Value):
        if first.shape != second.shape:
            raise Refused(f"adds shapes {first.shape} and {second.shape}; broadcasting branches has no rule")
        if abs(factor) == 1:
            return Add(shape, (1.0, float(factor)))
        size = torch.tensor(float(abs(factor)), dtype=torch.float64)
        scaled = call.add(Scale(shape, lambda: size, None), second)
        return call.add(Add(shape, (1.0, 1.0 if factor > 0 else -1.0)), first, scaled)
    unbroadcast(call)
    if isinstance(first, Value):
        return Scale(shape, None, _times(call.elementwise(1), factor))
    read = None if factor == 1 else _times(_one, factor)
    return Scale(shape, read, call.elementwise(0))


def _one() -> torch.Tensor:
    return torch.ones((), dtype=torch.float64)


def _times(source: Source, factor: float) -> Source:
    """A constant times a number; as it is where the number is one."""
    if factor == 1:
        return source
    if factor == -1:
        return lambda: -source()
    return lambda: wide(source()) * factor


def unbroadcast(call: Call) -> None:
    """Refuse constants that make the value wider than it is."""
    (value,) = call.values
    if value.shape != call.output:
        raise Refused(f"a constant widens the value from {value.shape} to {call.output}; expand it first")


@rule(aten.mul.Tensor, aten.mul.Scalar)
def multiply(call: Call) -> Op:
    if len(call.values) != 1:
        raise Refused(PRODUCT)
    unbroadcast(call)
    return Scale(call.output, call.elementwise(1 - call.traced[0]), None)


@rule(aten.div.Tensor, aten.div.Scalar)
def divide(call: Call) -> Op:
    if call.traced != (0,):
        raise Refused("division by a value of the network is not affine")
    unbroadcast(call)
    return Divide(call.output, call.elementwise(1))


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def divide_and_round(call: Call) -> Op:
    if call["rounding_mode"] is not None:
        raise Refused("rounding_mode has no rule")
    return divide(call)


@rule(aten.reciprocal)
def reciprocal(call: Call) -> Op:
    raise Refused("division by a value of the network is not affine")


@rule(aten.neg)
def negate(call: Call) -> Op:
    return Scale(call.output, _times(_one, -1.0), None)
