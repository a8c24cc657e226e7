"""Smooth activations: one rule an ATen op."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from optrelax.networks import activations
from optrelax.networks.activations import Smooth
from optrelax.networks.calls import Call, Op, Refused, Value
from optrelax.networks.ops import Scale
from optrelax.networks.registry import register_op, rule

aten = torch.ops.aten

_PLAIN: dict[object, Callable[[], Smooth]] = {
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
}


def _plain(make: Callable[[], Smooth]) -> Callable[[Call], Op]:
    return lambda call: make()


for _target, _make in _PLAIN.items():
    rule(_target)(_plain(_make))


# In torch a quotient of two values, so taken where it is called.
register_op(nn.Softsign, nn.functional.softsign)(_plain(activations.softsign))


@rule(aten.softplus)
def softplus(call: Call) -> Op:
    return activations.softplus(float(call["beta"]), float(call["threshold"]))


@rule(aten.log_sigmoid)
def log_sigmoid(call: Call) -> Value:
    """-softplus(-x)."""
    below = call.add(Scale(call.output, _minus_one, None), call.only(0))
    return call.add(Scale(call.output, _minus_one, None), call.add(activations.softplus(), below))


def _minus_one() -> torch.Tensor:
    return torch.tensor(-1.0, dtype=torch.float64)


@rule(aten.elu)
def elu(call: Call) -> Op:
    return activations.elu(float(call["alpha"]), float(call["scale"]), float(call["input_scale"]))


@rule(aten.celu)
def celu(call: Call) -> Op:
    alpha = float(call["alpha"])
    return activations.elu(alpha, 1.0, 1 / alpha)


@rule(aten.selu)
def selu(call: Call) -> Op:
    return activations.elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@rule(aten.gelu)
def gelu(call: Call) -> Op:
    return activations.gelu_tanh() if call["approximate"] == "tanh" else activations.gelu()


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
