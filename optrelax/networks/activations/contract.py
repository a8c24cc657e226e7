"""What an activation is: an elementwise function that says what encloses it over an interval."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.networks.storage import Storable

if TYPE_CHECKING:
    from optrelax.networks.activations.piecewise_linear import PiecewiseLinear

Line = tuple[Tensor, Tensor]  # slope, intercept; both [*batch, *shape]


def least_width(dtype: torch.dtype) -> float:
    """Below this no gradient divides by a width: its reciprocal, times weights of ordinary size, would overflow."""
    return float(torch.finfo(dtype).tiny ** 0.75)


@dataclass(frozen=True, slots=True)
class Hull:
    """Lines that enclose an activation's graph over [l, u]: y >= every line below, y <= every line above.

    Two lines a side, left to right; a side with one line states it twice. Of a piecewise-linear activation they are
    the convex hull of the graph.

    Args:
        below: (slope, intercept) of each, tensors like l.
        above: likewise.

    Sound: yes.  Exact: of a piecewise-linear activation.  Gradient: in l and u.

    Example:
        >>> hull = ox.activations.relu().hull(torch.tensor(-1.0), torch.tensor(1.0))
        >>> [(slope.item(), intercept.item()) for slope, intercept in (*hull.below, *hull.above)]
        [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 0.5)]
    """

    below: tuple[Line, Line]
    above: tuple[Line, Line]


class Activation(Storable, ABC):
    """A continuous elementwise function with bounds of itself over any interval of its domain.

    All that relaxations and layers ask of an activation is asked here; what needs more (a MILP, slopes counted from
    the left) asks for a kind of activation by its type. Every l, u is [*batch, *shape], l <= u.

    Sound: `outward_image` and `beyond` hold in real arithmetic; `image`, `lines` and `hull` to rounding.

    Example:
        >>> tanh = ox.activations.tanh()
        >>> isinstance(tanh, ox.Activation), tanh.monotone
        (True, True)
        >>> low, high = tanh.image(torch.tensor(-1.0), torch.tensor(1.0))
        >>> torch.equal(low, -high)
        True
    """

    name: str

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The function itself, elementwise."""

    @property
    @abstractmethod
    def breaks(self) -> tuple[float, ...]:
        """Where the function changes its kind, ascending: kinks, inflections; what figures and probes look at."""

    @property
    @abstractmethod
    def monotone(self) -> bool:
        """Whether the function never falls."""

    @property
    def piecewise(self) -> PiecewiseLinear | None:
        """The activation itself where it is piecewise linear: what has kinks, slopes and pieces."""
        return None

    @property
    def is_relu(self) -> bool:
        """Whether this is max(x, 0), whatever its name: what compiled passes are written for."""
        return False

    @property
    def everywhere(self) -> bool:
        """Whether the function is defined for every number; else a bound beyond its domain would say nothing."""
        return True

    @property
    def chord_above(self) -> bool:
        """Whether the function is convex, so that one line, the chord, bounds it from above over every interval."""
        return False

    @property
    def origin_below(self) -> bool:
        """Whether both lines below pass through the origin over every interval, as a ReLU's do."""
        return False

    @abstractmethod
    def crossing(self, l: Tensor, u: Tensor) -> Tensor:
        """Where the function is not affine over [l, u]: bool, like l."""

    @abstractmethod
    def image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value over [l, u], elementwise, to nearest."""

    @abstractmethod
    def outward_image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of all values over [l, u] that hold in real arithmetic."""

    @abstractmethod
    def hull(self, l: Tensor, u: Tensor) -> Hull:
        """Two lines a side over [l, u], which imply the image; those of `closest` are among them."""

    @abstractmethod
    def closest(self, l: Tensor, u: Tensor) -> tuple[Line, Line]:
        """Of the lines below, and of those above, the one that encloses the least area over [l, u]."""

    @abstractmethod
    def parallel_slope(self, l: Tensor, u: Tensor) -> Tensor:
        """The slope of the pair of parallel lines of the least area over [l, u]."""

    @abstractmethod
    def band(self, slope: Tensor, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of f(x) - slope * x over [l, u], elementwise, to nearest."""

    @abstractmethod
    def beyond(self, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> Tensor:
        """A float at or beyond the extreme of f(x) - slope * x over [l, u] in real arithmetic, whatever the slope.

        sign: 1 for the greatest value, -1 for the least.
        """

    @property
    def slides(self) -> bool:
        """Whether `supporting` has tangents between the lines of the hull."""
        return False

    def supporting(self, l: Tensor, u: Tensor, share: Tensor, sign: float) -> tuple[Line, Tensor]:
        """A line above (sign 1) or below (-1) over [l, u], chosen by a share in [0, 1]; and where there is one."""
        raise NotImplementedError(f"{self.name}: has no lines but those of its hull")

    def closest_share(self, l: Tensor, u: Tensor, sign: float) -> Tensor:
        """The share of that of `closest`."""
        raise NotImplementedError(f"{self.name}: has no lines but those of its hull")

    def magnitude(self, size: Tensor) -> Tensor:
        """A bound of |f(x)| where |x| <= size, to rounding."""
        low, high = self.image(-size, size)
        return torch.maximum(low.abs(), high.abs())

    @abstractmethod
    def require_consistent(self) -> None:
        """ValueError where the function, sampled in float64, is not what the activation says of it."""


def closer(pair: tuple[Line, Line], l: Tensor, u: Tensor, sign: float) -> Line:
    """Of two valid lines (below: sign 1) the one closer to the function at the middle of [l, u]: the smaller area.

    A tie takes the right line below (slope 1 for a ReLU with |l| = |u|) and the left one above.
    """
    (s0, i0), (s1, i1) = pair
    if s0 is s1:
        return s0, i0
    with torch.no_grad():
        # Twice the values at the midpoint; l + u is exact where it decides a ReLU's tie.
        second = sign * ((s1 - s0) * (l + u) + 2 * (i1 - i0))
        choose = second >= 0 if sign > 0 else second > 0
    return torch.where(choose, s1, s0), torch.where(choose, i1, i0)
