"""What solves network LPs: points in, points out. What they are worth is for `evaluation` to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optrelax.layers.batched import Batched
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems, Weights


@dataclass(frozen=True, slots=True)
class Points(Batched):
    """What a solver returns for R problems. Nothing in it is trusted: see `optrelax.layers.evaluation`."""

    dual: DualPoint
    primal: PrimalPoint
    iterations: Tensor
    """[R]."""
    reason: Tensor | None = None
    """Status codes [R], why the solver stopped where its points show no optimum; None: at its limit of iterations.

    INFEASIBLE counts where `rays` prove it.
    """
    rays: Weights | None = None
    """Prices, see `optrelax.layers.prices`, of problems that are said to contradict themselves, [R, *shape]."""


class NetworkSolver(ABC):
    """Solves R network LPs: a frozen dataclass of options, handed to a layer as `Triangle(solver=...)`.

    Sound: whatever it returns; the layer evaluates bound, gap and status from the points alone.
    """

    tol: float
    """Gap that counts as OPTIMAL, in units of max(1, |lower|)."""
    threshold: float | None = None
    """Where the sign of value - threshold is certain, a problem needs no more; None: never."""
    feasibility: ClassVar[float] = 0.0
    """How far a point may lie beyond given pre-activation bounds, in units of max(1, |l|, |u|), beyond rounding."""

    @property
    def aim(self) -> float:
        """Gap at which the points of an earlier solve are good enough, in the same units."""
        return self.tol

    products: bool = False
    """Whether its problems may hold the product of two values: a hull of planes, read by nobody but the sweeps."""

    @abstractmethod
    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        """A dual and a primal point of every problem; each of `starts` is a bound already, and there is one at least.

        Either floating type will do: points are evaluated in the wider of theirs and the problems'.
        """

    def bytes_needed(self, inputs: int, hidden: int, count: int) -> int:
        """Memory for `count` problems of so many inputs and hidden neurons, beyond some vectors a problem; 0: none."""
        return 0

    def within(self, max_bytes: float) -> NetworkSolver:
        """The same solver in this much memory, where it can tell."""
        return self
