"""Steps: the derivatives of piecewise-linear activations, constant between their jumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.networks.activations.contract import Activation, Hull, Line, closer
from optrelax.networks.activations.piecewise_linear import PiecewiseLinear
from optrelax.rounding import down, unit_roundoff, up


@dataclass(frozen=True)
class Step(Activation):
    """levels[i] between jumps i - 1 and i, one level more than jumps; at a jump every bound holds both its levels.

    So bounds of a derivative hold every element of the generalised one (Clarke 1983), whatever is taken at a kink.
    """

    name: str
    jumps: tuple[float, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.jumps or len(self.levels) != len(self.jumps) + 1 or list(self.jumps) != sorted(set(self.jumps)):
            raise ValueError(f"{self.name}: wants ascending jumps and one level more, got {self.jumps}, {self.levels}")

    def __call__(self, x: Tensor) -> Tensor:
        level = torch.where(x.isnan(), x.detach(), self.levels[0])
        for jump, above in zip(self.jumps, self.levels[1:], strict=True):
            level = torch.where(x >= jump, above, level)
        return level

    @property
    def breaks(self) -> tuple[float, ...]:
        return self.jumps

    @property
    def monotone(self) -> bool:
        return list(self.levels) == sorted(self.levels)

    def crossing(self, l: Tensor, u: Tensor) -> Tensor:
        inside = [(l <= jump) & (u >= jump) for jump in self.jumps]
        return torch.stack(inside).any(0)

    def _touched(self, l: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """Where [l, u] meets each stretch, jumps included, the ends of what they share, and its level."""
        edges = (-torch.inf, *self.jumps, torch.inf)
        for low, high, level in zip(edges[:-1], edges[1:], self.levels, strict=True):
            yield (l <= high) & (u >= low), l.clamp(low, high), u.clamp(low, high), level

    def image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.band(torch.zeros_like(l), l, u)

    def outward_image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.image(l, u)
        return (low, high) if self._whole else (down(low), up(high))  # a level may be rounded to the type

    @property
    def _whole(self) -> bool:
        return all(level == round(level) and abs(level) < 2**20 for level in self.levels)

    def band(self, slope: Tensor, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.full_like(l, torch.inf), torch.full_like(l, -torch.inf)
        for touched, a, b, level in self._touched(l, u):
            for end in (a, b):
                value = level - torch.where(slope == 0, 0.0, slope * end)
                low = torch.where(touched, torch.minimum(low, value), low)
                high = torch.where(touched, torch.maximum(high, value), high)
        unknown = l.isnan() | u.isnan()
        return low.masked_fill(unknown, torch.nan), high.masked_fill(unknown, torch.nan)

    def beyond(self, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> Tensor:
        """Of each stretch at its ends, moved by 4 units of level and product, more than these and the jump round by."""
        unit, tiny = 4 * unit_roundoff(l.dtype), torch.finfo(l.dtype).tiny
        most = torch.full_like(l, -torch.inf)
        for touched, a, b, level in self._touched(l, u):
            for end in (a, b):
                product = torch.where(slope == 0, 0.0, slope * end)
                error = unit * (abs(level) + product.abs()) + tiny * (1 + slope.abs())
                exact = (slope == 0) if self._whole else torch.zeros_like(slope, dtype=torch.bool)
                value = sign * (level - product) + torch.where(exact, 0.0, error)
                most = torch.where(touched, torch.maximum(most, value), most)
        return sign * most.masked_fill(l.isnan() | u.isnan(), torch.nan)

    def hull(self, l: Tensor, u: Tensor) -> Hull:
        """The image's ends, and across a single jump the lines from it to the ends of [l, u]: then the convex hull."""
        low, high = self.image(l, u)
        flat = torch.zeros_like(l)
        below, above = ((flat, low), (flat, low)), ((flat, high), (flat, high))
        if len(self.jumps) > 1:
            return Hull(below, above)
        (jump,), (first, last) = self.jumps, self.levels
        inside = (l < jump) & (u > jump)
        right = (last - first) / torch.where(inside, u - jump, 1.0)
        left = (last - first) / torch.where(inside, jump - l, 1.0)
        # From the first level at the jump to the right end; from the left end to the last level at the jump.
        toward = _chosen(inside, (right, first - right * jump), (flat, low if last > first else high))
        reaching = _chosen(inside, (left, last - left * jump), (flat, high if last > first else low))
        if last > first:
            return Hull((below[0], toward), (reaching, above[1]))
        return Hull((reaching, below[1]), (above[0], toward))

    def closest(self, l: Tensor, u: Tensor) -> tuple[Line, Line]:
        hull = self.hull(l, u)
        return closer(hull.below, l, u, sign=1.0), closer(hull.above, l, u, sign=-1.0)

    def parallel_slope(self, l: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(l)

    def magnitude(self, size: Tensor) -> Tensor:
        return torch.full_like(size, max(map(abs, self.levels)))

    def require_consistent(self) -> None:
        """Nothing to hold the levels against: they are the function."""


def _chosen(condition: Tensor, line: Line, other: Line) -> Line:
    return torch.where(condition, line[0], other[0]), torch.where(condition, line[1], other[1])


def slopes_of(activation: PiecewiseLinear) -> Step:
    """The derivative of a piecewise-linear activation."""
    return Step(f"{activation.name}'", activation.kinks, activation.slopes)
