"""Derivatives of smooth activations: ops that make them of what an activation reads, one after the other.

Each is a chain of activations that the library has, or a smooth function of its own, whose inflections are those of the
derivative: where the third derivative of the activation turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from optrelax.networks.activations import elementary
from optrelax.networks.activations.contract import Activation
from optrelax.networks.activations.piecewise_functions import absolute
from optrelax.networks.activations.piecewise_linear import PiecewiseLinear
from optrelax.networks.activations.smooth import Function, Smooth

Link = Activation | tuple[float, float]
"""A part of a chain: an activation, or factor and shift."""
_ROOT = math.sqrt(2 / math.pi)


def slope_chain(activation: Smooth) -> tuple[Link, ...] | None:
    """What makes the activation's derivative of its input, first to last; None where nothing is known.

    Example:
        >>> [link if isinstance(link, tuple) else link.name for link in slope_chain(ox.activations.cos())]
        ['sin', (-1.0, 0.0)]
    """
    return _chain(activation.name, activation.parameters) if activation.name in _CHAINS else None


@cache
def _chain(name: str, parameters: tuple[float, ...]) -> tuple[Link, ...]:
    return _CHAINS[name](*parameters)


def _below(x: Tensor) -> Tensor:
    return x.clamp_max(0)


def _elu(alpha: float, scale: float, rate: float) -> tuple[Link, ...]:
    if not math.isclose(alpha * rate, 1.0, rel_tol=1e-15):  # a float's reciprocal, times it
        raise ValueError("elu has a corner at 0 with these parameters, and its derivative a jump")
    below = PiecewiseLinear("min(x, 0)", _below, (0.0,), (1.0, 0.0), (0.0, 0.0))
    return below, (rate, 0.0), elementary.exp(), (scale, 0.0)


def _bell(name: str, rate: float) -> Smooth:
    """rate^2 s(rate x) s(-rate x), s the sigmoid."""

    def function(x: Tensor) -> Tensor:
        return rate * rate * torch.sigmoid(rate * x) * torch.sigmoid(-rate * x)

    def derivative(x: Tensor) -> Tensor:
        return -rate * function(x) * torch.tanh(rate * x / 2)

    bend = 1.3169578969248167 / rate  # log(2 + sqrt(3))
    return Smooth(name, function, derivative, (-bend, bend), (0.0,), size=torch.ones_like)


def _gelu() -> Smooth:
    def density(x: Tensor) -> Tensor:
        return torch.exp(-x * x / 2) * (_ROOT / 2)

    def function(x: Tensor) -> Tensor:
        return torch.special.erfc(x * -math.sqrt(0.5)) / 2 + x.clamp(-60, 60) * density(x)

    def derivative(x: Tensor) -> Tensor:
        x = x.clamp(-60, 60)
        return (2 - x * x) * density(x)

    return _gate("gelu'", function, derivative, 2.0, math.sqrt(2))


def _gated(name: str, cubic: float, rate: float, bend: float, turn: float) -> Smooth:
    """The derivative of x s(g), s the sigmoid and g = rate (x + cubic x^3)."""
    most = 50.0 if cubic else 1000.0

    def gate(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = rate * (x + cubic * x**3)
        return inner, rate * (1 + 3 * cubic * x * x), torch.sigmoid(inner) * torch.sigmoid(-inner)

    def function(x: Tensor) -> Tensor:
        x = x.clamp(-most, most)
        inner, steep, bell = gate(x)
        return torch.sigmoid(inner) + x * bell * steep

    def derivative(x: Tensor) -> Tensor:
        x = x.clamp(-most, most)
        inner, steep, bell = gate(x)
        bent = 6 * rate * cubic * x
        return 2 * bell * steep + x * bell * (bent - torch.tanh(inner / 2) * steep * steep)

    return _gate(name, function, derivative, bend, turn)


def _gate(name: str, function: Function, derivative: Function, bend: float, turn: float) -> Smooth:
    """A slope that falls below 0, rises through 1 / 2 at 0 and comes back to 1 from above."""
    return Smooth(
        name, function, derivative, (-bend, 0.0, bend), (-turn, turn), size=partial(torch.full_like, fill_value=4.0)
    )


_CHAINS: dict[str, Callable[..., tuple[Link, ...]]] = {
    "exp": lambda: (elementary.exp(),),
    "sin": lambda: (elementary.cos(),),
    "cos": lambda: (elementary.sin(), (-1.0, 0.0)),
    "log": lambda: (elementary.reciprocal(),),
    "sqrt": lambda: (elementary.rsqrt(), (0.5, 0.0)),
    "rsqrt": lambda: (elementary.rsqrt(), elementary.power(3.0), (-0.5, 0.0)),
    "power": lambda n: ((n, 0.0),) if n == 2 else (elementary.power(n - 1), (n, 0.0)),
    "softplus": lambda beta, threshold: ((beta, 0.0), elementary.sigmoid()),
    "softsign": lambda: (absolute(), (1.0, 1.0), elementary.power(-2.0)),
    "atan": lambda: (elementary.square(), (1.0, 1.0), elementary.reciprocal()),
    "erf": lambda: (elementary.square(), (-1.0, 0.0), elementary.exp(), (2 / math.sqrt(math.pi), 0.0)),
    "elu": _elu,
    "sigmoid": lambda: (_bell("sigmoid'", 1.0),),
    "tanh": lambda: (_bell("tanh'", 2.0),),
    "gelu": lambda: (_gelu(),),
    "silu": lambda: (_gated("silu'", 0.0, 1.0, 3.4358409935351107, 2.3993572805154677),),
    "gelu_tanh": lambda: (_gated("gelu_tanh'", 0.044715, 2 * _ROOT, 2.0134807246242580, 1.4185040087908283),),
}
"""By name, of the parameters."""
