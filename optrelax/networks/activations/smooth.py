"""Smooth activations: a function, its derivative and its inflections give every line that encloses it.

Between two neighbouring inflections a function is convex or concave. So the greatest value of f(x) - s x over an
interval, whatever the slope s, lies at an end, an inflection, or where f'(x) = s in a concave stretch: each slope has
one best line above, and one below. What a relaxation chooses is the slope; its line is sound whatever it chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optrelax.networks.activations.contract import Activation, Hull, Line
from optrelax.networks.activations.extremes import UNITS, extreme, known_reach, outward_extreme
from optrelax.networks.activations.sliding import closest_share, sliding_line
from optrelax.networks.activations.supporting import Supports
from optrelax.networks.activations.touching import TangencyTable
from optrelax.networks.storage import Settings, Shape, Tensors, stored
from optrelax.rounding import down, underflow, unit_roundoff, up

Function = Callable[[Tensor], Tensor]

_REPEATS = 5  # inflections of a periodic function that are looked at from either end of an interval


@stored("smooth")
@dataclass(frozen=True)
class Smooth(Activation):
    """A continuous elementwise function, convex or concave between neighbouring inflections.

    Args:
        name: for messages, tables and files.
        function: elementwise on tensors of any type.
        derivative: likewise; it is differentiated for gradients.
        inflections: where the derivative turns, ascending. A corner is one too: there the derivative is that of the
            side which is not straight.
        extrema: where the function turns, ascending.
        domain: ends of where the function is defined. Beyond, nothing is known: bounds NaN.
        poles: where it is not defined within.
        period: of the derivative's sign changes, for a function that repeats; inflections and extrema are then one
            each.
        size: what the rounding error of a computed value is relative to, by default |f(x)| + |x| + 1: at most 16 units
            of it, a fact of the functions used, which tests hold against 200-bit arithmetic for those of this library.
        steepness: the same of the derivative, by default |f'(x)| + 1, at most 64 units of it.
        parameters: numbers that the function depends on, kept in files.

    Raises:
        ValueError: where samples of the function contradict what is said of it.

    Sound: yes, if inflections and extrema are all there.  Gradient: exact, through the points of tangency too.

    Example:
        >>> cosh = ox.Smooth("cosh", torch.cosh, torch.sinh, extrema=(0.0,))
        >>> low, high = cosh.image(torch.tensor(-1.0), torch.tensor(2.0))
        >>> low.item()
        1.0
    """

    name: str
    function: Function
    derivative: Function
    inflections: tuple[float, ...] = ()
    extrema: tuple[float, ...] = ()
    domain: tuple[float, float] = (-math.inf, math.inf)
    poles: tuple[float, ...] = ()
    period: float | None = None
    size: Function | None = None
    steepness: Function | None = None
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for what in ("inflections", "extrema", "poles"):
            places = tuple(float(x) for x in getattr(self, what))
            if list(places) != sorted(set(places)) or not all(map(math.isfinite, places)):
                raise ValueError(f"{self.name}: {what} must ascend and be finite, got {places}")
            object.__setattr__(self, what, places)
        if not self.domain[0] < self.domain[1]:
            raise ValueError(f"{self.name}: needs a domain (low, high) with low < high, got {self.domain}")
        if self.period is not None and not (self.period > 0 and len(self.inflections) == len(self.extrema) == 1):
            raise ValueError(f"{self.name}: a period wants a number > 0, one inflection and one extremum")
        self.require_consistent()

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    # --- what is said of it --------------------------------------------------------------------------------------

    @property
    def breaks(self) -> tuple[float, ...]:
        return tuple(sorted({*self.inflections, *self.extrema, *self.poles}))

    @cached_property
    def cuts(self) -> tuple[float, ...]:
        """Inflections and poles: between neighbours the function is convex or concave."""
        return tuple(sorted({*self.inflections, *self.poles}))

    @cached_property
    def curvature(self) -> tuple[int, ...]:
        """Of each stretch between cuts 1 (convex), -1 (concave) or 0 (straight), by the derivative at two samples."""
        found = []
        for a, b in self._stretches():
            x = torch.tensor([a + 0.3 * (b - a), a + 0.7 * (b - a)], dtype=torch.float64, device="cpu")
            slopes = self.derivative(x)
            found.append(int((slopes[1] - slopes[0]).sign()))
        return tuple(found)

    def _stretches(self) -> list[tuple[float, float]]:
        """Samples' ends, one pair for each stretch; of a periodic function the one behind its inflection."""
        if self.period is not None:
            return [(self.inflections[0], self.inflections[0] + self.period)]
        low, high = self.domain
        ends = [max(low, min([*self.cuts, high, 0.0]) - 4), *self.cuts, min(high, max([*self.cuts, low, 0.0]) + 4)]
        return list(itertools.pairwise(ends))

    @cached_property
    def tangencies(self) -> TangencyTable:
        """Where tangents through its points touch it again."""
        return TangencyTable(self)

    @property
    def unit(self) -> float:
        """The size that positions are told apart at: 1, or none where the function has a singular point."""
        return 0.0 if self.poles or any(map(math.isfinite, self.domain)) else 1.0

    @cached_property
    def monotone(self) -> bool:
        if self.extrema or self.poles:
            return False
        a, b = self._stretches()[0]
        return bool(self.derivative(torch.tensor((a + b) / 2, dtype=torch.float64, device="cpu")) > 0)

    @property
    def everywhere(self) -> bool:
        return self.domain == (-math.inf, math.inf) and not self.poles

    @property
    def chord_above(self) -> bool:
        return not self.inflections and min(self.curvature) >= 0 and self.period is None

    def crossing(self, l: Tensor, u: Tensor) -> Tensor:
        return l < u

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "parameters": self.parameters}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Smooth:
        from optrelax.networks.activations.elementary import known

        return known(settings.word("name"), settings.numbers("parameters"))

    def require_consistent(self) -> None:
        from optrelax.networks.activations.sampling import require_smooth

        require_smooth(self)

    # --- values --------------------------------------------------------------------------------------------------

    def error(self, x: Tensor) -> Tensor:
        """Greatest error of the computed value at x, like x."""
        size = self(x).abs() + x.abs() + 1 if self.size is None else self.size(x).abs()
        return UNITS * unit_roundoff(x.dtype) * size + underflow(1, x.dtype)

    def image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        at_l, at_u = self(l), self(u)
        if self.monotone and self.unit:
            return at_l, at_u
        if self.period is not None:
            far = torch.maximum(l.abs(), u.abs()) > known_reach(l.dtype)
            at_l, at_u = (torch.where(far, y, x) for x, y in ((at_l, -self.amplitude()), (at_u, self.amplitude())))
        values = [at_l, at_u, *(self(x) for x in self._extrema(l, u))]
        low, high = torch.stack(values).amin(0), torch.stack(values).amax(0)
        beyond = self.beyond_domain(l, u)
        return (
            (low, high) if beyond is None else (low.masked_fill(beyond, torch.nan), high.masked_fill(beyond, torch.nan))
        )

    def outward_image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values at ends and extrema, with their error; an extremum that was rounded is flat to less than an ulp."""
        low, high = self.image(l, u)
        error = torch.stack([self.error(x) for x in (l, u, *self._extrema(l, u))]).amax(0)
        return down(low - error), up(high + error)

    def amplitude(self) -> float:
        """Of a periodic function the greatest size, rounded up."""
        at = torch.tensor([self.extrema[0], self.extrema[0] + (self.period or 0.0)], dtype=torch.float64, device="cpu")
        return float(self(at).abs().amax()) * (1 + 1e-12)

    def _extrema(self, l: Tensor, u: Tensor) -> list[Tensor]:
        if self.period is None:
            return [_clamped(x, l, u) for x in self.extrema]
        first = self.extrema[0] + self.period * torch.ceil((l.detach() - self.extrema[0]) / self.period)
        return [torch.minimum(torch.maximum(x, l), u) for x in (first, first + self.period)]

    def beyond_domain(self, l: Tensor, u: Tensor) -> Tensor | None:
        """Where [l, u] leaves the domain or holds a pole; None for a function that is defined everywhere."""
        found = None
        outside = [(l <= pole) & (u >= pole) for pole in self.poles]
        if math.isfinite(self.domain[0]):
            outside.append(l < self.domain[0])
        if math.isfinite(self.domain[1]):
            outside.append(u > self.domain[1])
        for here in outside:
            found = here if found is None else found | here
        return found

    # --- stretches of an interval --------------------------------------------------------------------------------

    def pieces(self, l: Tensor, u: Tensor) -> list[tuple[Tensor, Tensor, Tensor | int]]:
        """Stretches of [l, u]: both ends, and 1 (convex), -1 (concave) or 0."""
        if self.period is None:
            ends = [l, *(_clamped(c, l, u) for c in self.cuts), u]
            return list(zip(ends, ends[1:], self.curvature, strict=False))
        c, period = self.inflections[0], self.period
        found: list[tuple[Tensor, Tensor, Tensor | int]] = []
        from_l, to_u = torch.floor((l - c) / period), torch.ceil((u - c) / period)
        for i in range(_REPEATS):
            for k in (from_l + i, to_u - 1 - i):
                a, b = (torch.minimum(torch.maximum(c + period * x, l), u) for x in (k, k + 1))
                found.append((a, b, self.curvature[0] * (1 - 2 * torch.remainder(k, 2))))
        return found

    def extreme(self, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Where sign * (f(x) - slope * x) is greatest over [l, u], and that value; constants."""
        return extreme(self, slope, l, u, sign)

    def band(self, slope: Tensor, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for sign in (-1.0, 1.0):
            x, _ = self.extreme(slope.detach(), l.detach(), u.detach(), sign)
            # At a stationary point the value does not move with x; an end moves as the interval does.
            x = torch.where(x == l, l, torch.where(x == u, u, x))
            found.append(self(x) - slope * x)
        beyond = self.beyond_domain(l, u)
        low, high = found
        return (
            (low, high) if beyond is None else (low.masked_fill(beyond, torch.nan), high.masked_fill(beyond, torch.nan))
        )

    # --- lines ---------------------------------------------------------------------------------------------------

    def closest(self, l: Tensor, u: Tensor) -> tuple[Line, Line]:
        """The lines that support the function's convex and concave envelope in the middle of [l, u].

        No line encloses less area: between a line and the function it is the width times the line's height there.
        Sound: yes.  Exact: at l = u.  Gradient: exact; continuous.
        """
        return Supports(self, l, u).closest()

    def hull(self, l: Tensor, u: Tensor) -> Hull:
        """`closest`, and a second line a side that holds the function's least (greatest) value over [l, u]."""
        return Supports(self, l, u).hull()

    def parallel_slope(self, l: Tensor, u: Tensor) -> Tensor:
        return Supports(self, l, u).parallel_slope()

    @property
    def slides(self) -> bool:
        return self.period is None and 0 not in self.curvature

    def supporting(self, l: Tensor, u: Tensor, share: Tensor, sign: float) -> tuple[Line, Tensor]:
        return sliding_line(self, l, u, share, sign)

    def closest_share(self, l: Tensor, u: Tensor, sign: float) -> Tensor:
        return closest_share(self, l, u, sign)

    def beyond(self, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> Tensor:
        return outward_extreme(self, slope, l, u, sign)


def _clamped(x: float, l: Tensor, u: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(torch.full_like(l, x), l), u)
