"""Jumps of a function of one variable: located by the events that can cause them, to floating-point resolution.

A function of values [m] comes with switch functions [e] whose signs say which branch it is on. Where a sign differs
between two points, the event between them is closed in on, by interpolation of the switch function and by halves,
until its two sides are neighbours; a jump is a difference that is still there. Jumps without a known event are found
where they outweigh the smooth change over a cell. Both one-sided limits are values of the function, not extrapolated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Jump", "JumpFinder", "LineJumps", "Sample"]

_BLIND = 0.8  # share of a cell's change that a half keeps, above which it may hold a jump: 1/2 where it is smooth


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """The function at one point."""

    t: float
    values: Tensor  # float64 [m]
    switches: Tensor  # float64 [e]
    noise: Tensor  # float64 [m], what the values may be off by

    def differs(self, other: Sample) -> Tensor:
        """Indices of the switch functions whose sign is another at the other point; 0 is a sign of its own."""
        if self.switches.shape != other.switches.shape:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        return (self.switches.sign() != other.switches.sign()).nonzero()[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class Jump:
    """Two neighbouring points with different values."""

    left: Sample
    right: Sample

    @property
    def at(self) -> float:
        """Where it is, to the resolution."""
        return (self.left.t + self.right.t) / 2

    @property
    def size(self) -> Tensor:
        """Limit from the right minus limit from the left, [m]."""
        return self.right.values - self.left.values


@dataclass(frozen=True, slots=True, eq=False)
class LineJumps:
    """What one line holds."""

    jumps: list[Jump]
    samples: list[Sample]
    """The coarse samples, by t: for plots."""
    evaluations: int
    complete: bool
    """Whether every event was followed to its end within the budget."""


@dataclass(slots=True, eq=False)
class JumpFinder:
    """Search of [start, end].

    least: smallest jump of interest, times max(1, |value|).  resolution: width at which an event's sides count as
    neighbours.  cells: of the grid that begins the search.  budget: evaluations at most.  thorough: whether jumps
    without an event are also looked for between events, as needed where not every switch is known.
    """

    evaluate: Callable[[float], Sample]
    least: float
    resolution: float
    cells: int
    budget: int
    thorough: bool = False
    spent: int = 0
    jumps: list[Jump] = field(default_factory=list)

    def run(self, start: float, end: float) -> LineJumps:
        """Every jump between start and end."""
        grid = [self._at(start + (end - start) * i / self.cells) for i in range(self.cells + 1)]
        coarse = list(grid)
        complete = True
        for a, b in itertools.pairwise(grid):
            middle = self._at((a.t + b.t) / 2)
            coarse.append(middle)
            for left, right in ((a, middle), (middle, b)):
                complete &= self._cell(left, right, self._suspect(a, middle, b, left.t, right.t))
        coarse.sort(key=lambda sample: sample.t)
        return LineJumps(self._merged(), coarse, self.spent, complete)

    def _at(self, t: float) -> Sample:
        self.spent += 1
        return self.evaluate(t)

    def _threshold(self, a: Sample, b: Sample) -> Tensor:
        size = torch.maximum(a.values.abs(), b.values.abs()).clamp_min(1)
        return self.least * size + a.noise + b.noise

    def _changed(self, a: Sample, b: Sample) -> bool:
        """Whether the values differ by more than jumps that do not count."""
        return bool(((b.values - a.values).abs() > self._threshold(a, b)).any())

    @staticmethod
    def _suspect(a: Sample, middle: Sample, b: Sample, low: float, high: float) -> float | None:
        """Where a parabola through a switch function dips through 0 between points of one sign, inside (low, high)."""
        if not a.switches.shape == middle.switches.shape == b.switches.shape or a.switches.numel() == 0:
            return None
        sign = middle.switches.sign()
        one_sign = (a.switches.sign() == sign) & (b.switches.sign() == sign)
        curve = a.switches - 2 * middle.switches + b.switches
        slope = (b.switches - a.switches) / 2
        bent = one_sign & (curve != 0)
        place = torch.where(bent, -slope / torch.where(bent, curve, 1.0), 2.0)  # in half widths from the middle
        depth = middle.switches - slope.square() / (2 * torch.where(bent, curve, 1.0))
        # Nearly touching counts: the parabola is an approximation.
        dips = bent & (place.abs() < 1) & (depth * middle.switches.sign() < 0.1 * middle.switches.abs())
        points = middle.t + place[dips] * (b.t - a.t) / 2
        points = points[(points > low) & (points < high)]
        return float(points.median()) if points.numel() else None

    def _cell(self, a: Sample, b: Sample, suspect: float | None) -> bool:
        """Search one cell of the grid; False where the budget ended."""
        if suspect is not None:
            middle = self._at(suspect)
            return self._events(a, middle) & self._events(middle, b)
        if a.differs(b).numel():
            return self._events(a, b)
        return self._blind(a, b)

    def _events(self, a: Sample, b: Sample) -> bool:
        """Close in on every event between two points."""
        stack = [(a, b, 0, False)]
        while stack:
            a, b, hits, halve = stack.pop()
            changed = a.differs(b)
            if not self._changed(a, b):
                continue
            if changed.numel() == 0:
                if self.thorough and not self._blind(a, b):
                    return False
                continue
            if b.t - a.t <= self.resolution:
                self.jumps.append(Jump(a, b))
                continue
            if self.spent >= self.budget:
                return False
            points = [a, *(self._at(t) for t in self._cuts(a, b, changed, hits, halve)), b]
            inner = len(points) == 4
            for i, (left, right) in enumerate(itertools.pairwise(points)):
                hit = inner and i == 1
                # What interpolation did not shrink to a half is halved next, so that every event is reached.
                slow = not hit and right.t - left.t > 0.5 * (b.t - a.t)
                stack.append((left, right, hits + 1 if hit else 0, slow))
        return True

    def _cuts(self, a: Sample, b: Sample, changed: Tensor, hits: int, halve: bool) -> list[float]:
        """Points inside (a, b): closely around an interpolated root, or the middle."""
        width = b.t - a.t
        middle = a.t + width / 2
        if halve or width <= 8 * self.resolution:
            return [middle]
        ga, gb = a.switches[changed], b.switches[changed]
        share = float((ga / (ga - gb)).clamp(0, 1).nan_to_num(0.5).median())
        root = a.t + share * width
        window = max(width / 16 ** min(hits + 1, 5), 2 * self.resolution)
        cuts = [t for t in (root - window / 2, root + window / 2) if a.t + self.resolution / 4 < t < b.t]
        cuts = [t for t in cuts if t < b.t - self.resolution / 4]
        return cuts or [middle]

    def _blind(self, a: Sample, b: Sample) -> bool:
        """Jumps without an event: the half that keeps most of the change, as long as it keeps nearly all of it."""
        stack = [(a, b, 0)]
        while stack:
            a, b, slow = stack.pop()
            if not self._changed(a, b):
                continue
            if b.t - a.t <= self.resolution:
                self.jumps.append(Jump(a, b))
                continue
            if self.spent >= self.budget:
                return False
            middle = self._at(a.t + (b.t - a.t) / 2)
            if a.differs(middle).numel() or middle.differs(b).numel():
                if not (self._events(a, middle) and self._events(middle, b)):
                    return False
                continue
            whole = (b.values - a.values).abs() / self._threshold(a, b)
            for left, right in ((a, middle), (middle, b)):
                part = (right.values - left.values).abs() / self._threshold(left, right)
                kept = bool((part > _BLIND * whole)[part > 1].any())
                # Twice in a row without keeping most of it: smooth.
                if kept or slow < 1:
                    stack.append((left, right, 0 if kept else slow + 1))
        return True

    def _merged(self) -> list[Jump]:
        """Jumps by place; those of one event whose switch flickers between neighbours are one."""
        merged: list[Jump] = []
        for jump in sorted(self.jumps, key=lambda jump: jump.at):
            if merged and jump.left.t - merged[-1].right.t <= 4 * self.resolution:
                merged[-1] = Jump(merged[-1].left, jump.right)
            else:
                merged.append(jump)
        return [jump for jump in merged if self._changed(jump.left, jump.right)]
