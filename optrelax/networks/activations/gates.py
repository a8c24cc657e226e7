"""Activations that gate their input: SiLU, GELU, Mish, Hardswish."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.activations.elementary import bell, elementary
from optrelax.networks.activations.smooth import Smooth

_ROOT = math.sqrt(2 / math.pi)


@elementary
def silu() -> Smooth:
    """x * sigmoid(x): SiLU, Swish."""

    def function(x: Tensor) -> Tensor:
        # Of PyTorch's, exp(-x) overflows before x * exp(x) vanishes; from here on its denominator is 1 to rounding.
        return torch.where(x < -40, x * torch.exp(x.clamp_max(0)), F.silu(x))

    def derivative(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))

    def steepness(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1 + x.abs())

    bend = 2.3993572805154677
    return Smooth(
        "silu", function, derivative, (-bend, bend), (-1.278464542761074,), size=function, steepness=steepness
    )


@elementary
def gelu() -> Smooth:
    """x * Phi(x), Phi the normal distribution: GELU."""

    def below(x: Tensor) -> Tensor:
        return torch.special.erfc(x * -math.sqrt(0.5)) / 2

    def density(x: Tensor) -> Tensor:
        return torch.exp(-x * x / 2) * (_ROOT / 2)

    def derivative(x: Tensor) -> Tensor:
        return below(x) + x.clamp(-60, 60) * density(x)

    def steepness(x: Tensor) -> Tensor:
        return below(x) + x.abs() * density(x) + 2.0**-40 * (x.abs() < 40)

    bend = math.sqrt(2)
    return Smooth(
        "gelu", F.gelu, derivative, (-bend, bend), (-0.7517915246935645,), size=torch.abs, steepness=steepness
    )


@elementary
def gelu_tanh() -> Smooth:
    """x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: GELU's approximation."""

    def function(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def derivative(x: Tensor) -> Tensor:
        x = x.clamp(-50, 50)
        inner = 2 * _ROOT * (x + 0.044715 * x**3)
        return torch.sigmoid(inner) + x * bell(inner) * (2 * _ROOT) * (1 + 3 * 0.044715 * x * x)

    bend = 1.4185040087908283
    return Smooth("gelu_tanh", function, derivative, (-bend, bend), (-0.7524614220710163,), size=torch.abs)


@elementary
def mish() -> Smooth:
    """x * tanh(softplus(x))."""

    def derivative(x: Tensor) -> Tensor:
        plus = torch.logaddexp(x, torch.zeros_like(x))
        return torch.tanh(plus) + x * 4 * bell(2 * plus) * torch.sigmoid(x)

    bends = (-2.256376396360793, 1.4905711794854285)
    return Smooth("mish", F.mish, derivative, bends, (-1.1924312145154952,), size=torch.abs)


@elementary
def hardswish() -> Smooth:
    """x * min(max(x + 3, 0), 6) / 6: a parabola between two straight ends."""

    def function(x: Tensor) -> Tensor:
        # PyTorch's multiplies by 6 before it divides, which overflows where x itself does not.
        return torch.where(x.abs() < 3, F.hardswish(x), x.clamp_min(0))

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x < -3, 0.0, torch.where(x > 3, 1.0, x / 3 + 0.5))

    return Smooth("hardswish", function, derivative, (-3.0, 3.0), (-1.5,), size=torch.abs)
