"""The extremes of a smooth function about a slope: where they are, and bounds of them in real arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.networks.activations.bracketing import root
from optrelax.networks.activations.touching import tolerance
from optrelax.rounding import cast_down, cast_up, underflow, unit_roundoff

if TYPE_CHECKING:
    from optrelax.networks.activations.smooth import Smooth

UNITS = 16
"""Error allowed for a computed value, in units of its size: libraries of elementary functions stay under 4 ulp each."""


def known_reach(dtype: torch.dtype) -> float:
    """Beyond, a periodic function is known by its amplitude alone.

    Up to here the k-th extremum or inflection is off by at most 3 units of its size, and the function there by at most
    half the square of that: 9 / 8 units, of the 16 that are allowed.
    """
    return float(unit_roundoff(dtype) ** -0.5 / 2)


def _stationary(f: Smooth, slope: Tensor, a: Tensor, b: Tensor, sign: float, tolerance: float) -> Tensor:
    """Where f'(x) = slope in a stretch [a, b] in which sign * f is concave, or its end that comes nearest."""

    def excess(x: Tensor, s: Tensor) -> Tensor:
        return f.derivative(x) - s

    return root(excess, a, b, (slope,), sign, tolerance, f.unit)


def extreme(f: Smooth, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Where sign * (f(x) - slope * x) is greatest over [l, u], and that value; constants."""
    with torch.no_grad():
        at, best = l, sign * (f(l) - slope * l)
        points = [u]
        for a, b, curvature in f.pieces(l, u):
            points.append(b)
            if isinstance(curvature, Tensor):
                bent = sign * curvature < 0
                points.append(_stationary(f, slope, a, torch.where(bent, b, a), sign, tolerance(l.dtype)))
            elif sign * curvature < 0:
                points.append(_stationary(f, slope, a, b, sign, tolerance(l.dtype)))
        for x in points:
            value = sign * (f(x) - slope * x)
            better = value > best
            at, best = torch.where(better, x, at), torch.where(better, value, best)
        return at, best


def outward_extreme(f: Smooth, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> Tensor:
    """A float at or beyond the extreme of f(x) - slope * x over [l, u] in real arithmetic, in float64.

    With h = sign * (f(x) - slope * x): where h is convex, an end is greatest. Where it is concave, the tangent at
    any x lies above it, so h <= h(x) + h'(x) (y - x) over any [p, q] that holds its greatest value; p and q are
    points at which h' is certainly positive and negative. Every value is allowed its error, and an inflection that
    was rounded a unit of what changes within it.
    """
    if l.dtype != torch.float64:
        found = outward_extreme(f, slope.double(), l.double(), u.double(), sign)
        return cast_up(found, l.dtype) if sign > 0 else cast_down(found, l.dtype)
    with torch.no_grad():
        slope, l, u = torch.broadcast_tensors(slope.detach(), l.detach(), u.detach())
        ends = [_value(f, slope, l, sign), _value(f, slope, u, sign)]
        unit = 4 * unit_roundoff(l.dtype)
        for a, b, curvature in f.pieces(l, u):
            sway = f.derivative(b).abs() + slope.abs()
            ends.append(_value(f, slope, b, sign) + torch.where(b < u, unit * b.abs() * sway, 0.0))
            if isinstance(curvature, Tensor):
                ends.append(_peak(f, slope, a, torch.where(sign * curvature < 0, b, a), sign))
            elif sign * curvature < 0:
                ends.append(_peak(f, slope, a, b, sign))
        found = torch.stack(ends).amax(0)
        if f.period is not None:  # far out the inflections are not known well enough
            most = f.amplitude() + torch.maximum(-sign * slope * l, -sign * slope * u)
            most = most + unit * (most.abs() + (slope * l).abs() + (slope * u).abs())
            found = torch.where(torch.maximum(l.abs(), u.abs()) > known_reach(l.dtype), most, found)
        found = sign * found
        beyond = f.beyond_domain(l, u)
        found = found if beyond is None else found.masked_fill(beyond, torch.nan)
        # What overflows is no bound.
        return torch.where(found.isnan(), sign * torch.inf, found)


def _value(f: Smooth, slope: Tensor, x: Tensor, sign: float) -> Tensor:
    """sign * (f(x) - slope x), rounded up."""
    value, product = f(x), slope * x
    error = f.error(x) + UNITS * unit_roundoff(x.dtype) * (product.abs() + value.abs())
    return sign * (value - product) + error + underflow(4, x.dtype) * (1 + slope.abs())


def _peak(f: Smooth, slope: Tensor, a: Tensor, b: Tensor, sign: float) -> Tensor:
    """A bound of h over [a, b], where it is concave."""
    x = _stationary(f, slope, a, b, sign, 2.0**-48)
    unit = UNITS * unit_roundoff(x.dtype)

    def certain(at: Tensor) -> tuple[Tensor, Tensor]:
        steep = f.derivative(at)
        size = steep.abs() + 1 if f.steepness is None else f.steepness(at).abs()
        return sign * (steep - slope), 4 * unit * (size + slope.abs()) + underflow(4, x.dtype)

    rise, doubt = certain(x)
    p, q = a, b
    for exponent in (-46, -36, -26, -16, -8, -3):
        step = 2.0**exponent * x.abs().clamp_min(f.unit)
        for side in (x - step, x + step):
            inside = (side > a) & (side < b)
            change, unsure = certain(torch.where(inside, side, x))
            p = torch.where(inside & (change > unsure), torch.maximum(p, side), p)
            q = torch.where(inside & (change < -unsure), torch.minimum(q, side), q)
    p, q = torch.minimum(p, x), torch.maximum(q, x)
    reach = torch.maximum((doubt + rise) * (q - x), (doubt - rise) * (x - p)).clamp_min(0) * (1 + unit)
    return _value(f, slope, x, sign) + torch.where(a < b, reach + underflow(1, x.dtype), 0.0)
