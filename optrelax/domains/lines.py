"""Every named relaxation of one activation, stated once: as a line below and a line above.

Each function takes an activation and its pre-activation bounds and returns `Lines`; the LP layers use the hull of
the activation itself, which implies every line here. Of a piecewise-linear activation every name is a choice among the
lines of its hull; for a ReLU they are the table of Jovanovic et al. (2021), arXiv 2102.06700. Of a smooth one "crown",
its smooth form included, is the closest pair of lines, "chord" the closest parallel pair, "box" the image; the rest
choose by slopes that only a piecewise-linear function has, and a relaxation refuses by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optrelax.kernels import relu_lines
from optrelax.networks.activations import Activation, Hull, Line, PiecewiseLinear, least_width
from optrelax.networks.activations.contract import closer

NO_PIECES = (
    "has no constant slopes to choose among; take box, hbox, hzono, deepz, deepz-box, fast-lin, crown, crown-soft or "
    "crown-ibp"
)
"""Why a choice among slopes is no relaxation of a smooth activation."""

LowerSlope = Literal["adaptive", "soft", 0, 1]
BandSlope = Literal["chord", "box", "diag", "switch", "soft", "slanted"]


@dataclass(frozen=True, slots=True)
class Lines:
    """lower_slope * x + lower_intercept <= f(x) <= upper_slope * x + upper_intercept; each [*batch, *shape].

    Args:
        lower_slope: of the line below.
        lower_intercept: of the line below.
        upper_slope: of the line above.
        upper_intercept: of the line above.

    Sound: as whoever chose them.  Gradient: in all four.

    Example:
        >>> l, u = torch.tensor([-1.0]), torch.tensor([3.0])
        >>> lines = ox.Crown().lines(ox.activations.relu(), l, u)
        >>> lines.upper_slope.tolist(), lines.upper_intercept.tolist()
        ([0.75], [0.75])
    """

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor

    @property
    def parallel(self) -> bool:
        """Whether both lines share one slope tensor, so that rows need no choice by sign."""
        return self.lower_slope is self.upper_slope


def crown_lines(
    activation: Activation,
    l: Tensor,
    u: Tensor,
    *,
    lower: LowerSlope = "adaptive",
    tria: bool = False,
    continuous: bool = False,
    gamma: float = 1.0,
) -> Lines:
    """Lines of the CROWN family: one line of the hull below, the chord (or a triangle's other side) above.

    Sound: yes.  Gradient: through slopes and intercepts; jumps in the weights where the choice of the line does.
    """
    if lower != "soft" and not tria and not continuous and relu_lines.compiles(activation, l, u):
        slope, chord, intercept = relu_lines.relu_lines(l, u, lower)
        return Lines(slope, torch.zeros_like(slope), chord, intercept)
    if lower == "adaptive" or (lower == "soft" and activation.piecewise is None):
        below, above = activation.closest(l, u)
        return Lines(*below, *above)
    activation = require_pieces(activation)
    hull = activation.hull(l, u)
    if lower == "soft":
        weight = soft_weight(activation, l, u, gamma)
        (s0, i0), (s1, i1) = hull.below
        above = closer(hull.above, l, u, sign=-1.0)
        return Lines(s0 + weight * (s1 - s0), i0 + weight * (i1 - i0), *above)
    below, above = hull.below[lower], hull.above[1 - lower]
    if continuous:
        below = _continuous_below(activation, lower, l, u)
    if tria:
        above = _triangle_side(activation, hull, lower, l, u, continuous)
    return Lines(*below, *above)


def require_pieces(activation: Activation) -> PiecewiseLinear:
    """A piecewise-linear activation; ValueError for another, which has no slopes to choose among."""
    if activation.piecewise is not None:
        return activation.piecewise
    raise ValueError(f"{activation.name} {NO_PIECES}")


def _continuous_below(activation: PiecewiseLinear, lower: int, l: Tensor, u: Tensor) -> Line:
    """A lower line of the outermost slope everywhere, stable neurons too: continuous in l and u."""
    slope = torch.full_like(l, min(activation.slopes) if lower == 0 else max(activation.slopes))
    return slope, activation.band(slope, l, u, whole=lower == 1)[0]


def _triangle_side(activation: PiecewiseLinear, hull: Hull, lower: int, l: Tensor, u: Tensor, continuous: bool) -> Line:
    """The side of the triangle that is parallel to the lower line's counterpart: steep for lower 0, flat for 1."""
    slope = torch.full_like(l, max(activation.slopes) if lower == 0 else min(activation.slopes))
    intercept = activation.band(slope, l, u)[1]
    if continuous:
        return slope, intercept
    crossing = activation.crossing(l, u)
    exact_slope, exact_intercept = hull.above[0]
    return torch.where(crossing, slope, exact_slope), torch.where(crossing, intercept, exact_intercept)


def band_lines(
    activation: Activation,
    l: Tensor,
    u: Tensor,
    *,
    slope: BandSlope = "chord",
    continuous: bool = False,
    gamma: float = 1.0,
    kappa: float = 0.9,
) -> Lines:
    """Two parallel lines around the function: DeepZ (slope of the chord), Box (0), Diag (1) and the rest.

    As a zonotope step: lam = the slope, centre shift and new error from the band's middle and half width.
    Sound: yes.  Gradient: through slope and band.
    """
    if slope in ("chord", "box") and activation.piecewise is None:
        lam = activation.parallel_slope(l, u) if slope == "chord" else torch.zeros_like(l)
        low, high = activation.band(lam, l, u)
        return Lines(lam, low, lam, high)
    activation = require_pieces(activation)
    if continuous:  # Diag-C: slope 1 for dead neurons too, every kink counted, so the band meets itself at u = 0
        steep = torch.full_like(l, max(activation.slopes))
        low, high = activation.band(steep, l, u, whole=True)
        return Lines(steep, low, steep, high)
    if slope == "chord" and relu_lines.compiles(activation, l, u):
        lam, _, high = relu_lines.relu_lines(l, u, "chord")
        return Lines(lam, torch.zeros_like(high), lam, high)
    crossing, a, b = activation.ends(l, u)
    exact_slope, exact_intercept = activation.piece(activation.decisive(l, u))
    lam = _band_slope(activation, a, b, slope, gamma, kappa)
    low, high = activation.band(lam, a, b)
    lam = torch.where(crossing, lam, exact_slope)
    return Lines(lam, torch.where(crossing, low, exact_intercept), lam, torch.where(crossing, high, exact_intercept))


def _band_slope(
    activation: PiecewiseLinear, l: Tensor, u: Tensor, slope: BandSlope, gamma: float, kappa: float
) -> Tensor:
    """The common slope over a crossing [l, u]."""
    if slope in ("chord", "slanted"):
        chord = activation.chord_slope(l, u)
        return chord if slope == "chord" else kappa * chord
    flat, steep = torch.zeros_like(l), torch.full_like(l, max(activation.slopes))
    if slope == "box":
        return flat
    if slope == "diag":
        return steep
    if slope == "soft":
        return flat + soft_weight(activation, l, u, gamma) * (steep - flat)
    wide, narrow = (_width(activation, s, l, u).detach() for s in (flat, steep))
    return torch.where(narrow <= wide, steep, flat)  # a tie takes Diag, as -l <= u does


def soft_weight(activation: PiecewiseLinear, l: Tensor, u: Tensor, gamma: float) -> Tensor:
    """sigmoid(gamma (w0 / w1 - w1 / w0)), w0 and w1 the widths of the flat and the steep band over [l, u].

    For a ReLU w0 = u, w1 = -l: sigmoid(gamma (l / u - u / l)), the smooth version of the adaptive choice.
    Written as 2 sinh of the log ratio, capped where the sigmoid is 0 or 1 in every precision: no overflow, no NaN
    in the gradient for tiny ends. 1/2 where the function is affine.
    """
    _, a, b = activation.ends(l, u)
    steep = torch.full_like(l, max(activation.slopes))
    flat = torch.full_like(l, min(activation.slopes))
    least = least_width(l.dtype)
    w0, w1 = (_width(activation, s, a, b).clamp_min(least) for s in (flat, steep))
    cap = math.asinh(400.0 / gamma)
    return torch.sigmoid(2 * gamma * torch.sinh((w0.log() - w1.log()).clamp(-cap, cap)))


def _width(activation: PiecewiseLinear, slope: Tensor, l: Tensor, u: Tensor) -> Tensor:
    low, high = activation.band(slope, l, u)
    return high - low


def outward_lines(lines: Lines, activation: Activation, l: Tensor, u: Tensor) -> Lines:
    """The same slopes with intercepts that hold in real arithmetic over [l, u].

    A slope is any float; an intercept is sound iff it lies beyond f(v) - slope * v at every v of [l, u]
    (`Activation.beyond`).
    """
    lower_intercept = torch.minimum(lines.lower_intercept, activation.beyond(lines.lower_slope, l, u, -1.0))
    upper_intercept = torch.maximum(lines.upper_intercept, activation.beyond(lines.upper_slope, l, u, 1.0))
    return Lines(lines.lower_slope, lower_intercept, lines.upper_slope, upper_intercept)
