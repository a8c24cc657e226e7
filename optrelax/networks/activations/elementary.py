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
from optrelax.networks.activations.smooth import UNITS, Smooth
from optrelax.rounding import unit_roundoff

_FACTORIES: dict[str, Callable[..., Smooth]] = {}
_INF = math.inf
_ROOT = math.sqrt(2 / math.pi)


def _elementary(factory: Callable[..., Smooth]) -> Callable[..., Smooth]:
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


@_elementary
def sigmoid() -> Smooth:
    """1 / (1 + exp(-x))."""
    return Smooth("sigmoid", torch.sigmoid, _bell, (0.0,), size=torch.sigmoid, steepness=_bell)


def _bell(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


@_elementary
def tanh() -> Smooth:
    """tanh(x)."""

    def derivative(x: Tensor) -> Tensor:
        return 4 * _bell(2 * x)

    return Smooth("tanh", torch.tanh, derivative, (0.0,), size=torch.tanh, steepness=derivative)


@_elementary
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


@_elementary
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


@_elementary
def silu() -> Smooth:
    """x * sigmoid(x): SiLU, Swish."""

    def derivative(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))

    def steepness(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1 + x.abs())

    bend = 2.3993572805154677
    return Smooth("silu", F.silu, derivative, (-bend, bend), (-1.278464542761074,), size=F.silu, steepness=steepness)


@_elementary
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


@_elementary
def gelu_tanh() -> Smooth:
    """x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: GELU's approximation."""

    def function(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def derivative(x: Tensor) -> Tensor:
        x = x.clamp(-50, 50)
        inner = 2 * _ROOT * (x + 0.044715 * x**3)
        return torch.sigmoid(inner) + x * _bell(inner) * (2 * _ROOT) * (1 + 3 * 0.044715 * x * x)

    bend = 1.4185040087908283
    return Smooth("gelu_tanh", function, derivative, (-bend, bend), (-0.7524614220710163,), size=torch.abs)


@_elementary
def mish() -> Smooth:
    """x * tanh(softplus(x))."""

    def derivative(x: Tensor) -> Tensor:
        plus = torch.logaddexp(x, torch.zeros_like(x))
        return torch.tanh(plus) + x * 4 * _bell(2 * plus) * torch.sigmoid(x)

    bends = (-2.256376396360793, 1.4905711794854285)
    return Smooth("mish", F.mish, derivative, bends, (-1.1924312145154952,), size=torch.abs)


@_elementary
def hardswish() -> Smooth:
    """x * min(max(x + 3, 0), 6) / 6: a parabola between two straight ends."""

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x < -3, 0.0, torch.where(x > 3, 1.0, x / 3 + 0.5))

    return Smooth("hardswish", F.hardswish, derivative, (-3.0, 3.0), (-1.5,), size=torch.abs)


@_elementary
def softsign() -> Smooth:
    """x / (1 + |x|)."""

    def derivative(x: Tensor) -> Tensor:
        share = 1 / (1 + x.abs())
        return share * share

    return Smooth("softsign", F.softsign, derivative, (0.0,), size=F.softsign, steepness=derivative)


@_elementary
def erf() -> Smooth:
    """The error function."""

    def derivative(x: Tensor) -> Tensor:
        return torch.exp(-x * x) * (2 / math.sqrt(math.pi))

    return Smooth("erf", torch.erf, derivative, (0.0,), size=torch.erf)


@_elementary
def exp() -> Smooth:
    """e^x."""
    return Smooth("exp", torch.exp, torch.exp, size=torch.exp, steepness=torch.exp)


@_elementary
def log() -> Smooth:
    """Natural logarithm, of x > 0."""
    return Smooth("log", torch.log, torch.reciprocal, domain=(0.0, _INF), size=torch.log, steepness=torch.reciprocal)


@_elementary
def sqrt() -> Smooth:
    """Square root, of x >= 0."""

    def derivative(x: Tensor) -> Tensor:
        return 0.5 / torch.sqrt(x)

    return Smooth("sqrt", torch.sqrt, derivative, domain=(0.0, _INF), size=torch.sqrt, steepness=derivative)


@_elementary
def rsqrt() -> Smooth:
    """1 / sqrt(x), of x > 0."""

    def derivative(x: Tensor) -> Tensor:
        return -0.5 * torch.rsqrt(x) / x

    def function(x: Tensor) -> Tensor:
        return 1 / torch.sqrt(x)

    return Smooth("rsqrt", function, derivative, domain=(0.0, _INF), size=function, steepness=derivative)


@_elementary
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


@_elementary
def sin() -> Smooth:
    """sin(x)."""
    return Smooth("sin", torch.sin, torch.cos, (0.0,), (math.pi / 2,), period=math.pi, size=torch.ones_like)


@_elementary
def cos() -> Smooth:
    """cos(x)."""

    def derivative(x: Tensor) -> Tensor:
        return -torch.sin(x)

    return Smooth("cos", torch.cos, derivative, (math.pi / 2,), (0.0,), period=math.pi, size=torch.ones_like)


@_elementary
def sinh() -> Smooth:
    """sinh(x)."""
    return Smooth("sinh", torch.sinh, torch.cosh, (0.0,), size=torch.sinh, steepness=torch.cosh)


@_elementary
def atan() -> Smooth:
    """Arc tangent."""

    def derivative(x: Tensor) -> Tensor:
        return 1 / (1 + x * x)

    return Smooth("atan", torch.atan, derivative, (0.0,), size=torch.atan, steepness=derivative)


def _require_positive(name: str, **numbers: float) -> None:
    for what, value in numbers.items():
        if not 0 < value < _INF:
            raise ValueError(f"{name}: {what} must be > 0 and finite, got {value}")
