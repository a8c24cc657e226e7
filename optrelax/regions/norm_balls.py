"""Balls of a norm cut by a box: what all of them share; `ball_splits` says how the two meet."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.checks import is_number
from optrelax.frozen import filled
from optrelax.kernels.relax_step import rows_dot
from optrelax.networks.ops import flatten_from
from optrelax.regions.ball_splits import CutBall, Splitting, extent, falls, least, minimisers, nearest, safely
from optrelax.regions.base import Region, Support
from optrelax.regions.boxes import InputBox
from optrelax.regions.numbers import Numbers, as_range, as_tensor, check_finite, check_floating, shown
from optrelax.rounding import cast_up, down, gamma, tiny, unit_roundoff, up


@dataclass(frozen=True, slots=True, init=False)
class NormBall(Splitting, Region):
    """All inputs within eps of x in a norm, clipped to the legal range; a new norm states its split and its points.

    x [batch, *input_shape], the norm over all of an example; eps a number or [batch]; clip (low, high), each a number
    or what broadcasts against an example, or None.
    Raises ValueError for eps < 0, NaN, or an x outside clip.
    """

    x: Tensor
    eps: Tensor
    """[batch]."""
    low: Tensor | None
    """Ends of the box, [batch, *input_shape]; None: without."""
    high: Tensor | None
    given: tuple[float | None, float | None, float | None]
    """eps and the ends of clip as the numbers that they were given as; None for tensors."""

    def __init__(self, x: Tensor, eps: Numbers, clip: tuple[Numbers, Numbers] | None = None) -> None:
        name = type(self).__name__
        check_floating(name, "x", x)
        if x.dim() == 0:
            raise ValueError(f"{name}: needs a batch dimension, got a scalar; pass x[None]")
        check_finite(name, "x", x)
        size = float(eps) if is_number(eps) else None
        found = torch.as_tensor(as_tensor(name, "eps", eps) if size is None else size, dtype=x.dtype, device=x.device)
        if found.dim() > 1 or (found.dim() == 1 and len(found) != len(x)):
            raise ValueError(f"{name}: eps must be a number or [batch] of {len(x)}, got {tuple(found.shape)}")
        if found.numel() and not bool((found.detach() >= 0).all()):
            raise ValueError(f"{name}: eps must be >= 0, got {float(found.detach().min())}")
        check_finite(name, "eps", found)
        low = high = None
        ends: tuple[float | None, float | None] = (None, None)
        if clip is not None:
            both = as_range(name, x, clip)
            low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device).expand_as(x) for end in both)
            ends = tuple(end if isinstance(end, float) else None for end in both)  # type: ignore[assignment]
            outside = (x.detach() < low) | (x.detach() > high)
            if bool(outside.any()):
                raise ValueError(
                    f"{name}: x lies outside clip [{shown(both[0])}, {shown(both[1])}] in {int(outside.sum())} of "
                    f"{outside.numel()} entries (first at {outside.nonzero()[0].tolist()}); scale pixels to the range "
                    "of clip"
                )
        filled(self, x=x, eps=found.expand(len(x)), low=low, high=high, given=(size, *ends))

    @classmethod
    @abstractmethod
    def draw(cls, shape: tuple[int, int, int], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
        """Uniform points of the ball of radius 1, [count, batch, n]."""

    # --- what follows ---

    @property
    def center(self) -> Tensor:
        """x."""
        return self.x

    def box(self, outward: bool = False) -> InputBox:
        """The smallest box around; outward, in real arithmetic."""
        eps = self.eps.reshape(-1, *[1] * (self.x.dim() - 1))
        lower, upper = self.x - eps, self.x + eps
        if outward:
            still = eps == 0
            lower, upper = torch.where(still, self.x, down(lower)), torch.where(still, self.x, up(upper))
        if self.low is not None and self.high is not None:
            lower, upper = torch.maximum(lower, self.low), torch.minimum(upper, self.high)
        return InputBox.known(lower, upper)

    def support(self, rows: Tensor) -> Tensor:
        """Least value of each row, [batch, k].

        Gradient: exact, and to second order; at coefficients of 0 and at ties a subgradient.
        """
        a, cut = flatten_from(rows, 2), self._cut()
        if cut is None:
            return rows_dot(a, flatten_from(self.x, 1)) - self.eps[:, None] * self.dual_norm(a)
        return least(type(self), a, cut)

    def extent(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each row, from one read: [batch, k] each."""
        a, cut = flatten_from(rows, 2), self._cut()
        if cut is None:
            center, fall = rows_dot(a, flatten_from(self.x, 1)), self.eps[:, None] * self.dual_norm(a)
            return center - fall, center + fall
        return extent(type(self), a, cut)

    def outward_support(self, rows: Tensor) -> Support:
        """A bound at the split found, whose terms are positive: sums, products and a norm of them."""
        a, x, cut = flatten_from(rows.detach(), 2), flatten_from(self.x, 1), self._cut()
        size = rows_dot(a.abs(), x.abs() + tiny(a.dtype))
        if cut is None:
            center, fall = rows_dot(a, x), self.eps[:, None] * safely(self.dual_norm, a.abs())
        else:
            found = falls(type(self), a, cut)
            center, fall = found.middle, self.eps[:, None] * found.length[0] + found.held[0]
        return Support(center - fall, size + fall, a.shape[2] + 16)

    def lowest(self, rows: Tensor) -> Tensor:
        """Where each row takes its least value."""
        with torch.no_grad():
            x, cut = flatten_from(self.x, 1), self._cut()
            if cut is None:
                cut = CutBall(x, self.eps, x - self.eps[:, None], x + self.eps[:, None])
            found = minimisers(type(self), flatten_from(rows, 2), cut)
            return found.reshape(*found.shape[:2], *self.shape[1:])

    def _cut(self) -> CutBall | None:
        """The ball and its box, flat; None without clip."""
        if self.low is None or self.high is None:
            return None
        return CutBall(flatten_from(self.x, 1), self.eps, flatten_from(self.low, 1), flatten_from(self.high, 1))

    def contains(self, x: Tensor) -> Tensor:
        """Which examples lie in the ball and the box, with no tolerance: near the edge only what provably does."""
        step = flatten_from(x.double() - self.x.double(), 1)
        n, eps = step.shape[1], self.eps.double()
        still = (step == 0).all(1)
        # In units of eps: roundings are relative to 1, and nothing of weight is lost below the normal range.
        share = self.length(step / torch.where(eps > 0, eps, 1.0)[:, None])
        inside = still | ((eps > 0) & (share <= 1 - 2 * gamma(n + 16, torch.float64)))
        if self.low is None or self.high is None:
            return inside
        return inside & flatten_from((x >= self.low) & (x <= self.high), 1).all(1)

    def project(self, x: Tensor) -> Tensor:
        """The nearest point, to rounding; inside without tolerance."""
        y = self._clipped(x)
        wide = [1] * (self.x.dim() - 1)
        eps = self.eps
        positive = torch.where(eps > 0, eps, 1.0)
        share = self.length(flatten_from(y - self.x, 1) / positive[:, None])
        if bool((share > 1).any()):
            center = flatten_from(self.x, 1)
            whole = CutBall(center, eps, center - 2 * eps[:, None], center + 2 * eps[:, None])
            found = nearest(type(self), flatten_from(x, 1), self._cut() or whole).reshape(x.shape)
            y = torch.where((share > 1).reshape(-1, *wide), found, y)
        step = flatten_from(y - self.x, 1)
        share = self.length(step / positive[:, None])
        # A point is rounded to a float once more: by as much it has to lie inside.
        lost = self.length(unit_roundoff(x.dtype) * (flatten_from(self.x, 1).abs() / positive[:, None] + 4))
        most = (1 - 2 * lost - 4 * gamma(step.shape[1] + 16, torch.float64)).clamp_min(0)
        factor = torch.where(share > most, most / torch.where(share > 0, share, 1.0), 1.0)
        found = self._clipped(self.x + factor.reshape(-1, *wide) * (y - self.x))
        return torch.where(self.contains(found).reshape(-1, *wide), found, self.x)

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.low is None or self.high is None else x.clamp(self.low, self.high)

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform points of the ball, moved into the box: [count, *shape]."""
        shape = (count, len(self.x), math.prod(self.shape[1:]))
        step = self.draw(shape, generator, dtype or self.dtype).to(self.x) * self.eps[:, None]
        return self._clipped(self.x + step.reshape(count, *self.shape))

    def outward(self) -> Region:
        """The ball of the numbers that were given, where the type rounded them."""
        eps, low, high = self.given
        return self._with(
            self.x,
            self.eps if eps is None else _above(self.eps, eps),
            self.low if low is None or self.low is None else _below(self.low, low),
            self.high if high is None or self.high is None else _above(self.high, high),
        )

    def enclosing(self, dtype: torch.dtype) -> Region:
        """A ball of another type that holds this one: its centre is rounded, and its radius grows by as much."""
        if dtype == self.dtype:
            return self
        x = self.x.to(dtype)
        moved = safely(self.length, flatten_from((self.x.double() - x.double()).abs(), 1))
        moved = moved * (1 + 2 * gamma(math.prod(self.shape[1:]) + 8, torch.float64))
        eps = up(up(self.eps.double() + moved))
        eps = torch.where(moved > 0, eps, self.eps.double())
        small = cast_up(eps, dtype)
        if self.low is None or self.high is None:
            return self._with(x, small, None, None)
        ends = InputBox.known(self.low, self.high).enclosing(dtype)
        return self._with(x, small, ends.lower, ends.upper)

    def _with(self, x: Tensor, eps: Tensor, low: Tensor | None, high: Tensor | None) -> Region:
        return filled(object.__new__(type(self)), x=x, eps=eps, low=low, high=high, given=(None, None, None))


def _below(t: Tensor, number: float) -> Tensor:
    return torch.where(t.double() > number, down(t), t)


def _above(t: Tensor, number: float) -> Tensor:
    return torch.where(t.double() < number, up(t), t)
