"""Smooth activations: one rule an ATen op."""

from __future__ import annotations

import math

import torch
from torch import nn

from optrelax.networks import activations
from optrelax.networks.calls import Call, Op, Refused, Value
from optrelax.networks.registry import register_op, rule

aten = torch.ops.aten

for _target, _make in {
    aten.sigmoid: activations.sigmoid,
    aten.tanh: activations.tanh,
    aten.silu: activations.silu,
    aten.mish: activations.mish,
    aten.hardswish: activations.hardswish,
    aten.erf: activations.erf,
    aten.exp: activations.exp,
    aten.log: activations.log,
    aten.sqrt: activations.sqrt,
    aten.rsqrt: activations.rsqrt,
    aten.reciprocal: activations.reciprocal,
    aten.square: activations.square,
    aten.sin: activations.sin,
    aten.cos: activations.cos,
    aten.sinh: activations.sinh,
    aten.atan: activations.atan,
}.items():
    rule(_target)(lambda call, make=_make: make())

# In torch a quotient of two values, so taken where it is called.
register_op(nn.Softsign, nn.functional.softsign)(lambda call: activations.softsign())
rule(aten.softplus)(lambda call: activations.softplus(float(call["beta"]), float(call["threshold"])))
rule(aten.gelu)(lambda call: activations.gelu_tanh() if call["approximate"] == "tanh" else activations.gelu())
rule(aten.celu)(lambda call: activations.elu(float(call["alpha"]), 1.0, 1 / float(call["alpha"])))
rule(aten.selu)(lambda call: activations.elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946))
rule(aten.elu)(lambda call: activations.elu(float(call["alpha"]), float(call["scale"]), float(call["input_scale"])))


@rule(aten.log_sigmoid)
def log_sigmoid(call: Call) -> Value:
    """-softplus(-x)."""
    return call.scaled(call.add(activations.softplus(), call.scaled(call.only(0), -1.0)), -1.0)


@rule(aten.pow.Tensor_Scalar)
def power(call: Call) -> Op | Value:
    exponent = float(call["exponent"])
    if exponent == 1:
        return call.only(0)
    if abs(exponent) == 0.5:
        return activations.sqrt() if exponent > 0 else activations.rsqrt()
    if exponent != math.floor(exponent) or exponent == 0:
        raise Refused(f"x ** {exponent:g} has no rule; whole exponents other than 0 have, and 0.5 and -0.5")
    return activations.power(exponent)
