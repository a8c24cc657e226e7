"""Supporting lines of a smooth function's convex and concave envelope over [l, u].

The line that lies closest above a function in the middle m of [l, u] touches its concave envelope there. Over at most
one inflection it is the tangent at m or a chord from an end to the point where it touches; over more it runs through
two points that exchange finds: of a line through p < m < q the point farthest above it takes the place of p or q.
Lines below are lines above the negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.networks.activations.contract import Hull, Line
from optrelax.networks.activations.touching import touch
from optrelax.rounding import unit_roundoff

if TYPE_CHECKING:
    from optrelax.networks.activations.smooth import Smooth

_ROUNDS = 12  # of exchange; each squares the distance that is left
_GRID = 33  # points that a slope for parallel lines is sought on, where there are several inflections


@dataclass(frozen=True, slots=True)
class Touching:
    """Of one side of the envelope: the chord (p, q) around the middle, and where the middle itself is on it."""

    p: Tensor
    q: Tensor
    tangent: Tensor
    """Where the middle touches."""
    at_l: Tensor
    """Where the envelope follows the function at l."""
    at_u: Tensor


class Supports:
    """The lines of one function over one set of intervals."""

    def __init__(self, f: Smooth, l: Tensor, u: Tensor) -> None:
        most = torch.finfo(l.dtype).max / 4
        self.f = f
        l, u = torch.broadcast_tensors(l, u)
        self.shape = l.shape
        self.l, self.u = (end.clamp(-most, most).reshape(l.shape or (1,)) for end in (l, u))  # places want a dimension
        self.m = (self.l + self.u) / 2
        with torch.no_grad():
            self._sort()

    def _sort(self) -> None:
        """What kind of interval each is."""
        l, u, f = self.l, self.u, self.f
        self.single: Tensor | None = None  # the one cut inside
        self.which: Tensor | None = None  # its number
        self.several: Tensor | None = None  # where more are
        if f.period is not None:
            c, period = f.inflections[0], f.period
            k = torch.floor((l - c) / period)
            cut = c + period * (k + 1)
            even = f.curvature[0] * (1 - 2 * torch.remainder(k, 2))
            self.left, self.right = even, torch.where(cut < u, -even, even)
            self.single, self.several = cut, cut + period < u
        elif not f.cuts:
            self.left = self.right = torch.full_like(l, f.curvature[0])
        else:
            curvature = torch.tensor(f.curvature, dtype=l.dtype, device=l.device)
            cuts = torch.tensor(f.cuts, dtype=l.dtype, device=l.device)
            first = torch.searchsorted(cuts, l.contiguous(), right=True)
            last = torch.searchsorted(cuts, u.contiguous())
            last = torch.maximum(last, first)
            self.left, self.right = curvature[first], curvature[last]
            self.which = first.clamp_max(len(cuts) - 1)
            self.single = cuts[self.which]
            if len(cuts) > 1:
                self.several = last > first + 1
        if self.single is not None:
            # A straight stretch bends the other way than its neighbour, at the corner between them.
            left, right = self.left, self.right
            self.left = torch.where((left == 0) & (right != 0), -right, left)
            self.right = torch.where((right == 0) & (left != 0), -left, right)
            if self.several is not None and not bool(self.several.any()):
                self.several = None

    @cached_property
    def at_l(self) -> Tensor:
        return self.f(self.l)

    @cached_property
    def at_u(self) -> Tensor:
        return self.f(self.u)

    @cached_property
    def middle(self) -> Tensor:
        """Slope of the tangent in the middle."""
        return self.f.derivative(self.m)

    # --- where lines touch ---------------------------------------------------------------------------------------

    def touching(self, sign: float) -> Touching:
        """Of the lines above sign * f."""
        with torch.no_grad():
            found = self.over_one_cut(sign)
            return found if self.several is None else self._exchanged(found, sign)

    def over_one_cut(self, sign: float) -> Touching:
        """Likewise, of intervals with one cut at most; of others anything."""
        l, u = self.l.detach(), self.u.detach()
        left, right = sign * self.left, sign * self.right
        if self.single is None:
            bent = left <= 0
            return Touching(l, u, bent, bent, bent)
        mixed = left * right < 0
        from_l = mixed & (left > 0)
        c = torch.where(mixed, self.single, l)
        anchor = torch.where(from_l, l, u)
        a, b = torch.where(from_l, c, l), torch.where(from_l, u, c)
        start = torch.where(from_l, sign, -sign)
        a, b = torch.where(mixed, a, l), torch.where(mixed, b, l)
        t = touch(self.f, self.which, c, anchor, a, b, start, mixed)
        p = torch.where(mixed & ~from_l, t, l)
        q = torch.where(from_l, t, u)
        m = self.m.detach()
        tangent = torch.where(mixed, torch.where(from_l, m >= t, m <= t), left <= 0)
        return Touching(
            p,
            q,
            tangent,
            torch.where(mixed, ~from_l & (t > l), left <= 0),
            torch.where(mixed, from_l & (t < u), left <= 0),
        )

    def _exchanged(self, found: Touching, sign: float) -> Touching:
        """Intervals with several cuts: two points of the envelope around the middle."""
        assert self.several is not None
        index = self.several.nonzero(as_tuple=True)
        l, u, m = (t.detach()[index] for t in (self.l, self.u, self.m))
        f = self.f
        p, q = l, u
        slope = f.derivative(m)
        height = sign * (f(m) - slope * m)
        _, best = f.extreme(slope, l, u, sign)
        unit = 4 * unit_roundoff(l.dtype)
        tangent = best <= height + unit * (height.abs() + (slope * m).abs())
        going = ~tangent
        for _ in range(_ROUNDS):
            if not bool(going.any()):
                break
            slope = (f(q) - f(p)) / (q - p)
            x, best = f.extreme(slope, l, u, sign)
            height = sign * (f(p) - slope * p)
            going = going & (best > height + unit * (height.abs() + (slope * p).abs())) & (x != p) & (x != q)
            p, q = torch.where(going & (x < m), x, p), torch.where(going & (x >= m), x, q)
        no = torch.zeros_like(tangent)
        new = Touching(p, q, tangent, no, no)
        parts = [getattr(found, n).index_put(index, getattr(new, n)) for n in ("p", "q", "tangent", "at_l", "at_u")]
        return Touching(*parts)

    # --- lines ---------------------------------------------------------------------------------------------------

    def chord(self, p: Tensor, q: Tensor) -> Tensor:
        """Slope between two points of the graph; where they (nearly) meet, the derivative between them.

        The points are constants but where they are ends: at a touching point the slope does not depend on it.
        """
        p, q = self.attached(p), self.attached(q)
        run = q - p
        least = unit_roundoff(run.dtype) ** 0.5
        size = torch.maximum(p.detach().abs(), q.detach().abs())
        short = run.detach() <= least * (size.clamp_max(self.f.unit) if self.f.unit else size)
        rise = self.f(q) - self.f(p)
        slope = torch.where(short, 0.0, rise) / torch.where(short, 1.0, run)
        middle = torch.where(short, (p + q) / 2, self.m.detach())
        return torch.where(short, self.f.derivative(middle), slope)

    def attached(self, x: Tensor) -> Tensor:
        """A point that moves with the end that it is."""
        return torch.where(x == self.l, self.l, torch.where(x == self.u, self.u, x))

    def line(self, slope: Tensor, sign: float, through: tuple[Tensor, ...]) -> Line:
        """The line of a slope above sign * f, as high as the function at the ends and at points it touches."""
        intercept = sign * (self.at_l - slope * self.l)
        intercept = torch.maximum(intercept, sign * (self.at_u - slope * self.u))
        for x in through:
            intercept = torch.maximum(intercept, sign * (self.f(x) - slope * x))
        return slope, sign * intercept

    def _line(self, slope: Tensor, sign: float, touching: Touching, *more: Tensor) -> Line:
        """The line of a slope that a touching was made for."""
        points = list(more) if self.single is None else [*map(self.attached, (touching.p, touching.q)), *more]
        if self.single is not None and 0 in self.f.curvature:  # at a corner
            c = torch.minimum(torch.maximum(self.single, self.l), self.u)
            points.append(c)
        slope, intercept = self.line(slope, sign, tuple(points))
        if self.several is not None:
            index = self.several.nonzero(as_tuple=True)
            _, best = self.f.extreme(slope.detach()[index], self.l.detach()[index], self.u.detach()[index], sign)
            lack = (best - sign * intercept.detach()[index]).clamp_min(0)
            intercept = intercept + sign * torch.zeros_like(intercept).index_put(index, lack)
        return slope, intercept

    def closest_line(self, sign: float, touching: Touching) -> Line:
        """The line above sign * f that lies closest in the middle."""
        slope = self.middle
        if bool(touching.tangent.all()):
            return self._line(slope, sign, touching, self.m)
        slope = torch.where(touching.tangent, slope, self.chord(touching.p, touching.q))
        return self._line(slope, sign, touching, self.m)

    def closest(self) -> tuple[Line, Line]:
        """See `Smooth.closest`."""
        below, above = (self.known(self.closest_line(sign, self.touching(sign))) for sign in (-1.0, 1.0))
        return below, above

    def hull(self) -> Hull:
        """See `Smooth.hull`."""
        sides = []
        for sign in (-1.0, 1.0):
            touching = self.touching(sign)
            first, second = self.closest_line(sign, touching), self.end_line(sign, touching)
            swap = sign * (second[0] - first[0]).detach() > 0
            left = tuple(torch.where(swap, b, a) for a, b in zip(first, second, strict=True))
            right = tuple(torch.where(swap, a, b) for a, b in zip(first, second, strict=True))
            sides.append((self.known((left[0], left[1])), self.known((right[0], right[1]))))
        return Hull(sides[0], sides[1])

    def end_line(self, sign: float, touching: Touching) -> Line:
        """The line above sign * f that holds its greatest value over [l, u]: at an end as steep as the envelope."""
        l, u = self.l, self.u
        with torch.no_grad():
            x, _ = self._greatest(sign)
            follows = torch.where(x == l, touching.at_l, touching.at_u)
            flat = (x != l) & (x != u)
            if self.several is not None:
                flat = flat | self.several
        slope = self.f.derivative(torch.where(flat, self.m.detach(), torch.where(x == l, l, u)))
        if not bool((follows | flat).all()):
            slope = torch.where(follows, slope, self.chord(touching.p, touching.q))
        slope = torch.where(flat | ~slope.detach().isfinite(), 0.0, slope)
        x = torch.where(flat, x, l.detach())
        return self._line(slope, sign, touching, x)

    def _greatest(self, sign: float) -> tuple[Tensor, Tensor]:
        at, best = self.l, sign * self.at_l
        for x in (self.u, *self.f._extrema(self.l, self.u)):
            value = sign * self.f(x)
            better = value >= best  # an extremum beside an end that is as high to rounding
            at, best = torch.where(better, x, at), torch.where(better, value, best)
        return at, best

    def known(self, line: Line) -> Line:
        """In the shape of l and u; beyond the domain nothing is known."""
        slope, intercept = (number.reshape(self.shape) for number in line)
        beyond = self.f.beyond_domain(self.l, self.u)
        if beyond is not None:
            beyond = beyond.reshape(self.shape)
            slope, intercept = slope.masked_fill(beyond, torch.nan), intercept.masked_fill(beyond, torch.nan)
        return slope, intercept

    def parallel_slope(self) -> Tensor:
        """The slope whose band is narrowest.

        The width is convex in the slope; it falls while the lowest point of f(x) - slope x lies left of the highest.
        Over one inflection these trade places where one of them reaches an end: at the slope of the line that touches.
        """
        return self._parallel_slope().reshape(self.shape)

    def _parallel_slope(self) -> Tensor:
        slope = self.chord(self.l.detach(), self.u.detach())
        if self.single is None:
            return slope
        above, below = self.touching(1.0), self.touching(-1.0)
        rises = (self.left > 0) & (self.right < 0)
        falls = (self.left < 0) & (self.right > 0)
        first, second = self.chord(above.p, above.q), self.chord(below.p, below.q)
        slope = torch.where(rises, torch.minimum(first, second), slope)
        slope = torch.where(falls, torch.maximum(first, second), slope)
        if self.several is None:
            return slope
        index = self.several.nonzero(as_tuple=True)
        with torch.no_grad():
            sought = self._on_a_grid(self.l[index], self.u[index])
        return slope.index_put(index, sought)

    def _on_a_grid(self, l: Tensor, u: Tensor) -> Tensor:
        x = torch.lerp(l, u, torch.linspace(0, 1, _GRID, dtype=l.dtype, device=l.device).unsqueeze(1))
        y = self.f(x)
        steps = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        low, high = steps.amin(0), steps.amax(0)
        for _ in range(30):
            slope = (low + high) / 2
            value = y - slope * x
            falling = value.argmin(0) < value.argmax(0)
            low, high = torch.where(falling, slope, low), torch.where(falling, high, slope)
        return (low + high) / 2
