"""Piecewise-linear activations: their pieces and their convex hulls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.networks.activations.contract import Activation, Hull, Line, closer, least_width
from optrelax.networks.storage import Settings, Shape, Tensors, stored
from optrelax.rounding import down, underflow, unit_roundoff, up


@stored("activation")
@dataclass(frozen=True)
class PiecewiseLinear(Activation):
    """A continuous elementwise function, affine between its kinks, whose hull has at most two lines a side.

    At a kink the right piece is the convention (l >= 0 wins for a ReLU).

    Args:
        name: for messages, tables and files.
        function: elementwise on tensors.
        kinks: one or two, ascending; with two, the pieces are flat, rising, flat.
        slopes: one a piece, one piece more than kinks.
        intercepts: one a piece: piece i is slopes[i] * x + intercepts[i].

    Raises:
        ValueError: where numbers do not fit, or pieces do not meet.

    Sound: yes, if the pieces are the function's: see `check_activation`.  Exact: the hull.

    Example:
        >>> leaky = ox.PiecewiseLinear("leaky", nn.LeakyReLU(0.1), (0.0,), (0.1, 1.0), (0.0, 0.0))
        >>> leaky.image(torch.tensor(-1.0), torch.tensor(2.0))
        (tensor(-0.1000), tensor(2.))
    """

    name: str
    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]

    def __post_init__(self) -> None:
        pieces = len(self.kinks) + 1
        if not 1 <= len(self.kinks) <= 2 or len(self.slopes) != pieces or len(self.intercepts) != pieces:
            raise ValueError(
                f"{self.name}: wants one or two kinks and one slope and intercept a piece, got {len(self.kinks)} "
                f"kinks, {len(self.slopes)} slopes, {len(self.intercepts)} intercepts"
            )
        for i, kink in enumerate(self.kinks):
            left = self.slopes[i] * kink + self.intercepts[i]
            right = self.slopes[i + 1] * kink + self.intercepts[i + 1]
            if not abs(left - right) <= 1e-9 * max(1.0, abs(left)):  # so that NaN, of an overflow, is no meeting
                raise ValueError(f"{self.name}: pieces {i} and {i + 1} do not meet at {kink}: {left} and {right}")
        if list(self.kinks) != sorted(self.kinks):
            raise ValueError(f"{self.name}: kinks must ascend, got {self.kinks}")
        if len(self.kinks) == 2 and not (self.slopes[0] == 0 == self.slopes[2] and self.slopes[1] > 0):
            raise ValueError(
                f"{self.name}: with two kinks only flat-rising-flat pieces are supported, got slopes {self.slopes}; "
                "compose it of activations with one kink"
            )
        self.require_consistent()

    def require_consistent(self) -> None:
        """ValueError where the function is not what the pieces say, at points around the kinks, in float64."""
        steps = torch.tensor([0, 1e-9, 1e-3, 0.1, 0.5, 1, 2, 3.7, 10, 1e3, 1e6], dtype=torch.float64, device="cpu")
        x = torch.cat([kink + sign * steps for kink in self.kinks for sign in (-1, 1)])
        with torch.no_grad():
            y = self(x)
            if y.shape != x.shape:
                raise ValueError(f"{self.name}: makes {tuple(y.shape)} of {tuple(x.shape)}, which is not elementwise")
            slope, intercept = self.piece(x)
            wrong = ~((y - slope * x - intercept).abs() <= 1e-9 * (slope * x).abs().clamp_min(1 + intercept.abs()))
        if bool(wrong.any()):
            at, value = float(x[wrong][0]), float(y[wrong][0])
            said = float((slope * x + intercept)[wrong][0])
            raise ValueError(f"{self.name}: the function is {value:g} at {at:g}, its pieces say {said:g}")

    def __call__(self, x: Tensor) -> Tensor:
        """The function itself, elementwise."""
        return self.function(x)

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "kinks": self.kinks, "slopes": self.slopes, "intercepts": self.intercepts}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> PiecewiseLinear:
        """torch's own function where name and pieces are those of a known one, else the pieces themselves."""
        from optrelax.networks.activations.piecewise_functions import Pieces, known_pieces

        name = settings.word("name")
        pieces = tuple(settings.numbers(part) for part in ("kinks", "slopes", "intercepts"))
        known = known_pieces(name, *pieces)
        same = known is not None and (known.kinks, known.slopes, known.intercepts) == pieces
        function = known.function if same and known is not None else Pieces(*pieces)
        return cls(name, function, *pieces)

    @property
    def piecewise(self) -> PiecewiseLinear:
        return self

    @property
    def breaks(self) -> tuple[float, ...]:
        return self.kinks

    @property
    def exact(self) -> bool:
        """Whether the pieces are evaluated without rounding (slopes 0 or +-1, no intercepts)."""
        return all(abs(s) in (0.0, 1.0) for s in self.slopes) and not any(self.intercepts)

    def error(self, x: Tensor) -> Tensor:
        """Greatest error of the computed value at x, like x; 0 where the pieces are evaluated without rounding.

        A slope, an intercept, a kink, the product and the sum round, each by a unit of the two terms; what lies below
        the normal range may be lost, of a slope times |x|.
        """
        if self.exact:
            return torch.zeros_like(x)
        size = self._terms(*self.piece(x), x)
        for i, kink in enumerate(self.kinks):  # which rounds: a float next to it may belong to either piece
            size = torch.where(x == kink, torch.maximum(size, self._terms(*self._constant(i, x), x)), size)
        return 4 * unit_roundoff(x.dtype) * size + underflow(1, x.dtype) * (1 + x.abs())

    @staticmethod
    def _terms(slope: Tensor, intercept: Tensor, x: Tensor) -> Tensor:
        return torch.where(slope == 0, 0.0, (slope * x).abs()) + intercept.abs()

    @property
    def is_relu(self) -> bool:
        return self.kinks == (0.0,) and self.slopes == (0.0, 1.0) and self.intercepts == (0.0, 0.0)

    @property
    def monotone(self) -> bool:
        return min(self.slopes) >= 0

    @property
    def chord_above(self) -> bool:
        return len(self.kinks) == 1 and self.slopes[0] <= self.slopes[1]

    @property
    def origin_below(self) -> bool:
        return self.chord_above and not any(self.intercepts)

    def crossing(self, l: Tensor, u: Tensor) -> Tensor:
        """Where a kink lies strictly inside [l, u], so that the function is not affine there: bool, like l."""
        inside = [(l < kink) & (u > kink) for kink in self.kinks]
        return inside[0] if len(inside) == 1 else inside[0] | inside[1]

    def ends(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where [l, u] is crossing, and its ends there; harmless ends elsewhere, so that no unused value is NaN."""
        crossing = self.crossing(l, u)
        first, last = self.kinks[0], self.kinks[-1]
        a = torch.where(crossing, l, first - 1 - abs(first))
        return crossing, a, torch.where(crossing, u, last + 1 + abs(last))

    def decisive(self, l: Tensor, u: Tensor) -> Tensor:
        """A point whose piece is that of all of [l, u], where no kink lies inside; NaN where an end that decides is."""
        at = torch.where(u.isnan() & ~(l >= self.kinks[-1]), u, l)
        return torch.where(l.isnan() & (u <= self.kinks[0]), -torch.inf, at)

    def piece(self, l: Tensor) -> Line:
        """Slope and intercept of the piece that starts at or before l, constants without a gradient; of NaN, NaN."""
        slope = torch.where(l.isnan(), l.detach(), self.slopes[0])
        intercept = torch.full_like(l, self.intercepts[0])
        for kink, s, i in zip(self.kinks, self.slopes[1:], self.intercepts[1:], strict=True):
            slope = torch.where(l >= kink, s, slope)
            intercept = torch.where(l >= kink, i, intercept)
        return slope, intercept

    def band(self, slope: Tensor, l: Tensor, u: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Least and greatest value of f(x) - slope * x over [l, u], elementwise.

        The extremes of a piecewise-linear function lie at ends and kinks. `whole` counts every kink, inside or
        not: looser, and continuous where a continuous form needs it.
        """
        low = high = self(l) - slope * l
        points = [u]
        for kink in self.kinks:
            point = torch.full_like(l, kink)
            points.append(point if whole else torch.minimum(torch.maximum(point, l), u))
        for point in points:
            value = self(point) - slope * point
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        return low, high

    def beyond(self, slope: Tensor, l: Tensor, u: Tensor, sign: float) -> Tensor:
        """A float at or beyond the extreme of f(x) - slope * x over [l, u], which lies at an end or a kink.

        Each value there is rounded by the product, the function (`error`), the kink and the difference: at most 4 units
        of the magnitudes, none for the exact products and pieces of a ReLU; a product that underflows loses `tiny`.
        """
        unit = 4 * unit_roundoff(l.dtype)
        tiny = torch.finfo(l.dtype).tiny
        # At a kink that was rounded also such a product is off.
        trivial = ((slope == 0) | (slope.abs() == 1)) & self.exact
        ends = []
        for v in self._points(l, u):
            product, value = slope * v, self(v)
            difference = value - product
            error = torch.where(trivial, 0.0, unit * product.abs() + tiny * (1 + slope.abs()) * (v != 0))
            error = error + self.error(v)
            # The difference of two floats rounds by at most half an ulp of itself; it is exact where either is 0.
            error = error + torch.where((product == 0) | (value == 0) | (difference == 0), 0.0, unit * difference.abs())
            ends.append(difference + sign * error)
        return torch.stack(ends).amax(0) if sign > 0 else torch.stack(ends).amin(0)

    def _points(self, l: Tensor, u: Tensor) -> list[Tensor]:
        """Both ends, and the kinks of [l, u]."""
        return [l, u, *(torch.minimum(torch.maximum(torch.full_like(l, kink), l), u) for kink in self.kinks)]

    def image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value over [l, u], elementwise; the lines of slope 0."""
        if self.monotone:
            return self(l), self(u)
        return self.band(torch.zeros_like(l), l, u)

    def outward_image(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.image(l, u)
        if self.exact:
            return low, high
        error = torch.stack([self.error(v) for v in self._points(l, u)]).amax(0)
        return down(low - error), up(high + error)

    def magnitude(self, size: Tensor) -> Tensor:
        return max(map(abs, self.slopes)) * size + max(map(abs, self.intercepts))

    def closest(self, l: Tensor, u: Tensor) -> tuple[Line, Line]:
        hull = self.hull(l, u)
        return closer(hull.below, l, u, sign=1.0), closer(hull.above, l, u, sign=-1.0)

    def parallel_slope(self, l: Tensor, u: Tensor) -> Tensor:
        """The chord's, or the piece's where the function is affine."""
        crossing, a, b = self.ends(l, u)
        return torch.where(crossing, self.chord_slope(a, b), self.piece(self.decisive(l, u))[0])

    def hull(self, l: Tensor, u: Tensor) -> Hull:
        """Convex hull over [l, u]; both sides the exact piece where the function is affine there.

        Sound: yes.  Exact: the hull itself.  Gradient: of the lines in l and u.
        l, u [*batch, *shape]; lines alike.
        """
        crossing, a, b = self.ends(l, u)
        exact = self.piece(self.decisive(l, u))
        if len(self.kinks) == 1:
            left, right = (self._constant(i, l) for i in (0, 1))
            chord = self._chord(a, b)
            sides = ((left, right), (chord, chord))
            if self.slopes[0] > self.slopes[1]:
                sides = (sides[1], sides[0])
        else:
            first, last = self.kinks
            # From the left flat piece straight to the right end, and from the left end straight to the last kink;
            # with one kink inside, one of the two is the chord and the side that it bounds has no other line.
            rise = self._chord(a.clamp_min(first), b)
            fall = self._chord(a, b.clamp_max(last))
            sides = (
                (_choose(a < first, self._constant(0, l), rise), rise),
                (fall, _choose(b > last, self._constant(2, l), fall)),
            )
        (b0, b1), (a0, a1) = sides
        return Hull(
            (_choose(crossing, b0, exact), _choose(crossing, b1, exact)),
            (_choose(crossing, a0, exact), _choose(crossing, a1, exact)),
        )

    def _constant(self, piece: int, like: Tensor) -> Line:
        return torch.full_like(like, self.slopes[piece]), torch.full_like(like, self.intercepts[piece])

    def _chord(self, a: Tensor, b: Tensor) -> Line:
        """The line through both ends of the graph over [a, b], a < b."""
        slope = self.chord_slope(a, b)
        return slope, self(a) - slope * a

    def chord_slope(self, a: Tensor, b: Tensor) -> Tensor:
        """Slope of the line through both ends of the graph over [a, b], a < b.

        Gradient: exact; 0 where b - a is so small (1e-28 in float32) that its reciprocal may overflow.
        """
        rise, run = self(b) - self(a), b - a
        overflows = run.detach().isinf()  # half of it does not
        rise = torch.where(overflows, self(b) / 2 - self(a) / 2, rise)
        run = torch.where(overflows, b / 2 - a / 2, run)
        steady = run.detach() > least_width(run.dtype)
        slope = torch.where(steady, rise, 0.0) / torch.where(steady, run, 1.0)
        return torch.where(steady, slope, rise.detach() / run.detach())


def _choose(condition: Tensor, line: Line, other: Line) -> Line:
    return torch.where(condition, line[0], other[0]), torch.where(condition, line[1], other[1])
