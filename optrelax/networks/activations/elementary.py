"""The smooth activations of the library: function, derivative, inflections, extrema, and how they are rounded.

Derivatives are written so that their tails neither lose their digits nor make a gradient that is no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.errors import suggest
from optrelax.networks.activations.extremes import UNITS
from optrelax.networks.activations.smooth import Smooth
from optrelax.rounding import unit_roundoff

_FACTORIES: dict[str, Callable[..., Smooth]] = {}
_INF = math.inf
_ROOT = math.sqrt(2 / math.pi)


def elementary(factory: Callable[..., Smooth]) -> Callable[..., Smooth]:
    """Decorator: an activation that files may name; each setting of it is made, and sampled, once."""
    made = cache(factory)
    _FACTORIES[factory.__name__] = made
    return made


def known(name: str, parameters: tuple[float, ...]) -> Smooth:
    """The activation of this file of that name and these parameters; ValueError where there is none."""
    if name not in _FACTORIES:
        raise ValueError(f"no activation {name!r} is known; {suggest(name, _FACTORIES)}")
    try:
        return _FACTORIES[name](*parameters)
    except TypeError:
        raise ValueError(f"{name}: takes other parameters than {parameters}") from None


def names() -> tuple[str, ...]:
    """Every activation that `known` makes."""
    return tuple(_FACTORIES)


@elementary
def sigmoid() -> Smooth:
    """1 / (1 + exp(-x))."""
    return Smooth("sigmoid", torch.sigmoid, bell, (0.0,), size=torch.sigmoid, steepness=bell)


def bell(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


@elementary
def tanh() -> Smooth:
    """tanh(x)."""

    def derivative(x: Tensor) -> Tensor:
        return 4 * bell(2 * x)

    return Smooth("tanh", torch.tanh, derivative, (0.0,), size=torch.tanh, steepness=derivative)


@elementary
def softplus(beta: float = 1.0, threshold: float = 20.0) -> Smooth:
    """log(1 + exp(beta x)) / beta; torch cuts it off to x where beta x > threshold, which `error` allows for."""
    _require_positive("softplus", beta=beta)
    if not threshold >= 20:
        raise ValueError(f"softplus: a threshold below 20 is a jump that is seen, got {threshold}")

    def function(x: Tensor) -> Tensor:
        return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta

    def size(x: Tensor) -> Tensor:
        cut = math.exp(-threshold) / beta / (UNITS * unit_roundoff(x.dtype))
        return function(x) + torch.where(beta * x > 0.99 * threshold, cut, 0.0)

    def derivative(x: Tensor) -> Tensor:
        return torch.sigmoid(beta * x)

    return Smooth("softplus", function, derivative, size=size, steepness=derivative, parameters=(beta, threshold))


@elementary
def elu(alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0) -> Smooth:
    """scale * x where x > 0, scale * alpha * (exp(rate * x) - 1) elsewhere: ELU, SELU, CELU."""
    _require_positive("elu", alpha=alpha, scale=scale, rate=rate)
    left = scale * alpha * rate

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(rate * x.clamp_max(0)))

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale, left * torch.exp(rate * x.clamp_max(0)))

    def size(x: Tensor) -> Tensor:
        return function(x).abs() + scale * alpha * (rate * x).abs().clamp_max(1.0)

    # Where the slope falls at 0, the function bends the other way there.
    bends = (0.0,) if left > scale else ()
    return Smooth("elu", function, derivative, bends, size=size, steepness=derivative, parameters=(alpha, scale, rate))


@elementary
def softsign() -> Smooth:
    """x / (1 + |x|)."""

    def derivative(x: Tensor) -> Tensor:
        share = 1 / (1 + x.abs())
        return share * share

    return Smooth("softsign", F.softsign, derivative, (0.0,), size=F.softsign, steepness=derivative)


@elementary
def erf() -> Smooth:
    """The error function."""

    def derivative(x: Tensor) -> Tensor:
        return torch.exp(-x * x) * (2 / math.sqrt(math.pi))

    return Smooth("erf", torch.erf, derivative, (0.0,), size=torch.erf)


@elementary
def exp() -> Smooth:
    """e^x."""
    return Smooth("exp", torch.exp, torch.exp, size=torch.exp, steepness=torch.exp)


@elementary
def log() -> Smooth:
    """Natural logarithm, of x > 0."""
    return Smooth("log", torch.log, torch.reciprocal, domain=(0.0, _INF), size=torch.log, steepness=torch.reciprocal)


@elementary
def sqrt() -> Smooth:
    """Square root, of x >= 0; at 0, where its slope is infinite, the gradient is 0."""

    def value(x: Tensor) -> Tensor:
        return torch.where(x == 0, 0, torch.sqrt(torch.where(x == 0, 1, x)))

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x == 0, 0, 0.5 / torch.sqrt(torch.where(x == 0, 1, x)))

    def steepness(x: Tensor) -> Tensor:
        return 0.5 / torch.sqrt(x)

    return Smooth("sqrt", value, derivative, domain=(0.0, _INF), size=value, steepness=steepness)


@elementary
def rsqrt() -> Smooth:
    """1 / sqrt(x), of x > 0."""

    def derivative(x: Tensor) -> Tensor:
        return -0.5 * torch.rsqrt(x) / x

    def function(x: Tensor) -> Tensor:
        return 1 / torch.sqrt(x)

    return Smooth("rsqrt", function, derivative, domain=(0.0, _INF), size=function, steepness=derivative)


@elementary
def power(exponent: float) -> Smooth:
    """x^exponent for a whole number other than 0 and 1; where it is negative, of intervals without 0."""
    n = int(exponent)
    if n != exponent or n in (0, 1):
        raise ValueError(f"power: wants a whole number other than 0 and 1, got {exponent}")

    def function(x: Tensor) -> Tensor:
        return torch.reciprocal(x) if n == -1 else x * x if n == 2 else x**n

    def derivative(x: Tensor) -> Tensor:
        return 2 * x if n == 2 else n * x ** (n - 1)

    def size(x: Tensor) -> Tensor:
        return (abs(n) / 4 + 1) * function(x)

    def steepness(x: Tensor) -> Tensor:
        return (abs(n) / 4 + 1) * derivative(x)

    odd = n % 2 != 0
    return Smooth(
        "power",
        function,
        derivative,
        inflections=(0.0,) if n > 0 and odd else (),
        extrema=(0.0,) if n > 0 and not odd else (),
        poles=(0.0,) if n < 0 else (),
        size=size,
        steepness=steepness,
        parameters=(float(n),),
    )


def reciprocal() -> Smooth:
    """1 / x, of intervals without 0."""
    return power(-1.0)


def square() -> Smooth:
    """x^2."""
    return power(2.0)


@elementary
def sin() -> Smooth:
    """sin(x)."""
    return Smooth("sin", torch.sin, torch.cos, (0.0,), (math.pi / 2,), period=math.pi, size=torch.ones_like)


@elementary
def cos() -> Smooth:
    """cos(x)."""

    def derivative(x: Tensor) -> Tensor:
        return -torch.sin(x)

    return Smooth("cos", torch.cos, derivative, (math.pi / 2,), (0.0,), period=math.pi, size=torch.ones_like)


@elementary
def sinh() -> Smooth:
    """sinh(x)."""
    return Smooth("sinh", torch.sinh, torch.cosh, (0.0,), size=torch.sinh, steepness=torch.cosh)


@elementary
def atan() -> Smooth:
    """Arc tangent."""

    def derivative(x: Tensor) -> Tensor:
        return 1 / (1 + x * x)

    return Smooth("atan", torch.atan, derivative, (0.0,), size=torch.atan, steepness=derivative)


def _require_positive(name: str, **numbers: float) -> None:
    for what, value in numbers.items():
        if not 0 < value < _INF:
            raise ValueError(f"{name}: {what} must be > 0 and finite, got {value}")
