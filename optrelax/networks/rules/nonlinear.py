"""Piecewise-linear activations, and dropout that is off."""

from __future__ import annotations

import math
from typing import Any

import torch

from optrelax.networks import activations
from optrelax.networks.calls import Call, Op, Refused, Value
from optrelax.networks.linear_maps import Slope
from optrelax.networks.ops import Add, Scale, constant
from optrelax.networks.registry import rule

aten = torch.ops.aten


def _clamped(call: Call, low: Any, high: Any) -> Op | Value:
    low, high = (None if end is None or abs(float(end)) == math.inf else float(end) for end in (low, high))
    if high is None:
        return call.only(0) if low is None else activations.relu() if low == 0 else activations.floor(low)
    return activations.ceiling(high) if low is None else activations.clamp(low, high, "clamp")


rule(aten.relu)(lambda call: activations.relu())
rule(aten.leaky_relu)(lambda call: activations.leaky_relu(float(call["negative_slope"])))
rule(aten.hardtanh)(lambda call: activations.clamp(float(call["min_val"]), float(call["max_val"])))
rule(aten.relu6)(lambda call: activations.clamp(0.0, 6.0, "relu6"))
rule(aten.abs)(lambda call: activations.absolute())
rule(aten.clamp.default, aten.clip.default)(lambda call: _clamped(call, call["min"], call["max"]))
rule(aten.clamp_min.default)(lambda call: _clamped(call, call["min"], None))
rule(aten.clamp_max.default)(lambda call: _clamped(call, None, call["max"]))


@rule(aten.threshold)
def threshold(call: Call) -> Op:
    edge, value = float(call["threshold"]), float(call["value"])
    if edge != value:
        raise Refused(
            f"jumps at {edge:g}, where it goes from {value:g} to {edge:g}; only value = threshold is continuous"
        )
    return activations.relu() if edge == 0 else activations.floor(edge)


@rule(aten.hardshrink)
def hardshrink(call: Call) -> Value:
    if float(call["lambd"]) == 0:
        return call.only(0)
    raise Refused("jumps at lambd and -lambd; use Softshrink, which is continuous")


@rule(aten.softshrink)
def softshrink(call: Call) -> Op | Value:
    size = float(call["lambd"])
    if size == 0:
        return call.only(0)
    # x less what of it lies in [-size, size]: the hull of one is that of the other.
    inside = call.add(activations.clamp(-size, size, "softshrink"), call.only(0))
    return call.add(Add(call.output, (1.0, -1.0)), call.only(0), inside)


@rule(aten.hardsigmoid)
def hardsigmoid(call: Call) -> Value:
    # relu6(x + 3) / 6
    shifted = call.add(Scale(call.output, None, constant(3.0)), call.only(0))
    return call.scaled(call.add(activations.clamp(0.0, 6.0, "hardsigmoid"), shifted), 1 / 6)


@rule(aten.rrelu)
def rrelu(call: Call) -> Op:
    if call["training"]:
        raise Refused("is random in training mode; call .eval()")
    return activations.leaky_relu((float(call["lower"]) + float(call["upper"])) / 2)


@rule(aten.prelu, aten._prelu_kernel)
def prelu(call: Call) -> Value:
    """a x + (1 - a) relu(x), with the slopes read at each use: over [l, u] its hull is the triangle under the chord."""
    value, read = call.only(0), call.constant(1)
    if read is None:
        raise Refused("has no slopes")
    positive = call.add(activations.relu(), value)
    bent = call.add(Slope(value.shape, read), value)
    rest = call.add(Slope(value.shape, read, rest=True), positive)
    return call.add(Add(value.shape, (1.0, 1.0)), bent, rest)


@rule(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout, hidden=True)
def dropout(call: Call) -> Value:
    if call["train"]:
        raise Refused("is random in training mode, its default; pass training=self.training and call .eval()")
    return call.value()
