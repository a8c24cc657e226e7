"""The smooth activations in interval arithmetic of 200 bits and more: an oracle that shares their definitions alone.

A value is given in two parts, `whole + rest`, so that what a function comes close to far out (0, 1, x) takes no part in
rounding: 1 lies above every sigmoid, and a line a 10^-1000th below 1 does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from flint import arb, ctx
from torch import Tensor

from optrelax.networks.activations import Smooth, elementary
from optrelax.networks.activations.slopes import slope_chain
from optrelax.rounding import underflow, unit_roundoff

Parts = tuple[arb, arb]
Exact = Callable[[arb], Parts]

PRECISIONS = (200, 6000)
"""Bits, one after the other until a question is decided; the last hold sums of products of floats without rounding."""

_FAR = 100_000
"""Exponentials of more lie beyond all products of two floats, and compare with them as that of this number does."""


def _within(x: arb, far: int = _FAR) -> arb:
    return x.max(arb(-far)).min(arb(far))


def _exp(x: arb) -> arb:
    return _within(x).exp()


def _gate(x: arb) -> Parts:
    """The sigmoid, as what it comes close to and the rest."""
    e = _exp(-abs(x))
    rest = e / (1 + e)
    return (arb(1), -rest) if x > 0 else (arb(0), rest)


def _gate_slope(x: arb) -> arb:
    e = _exp(-abs(x))
    return e / (1 + e) ** 2


def _tanh(x: arb) -> Parts:
    if abs(x) < 1:
        return arb(0), x.tanh()
    e = _exp(-2 * abs(x))
    rest = 2 * e / (1 + e)
    return (arb(1), -rest) if x > 0 else (arb(-1), rest)


def _softplus(x: arb) -> Parts:
    return x.max(arb(0)), _exp(-abs(x)).log1p()


def _softplus_of(beta: float = 1.0, _threshold: float = 20.0) -> Exact:
    rate = arb(beta)
    return lambda x: (x.max(arb(0)), _softplus(rate * x)[1] / rate)


def _elu(alpha: float, scale: float, rate: float) -> Exact:
    a, s, r = arb(alpha), arb(scale), arb(rate)

    def exact(x: arb) -> Parts:
        if x > 0:
            return s * x, arb(0)
        return (arb(0), s * a * (r * x).expm1()) if x > -1 else (-s * a, s * a * _exp(r * x))

    return exact


def _weighted(gate: Parts, x: arb) -> Parts:
    return x * gate[0], x * gate[1]


def _normal(x: arb) -> Parts:
    """The normal distribution."""
    rest = (_within(abs(x), 500) / arb(2).sqrt()).erfc() / 2
    return (arb(1), -rest) if x > 0 else (arb(0), rest)


def _gelu_slope(x: arb) -> Parts:
    whole, rest = _normal(x)
    near = _within(x, 500)
    return whole, rest + near * (-near * near / 2).exp() / (2 * arb.pi()).sqrt()


def _cubic(x: arb) -> tuple[arb, arb]:
    """What GELU's approximation gates by, and its derivative."""
    root, cubic = 2 * (2 / arb.pi()).sqrt(), arb(0.044715)
    return root * (x + cubic * x * x * x), root * (1 + 3 * cubic * x * x)


def _gelu_tanh_slope(x: arb) -> Parts:
    inner, steep = _cubic(x)
    whole, rest = _gate(inner)
    return whole, rest + x * _gate_slope(inner) * steep


def _silu_slope(x: arb) -> Parts:
    whole, rest = _gate(x)
    return whole, rest + _within(x) * _gate_slope(x)


def _mish(x: arb) -> Parts:
    e = _exp(-abs(x))
    if x > 0:
        return x, -x * 2 * e * e / (1 + 2 * e + 2 * e * e)
    return arb(0), x * (e * e + 2 * e) / (e * e + 2 * e + 2)


def _hardswish(x: arb) -> Parts:
    if abs(x) >= 3:
        return x.max(arb(0)), arb(0)
    return arb(0), x * (x + 3) / 6


def _softsign(x: arb) -> Parts:
    if abs(x) < 1:
        return arb(0), x / (1 + abs(x))
    rest = 1 / (1 + abs(x))
    return (arb(1), -rest) if x > 0 else (arb(-1), rest)


def _erf(x: arb) -> Parts:
    if abs(x) < 1:
        return arb(0), x.erf()
    rest = _within(abs(x), 500).erfc()
    return (arb(1), -rest) if x > 0 else (arb(-1), rest)


def _power(n: float) -> Exact:
    count = int(abs(n))

    def exact(x: arb) -> Parts:
        product = x
        for _ in range(count - 1):
            product = product * x
        return arb(0), product if n > 0 else 1 / product

    return exact


def _alone(function: Callable[[arb], arb]) -> Callable[[], Exact]:
    return lambda: lambda x: (arb(0), function(x))


EXACT: dict[str, Callable[..., Exact]] = {
    "sigmoid": lambda: _gate,
    "tanh": lambda: _tanh,
    "softplus": _softplus_of,
    "elu": _elu,
    "silu": lambda: lambda x: _weighted(_gate(x), x),
    "gelu": lambda: lambda x: _weighted(_normal(x), x),
    "gelu_tanh": lambda: lambda x: _weighted(_gate(_cubic(x)[0]), x),
    "mish": lambda: _mish,
    "hardswish": lambda: _hardswish,
    "softsign": lambda: _softsign,
    "erf": lambda: _erf,
    "exp": _alone(_exp),
    "log": _alone(arb.log),
    "sqrt": _alone(arb.sqrt),
    "rsqrt": _alone(lambda x: 1 / x.sqrt()),
    "power": _power,
    "sin": _alone(arb.sin),
    "cos": _alone(arb.cos),
    "sinh": _alone(lambda x: _within(x).sinh()),
    "atan": _alone(arb.atan),
    "sigmoid'": _alone(_gate_slope),
    "tanh'": _alone(lambda x: 4 * _gate_slope(2 * x)),
    "gelu'": lambda: _gelu_slope,
    "silu'": lambda: _silu_slope,
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


@dataclass(frozen=True)
class Findings:
    """Lines that the function certainly beats, in words; and how many claims no precision decides."""

    beaten: list[str]
    undecided: int


def beaten(f: Smooth, l: Tensor, u: Tensor, lines: Sequence[ClaimedLine], points: Tensor) -> Findings:
    """Claims that fail where their lines are nearest, or at one of the points [m, n]; with no tolerance.

    What is infinite or no number bounds nothing. Values are enclosed in 200 bits; float64 then settles what is farther
    apart than its own rounding, and what is left is asked in 200 bits, and in more.
    """
    exact = EXACT[f.name](*f.parameters)
    sign = torch.tensor([line.sign for line in lines], dtype=torch.float64)[:, None, None]
    slope, intercept, nearest = (
        torch.stack([getattr(line, name).double() for line in lines])[:, None]
        for name in ("slope", "intercept", "nearest")
    )
    x = torch.cat([points.double().expand(len(lines), *points.shape), nearest], 1)  # [lines, points + 1, n]
    unique, index = x.unique(return_inverse=True)
    with ctx.workprec(PRECISIONS[0]):
        values = torch.tensor([_nearest(*exact(arb(at))) for at in unique.tolist()], dtype=torch.float64)[index]
    doubt = (slope * x).abs() + intercept.abs() + values.abs()
    doubt = 4 * unit_roundoff(x.dtype) * doubt + underflow(4, x.dtype)
    settled = sign * (slope * x + intercept - values) > doubt
    found, undecided = [], 0
    for j, p, k in (intercept.isfinite() & ~settled).nonzero().tolist():
        claim, place = (lines[j].sign, float(slope[j, 0, k]), float(intercept[j, 0, k])), float(x[j, p, k])
        room = _room(exact, claim, place)
        if room is None:
            undecided += 1
        elif room < 0:
            where = f"[{float(l[k])!r}, {float(u[k])!r}] at {place!r}"
            found.append(f"{where}, sign {claim[0]:g}, slope {claim[1]!r}, off by {room.str(3, radius=False)}")
    return Findings(found, undecided)


def _nearest(whole: arb, rest: arb) -> float:
    """The float next to a sum; NaN where it is not known to be."""
    total = whole + rest
    return float(total) if total.rel_accuracy_bits() > 60 else math.nan


def _room(exact: Exact, claim: tuple[float, float, float], place: float) -> arb | None:
    """How far the function stays from a line at a point, of a certain sign; None where that is not to be had."""
    for bits in PRECISIONS:
        with ctx.workprec(bits):
            sign, slope, intercept, x = (arb(number) for number in (*claim, place))
            whole, rest = exact(x)
            room = sign * ((slope * x + intercept - whole) - rest)
            if room >= 0 or room < 0:
                return room
    return None
