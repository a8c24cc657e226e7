"""The smooth activations in 200-bit arithmetic: an oracle that shares their definitions alone with the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import torch
from torch import Tensor

from optrelax.networks.activations import Smooth, elementary
from optrelax.networks.activations.slopes import slope_chain

Exact = Callable[[Any], Any]


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def _softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(x))


def _gelu(x: Any) -> Any:
    # Beyond, the normal distribution is 0 or 1 in every number of 200 bits.
    return x * mp.erfc(-x / mp.sqrt(2)) / 2 if abs(x) < 1000 else max(x, mp.mpf(0))


def _elu(alpha: float, scale: float, rate: float) -> Exact:
    a, s, r = (mp.mpf(p) for p in (alpha, scale, rate))
    return lambda x: s * x if x > 0 else s * a * mp.expm1(r * x)


def _gelu_slope(x: Any) -> Any:
    return mp.erfc(-x / mp.sqrt(2)) / 2 + x * mp.npdf(x) if abs(x) < 1000 else mp.mpf(x > 0)


def _gelu_tanh_slope(x: Any) -> Any:
    root, cubic = 2 * mp.sqrt(2 / mp.pi), mp.mpf(0.044715)
    inner = root * (x + cubic * x**3)
    return _sigmoid(inner) + x * _sigmoid(inner) * _sigmoid(-inner) * root * (1 + 3 * cubic * x * x)


EXACT: dict[str, Callable[..., Exact]] = {
    "sigmoid": lambda: _sigmoid,
    "tanh": lambda: mp.tanh,
    "softplus": lambda beta=1.0, _=20.0: lambda x: _softplus(mp.mpf(beta) * x) / mp.mpf(beta),
    "elu": _elu,
    "silu": lambda: lambda x: x * _sigmoid(x),
    "gelu": lambda: _gelu,
    "gelu_tanh": lambda: lambda x: x * _sigmoid(2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf(0.044715) * x**3)),
    "mish": lambda: lambda x: x * mp.tanh(_softplus(x)),
    "hardswish": lambda: lambda x: x * min(max(x + 3, mp.mpf(0)), mp.mpf(6)) / 6,
    "softsign": lambda: lambda x: x / (1 + abs(x)),
    "erf": lambda: mp.erf,
    "exp": lambda: mp.exp,
    "log": lambda: mp.log,
    "sqrt": lambda: mp.sqrt,
    "rsqrt": lambda: lambda x: 1 / mp.sqrt(x),
    "power": lambda n: lambda x: x ** int(n),
    "sin": lambda: mp.sin,
    "cos": lambda: mp.cos,
    "sinh": lambda: mp.sinh,
    "atan": lambda: mp.atan,
    "sigmoid'": lambda: lambda x: _sigmoid(x) * _sigmoid(-x),
    "tanh'": lambda: lambda x: 4 * _sigmoid(2 * x) * _sigmoid(-2 * x),
    "gelu'": lambda: _gelu_slope,
    "silu'": lambda: lambda x: _sigmoid(x) + x * _sigmoid(x) * _sigmoid(-x),
    "gelu_tanh'": lambda: _gelu_tanh_slope,
}

_SETTINGS: dict[str, list[tuple[float, ...]]] = {
    "power": [(2.0,), (3.0,), (4.0,), (-1.0,), (-2.0,), (-3.0,)],
    "elu": [(1.0,), (0.5,), (1.6732632423543772, 1.0507009873554805), (0.7, 1.0, 1 / 0.7)],
    "softplus": [(), (2.0, 20.0)],
}
FUNCTIONS = [elementary.known(name, p) for name in elementary.names() for p in _SETTINGS.get(name, [()])]
"""Every smooth activation of the library, in several settings where it has parameters."""
_OWN = ("sigmoid", "tanh", "gelu", "silu", "gelu_tanh")
SLOPES = [link for n in _OWN for link in slope_chain(elementary.known(n, ())) or () if isinstance(link, Smooth)]
"""Their derivatives that are functions of their own."""


def within_domain(f: Smooth, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the intervals, or their mirror images, on which the function is defined."""
    if f.domain[0] == 0:
        l, u = torch.minimum(l.abs(), u.abs()), torch.maximum(l.abs(), u.abs())
        keep = l > 0
    elif f.poles:
        keep = (l > 0) | (u < 0)
    else:
        keep = torch.ones_like(l, dtype=torch.bool)
    return l[keep], u[keep]


@dataclass(frozen=True)
class ClaimedLine:
    """What is said to lie above (sign 1) or below (-1) a function over each of n intervals, and where it is nearest."""

    sign: float
    slope: Tensor
    intercept: Tensor
    nearest: Tensor


def beaten(f: Smooth, l: Tensor, u: Tensor, lines: Sequence[ClaimedLine], points: Tensor) -> list[str]:
    """Lines that the function beats where they are nearest, or at one of the points [m, n]; with no tolerance.

    What is infinite or no number bounds nothing.
    """
    exact = EXACT[f.name](*f.parameters)
    columns = points.double().mT.tolist()
    table = [(c.sign, *(t.double().tolist() for t in (c.slope, c.intercept, c.nearest))) for c in lines]
    found = []
    with mp.workprec(200):
        for k, places in enumerate(columns):
            values = {x: exact(mp.mpf(x)) for x in {*places, *(nearest[k] for _, _, _, nearest in table)}}
            for sign, slopes, intercepts, nearest in table:
                if not math.isfinite(intercepts[k]):
                    continue
                s, i = mp.mpf(slopes[k]), mp.mpf(intercepts[k])
                for x in {*places, nearest[k]}:
                    off = sign * (s * x + i - values[x])
                    if off < 0:
                        where = f"[{float(l[k])!r}, {float(u[k])!r}] at {x!r}"
                        found.append(f"{where}, sign {sign:g}, slope {slopes[k]!r}, off by {mp.nstr(off, 3)}")
    return found
