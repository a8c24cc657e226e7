"""Planes below and above the product of two bounded numbers: McCormick's, and those between them.

Over a box [lx, ux] x [ly, uy] the product lies above lx y + ly x - lx ly and ux y + uy x - ux uy, and below
ux y + ly x - ux ly and lx y + uy x - lx uy (McCormick 1976): the convex hull of its graph. Between the two of a side
all mixtures hold too; the even one is the tangent plane at the middle of the box, moved by both half widths' product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.rounding import SLACK, down, gamma, underflow, up

Plane = tuple[Tensor, Tensor, Tensor]  # of x, of y, constant; each [*batch, *shape]


@dataclass(frozen=True, slots=True)
class Planes:
    """below[0] x + below[1] y + below[2] <= x y <= above[0] x + above[1] y + above[2]."""

    below: Plane
    above: Plane


def product_planes(x: Bounds, y: Bounds, below: Tensor | float = 0.5, above: Tensor | float = 0.5) -> Planes:
    """The mixture of McCormick's planes of each side, to nearest.

    below: share of the plane through (lx, ly); above: of the one through (lx, uy); in [0, 1].
    Sound: yes.  Exact: where x or y has no width.  Gradient: exact, and smooth.
    """
    wx, wy = x.upper - x.lower, y.upper - y.lower
    sx, sy = _slopes(x, y, below, above)
    # Of shares t and 1 - t: t lx ly + (1 - t) ux uy = (t lx + (1 - t) ux) (t ly + (1 - t) uy) + t (1 - t) wx wy.
    return Planes(
        (sx[0], sy[0], -(sx[0] * sy[0] + below * (1 - below) * wx * wy)),
        (sx[1], sy[1], -(sx[1] * sy[1] - above * (1 - above) * wx * wy)),
    )


def _slopes(
    x: Bounds, y: Bounds, below: Tensor | float, above: Tensor | float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Coefficients of x, below and above, and of y."""
    wx, wy = x.upper - x.lower, y.upper - y.lower
    of_x = y.upper - below * wy, y.lower + above * wy
    of_y = x.upper - below * wx, x.upper - above * wx
    return of_x, of_y


def square_planes(x: Bounds) -> Planes:
    """Of a number with itself: the tangent at the middle below, the chord above.

    Sound: yes.  Exact: without width.  Gradient: exact, and smooth.
    """
    half = (x.lower + x.upper) / 2
    return Planes((half, half, -half * half), (half, half, -x.lower * x.upper))


def outward_planes(planes: Planes, x: Bounds, y: Bounds, same: bool) -> Planes:
    """The same slopes with constants that hold in real arithmetic, whatever the slopes.

    x y - a x - b y has its extremes over a box at corners; with one number twice, x^2 - (a + b) x lies below its ends'
    values and above -((a + b) / 2)^2.
    """
    (ax, ay, c), (bx, by, _) = planes.below, planes.above
    if same:
        slope = ax + ay
        least = -(slope * slope) / 4
        low = down(least - SLACK * (gamma(4, c.dtype) * slope * slope + underflow(2, c.dtype)))
        high = torch.stack([_corner(e, e, bx, by, 1) for e in (x.lower, x.upper)]).amax(0)
        return Planes((ax, ay, low), (bx, by, high))
    corners = [(p, q) for p in (x.lower, x.upper) for q in (y.lower, y.upper)]
    low = torch.stack([_corner(p, q, ax, ay, -1) for p, q in corners]).amin(0)
    high = torch.stack([_corner(p, q, bx, by, 1) for p, q in corners]).amax(0)
    return Planes((ax, ay, low), (bx, by, high))


def _corner(p: Tensor, q: Tensor, a: Tensor, b: Tensor, side: int) -> Tensor:
    """p q - a p - b q, rounded down (side -1) or up (1)."""
    terms = p * q, a * p, b * q
    value = terms[0] - terms[1] - terms[2]
    size = terms[0].abs() + terms[1].abs() + terms[2].abs()
    lost = SLACK * (gamma(4, p.dtype) * size + underflow(3, p.dtype))
    return up(value + lost) if side > 0 else down(value - lost)
