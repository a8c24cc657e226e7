"""What several entries come to: logsumexp, norms, variances; and gated linear units, which halve a dimension."""

from __future__ import annotations

import math

import torch

from optrelax.networks import activations
from optrelax.networks.calls import Call, Refused, Value
from optrelax.networks.linear_maps import Sum
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Add, Reshape
from optrelax.networks.registry import rule
from optrelax.networks.rules.products import times
from optrelax.networks.views import Concatenate, Expand, Pad

aten = torch.ops.aten


@rule(aten.logsumexp)
def logsumexp(call: Call) -> Value:
    """Dimension by dimension, and there by pairs: log(e^a + e^b) = a + softplus(b - a)."""
    value, dims = call.only(0), call.dims(call["dim"])
    for dim in dims:
        value = log_sum(call, value, dim)
    return _shaped(call, value)


def log_sum(call: Call, value: Value, dim: int) -> Value:
    """log of the sum of the exponentials along a dimension, which keeps length 1."""
    while (count := value.shape[dim]) > 1:
        half = count // 2
        first, second = (_part(call, value, dim, start, start + half) for start in (0, half))
        wide = first.shape
        more = call.add(activations.softplus(), call.add(Add(wide, (1.0, -1.0)), second, first))
        total = call.add(Add(wide, (1.0, 1.0)), first, more)
        if count % 2:
            rest = _part(call, value, dim, count - 1, count)
            total = call.add(Concatenate([wide, rest.shape], dim), total, rest)
        value = total
    return value


@rule(aten.linalg_vector_norm)
def vector_norm(call: Call) -> Value:
    """The 1, 2 and infinity norm over dimensions."""
    value, dims, order = call.only(0), call.dims(call["dim"]), float(call["ord"])
    shape = value.shape
    if order == 2:
        square = call.add(Sum(shape, dims), call.add(activations.square(), value))
        return _shaped(call, call.add(activations.sqrt(), square))
    size = call.add(activations.absolute(), value)
    if order == 1:
        return _shaped(call, call.add(Sum(shape, dims), size))
    if order == math.inf:
        return _shaped(call, call.add(Greatest.over(shape, dims, False), size))
    raise Refused(f"the norm of order {order:g} has no rule; 1, 2 and inf have")


@rule(aten.var)
def variance(call: Call) -> Value:
    return _shaped(call, _variance(call))


@rule(aten.std)
def deviation(call: Call) -> Value:
    return _shaped(call, call.add(activations.sqrt(), _variance(call)))


def _variance(call: Call) -> Value:
    """Squares of what is left of the mean, summed over dimensions and divided by their number less the correction."""
    value = call.only(0)
    shape, dims = value.shape, call.dims(call["dim"] if "dim" in call.names else None)
    count = math.prod(shape[d] for d in dims)
    divisor = count - _correction(call)
    if divisor <= 0:
        raise Refused(f"the variance of {count} number(s) less the correction divides by nothing")
    mean = call.add(Sum(shape, dims, True, count), value)
    centred = call.add(Add(shape, (1.0, -1.0)), value, call.add(Expand(mean.shape, shape), mean))
    return call.add(Sum(shape, dims, divisor=divisor), call.add(activations.square(), centred))


def _correction(call: Call) -> float:
    if "unbiased" in call.names:
        return float(bool(call["unbiased"]))
    return 1.0 if call["correction"] is None else float(call["correction"])


@rule(aten.glu)
def gated(call: Call) -> Value:
    """a * sigmoid(b) of the two halves of a dimension."""
    value = call.only(0)
    (dim,) = call.dims(call["dim"])
    half = value.shape[dim] // 2
    first, gate = (_part(call, value, dim, start, start + half) for start in (0, half))
    return times(call, first, call.add(activations.sigmoid(), gate))


def _part(call: Call, value: Value, dim: int, start: int, stop: int) -> Value:
    return call.add(Pad.slicing(value.shape, dim, start, stop), value)


def _shaped(call: Call, value: Value) -> Value:
    """In the shape of the call's output: dimensions of length 1 kept or dropped."""
    return value if value.shape == call.output else call.add(Reshape(value.shape, call.output), value)
