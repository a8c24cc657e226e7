"""The smooth activations in 200-bit arithmetic: an oracle that shares their definitions alone with the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp

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
}
