"""Piecewise-linear activations, and dropout that is off."""

from __future__ import annotations

import torch

from optrelax.networks import activations
from optrelax.networks.calls import Call, Op, Refused, Value
from optrelax.networks.registry import rule

aten = torch.ops.aten


@rule(aten.relu)
def relu(call: Call) -> Op:
    return activations.relu()


@rule(aten.leaky_relu)
def leaky_relu(call: Call) -> Op:
    return activations.leaky_relu(float(call["negative_slope"]))


@rule(aten.hardtanh)
def hardtanh(call: Call) -> Op:
    return activations.clamp(float(call["min_val"]), float(call["max_val"]))


@rule(aten.relu6)
def relu6(call: Call) -> Op:
    return activations.clamp(0.0, 6.0, "relu6")


@rule(aten.clamp.default)
def clamp(call: Call) -> Op:
    low, high = call["min"], call["max"]
    if low == 0 and high is None:
        return activations.relu()
    if low is None or high is None:
        raise Refused("clamp needs two numbers (or min=0 alone)")
    return activations.clamp(float(low), float(high), "clamp")


@rule(aten.clamp_min.default)
def clamp_min(call: Call) -> Op:
    if call["min"] != 0:
        raise Refused("clamp needs two numbers (or min=0 alone)")
    return activations.relu()


@rule(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
def dropout(call: Call) -> Value:
    if call["train"]:
        raise Refused("is random in training mode, its default; pass training=self.training and call .eval()")
    return call.value()
