"""The memory of an LP layer: how many of its programs are solved at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optrelax.layers.exported import Solver


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """What a layer's memory allows: bytes for the closed form, LPs at a time (infinite: all), and the solver in it."""

    source: float
    lot: float
    solver: Solver


@dataclass(frozen=True, slots=True)
class LotSizes:
    """LPs at most; bytes of one being solved and differentiated, of one that waits, of what all share, of a solver."""

    count: int
    each: int
    kept: int
    fixed: int
    solver: int
    graph: int = 0
    """What a lot leaves for the backward pass besides numbers."""

    @property
    def least(self) -> float:
        """A lot at work and the graphs of all, where lots are neither too large nor too many.

        As much as is kept of all problems anyway, so that a tight limit makes no lots of single problems.
        """
        return max(self.each, self.kept * self.count, 2 * math.sqrt(self.count * self.each * self.graph))

    def size(self, room: float) -> int:
        """LPs of a lot: the most whose numbers, with the graphs of all lots, fit."""
        room = max(room, self.least)
        spare = max(0.0, room**2 - 4 * self.count * self.each * self.graph)
        return max(1, int((room + math.sqrt(spare)) / (2 * self.each)))
