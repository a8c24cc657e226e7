"""The solver of a linear program chosen by counted work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from optrelax.layers.interior_point import InteriorPoint
from optrelax.layers.programs.highs import Highs
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.programs.safe_bounds import certify_duals
from optrelax.layers.solutions import Status

# Products of one iteration: below, a problem and its factor stay in a core's cache, where interior points are about ten
# times as fast as the simplex method. benchmarks/programs.py measures it.
_PRODUCTS = 1e8


@dataclass(frozen=True, slots=True)
class Auto(ProgramSolver):
    """InteriorPoint where its products are few, with Highs for what that leaves unsettled; Highs elsewhere.

    `LPSolution.solver` says who solved.

    Args:
        tol: relative gap that counts as OPTIMAL.
        interior: for small problems.
        exact: for the rest.

    Sound: yes, through the layer.  Exact: to `tol`.

    Example:
        >>> found = LinearProgram(Auto())(torch.tensor([1.0, -1.0]), lower=torch.zeros(2), upper=torch.ones(2))
        >>> found.solver, round(found.lower.item(), 3)
        ('InteriorPoint', -1.0)
    """

    tol: float = 1e-6
    interior: InteriorPoint = field(default_factory=InteriorPoint)
    exact: Highs = field(default_factory=Highs)
    sparse: ClassVar[bool] = True

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems."""
        if _products(data) > _PRODUCTS:
            return replace(self.exact.solve(data, start), solver="Highs")
        data = data.dense()
        answer = replace(self.interior, tol=self.tol).for_programs().solve(data, start)
        open_ = ((answer.status == Status.NUMERICAL) | (answer.status == Status.ITERATION_LIMIT)).nonzero().squeeze(-1)
        if len(open_):
            open_ = open_[~_proved(data.select(open_), answer, open_, self.tol)]
        if not len(open_):
            return replace(answer, solver="InteriorPoint")
        rest = self.exact.solve(data.select(open_), None)

        def put(into: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            return into.index_copy(0, open_, part.to(into))

        return Answer(
            put(answer.primal, rest.primal),
            put(answer.inequality, rest.inequality),
            put(answer.equality, rest.equality),
            put(answer.status, rest.status),
            put(answer.iterations, rest.iterations),
            solver=f"InteriorPoint, Highs for {len(open_)} of {len(answer.status)}",
        )


def _proved(data: LPData, answer: Answer, index: torch.Tensor, tol: float) -> torch.Tensor:
    """Where an answer is an optimum, whatever its solver says; Highs's may be none, at costs of 1e7 or so."""
    primal, inequality, equality = answer.primal[index], answer.inequality[index], answer.equality[index]
    found = certify_duals(data, primal, inequality, equality, "outward", tol)
    return found.lower.isfinite() & (found.gap <= tol * found.lower.abs().clamp(min=1))


def _products(data: LPData) -> float:
    """Of one interior-point iteration: the normal equations and their factor."""
    _, n, m, p = data.size
    return n * n * (m + p) / 2 + n**3 / 6
