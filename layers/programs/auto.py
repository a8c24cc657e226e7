"""The solver of a linear program chosen by counted work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from optrelax.layers.interior_point import InteriorPoint
from optrelax.layers.programs.highs import Highs
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver

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
        found = replace(self.interior, tol=self.tol).for_programs().solve(data.dense(), start)
        return replace(found, solver="InteriorPoint")

    def fallback(self, data: LPData) -> ProgramSolver | None:
        """`exact`, where it has not been asked yet."""
        return None if _products(data) > _PRODUCTS else self.exact


def _products(data: LPData) -> float:
    """Of one interior-point iteration: the normal equations and their factor."""
    _, n, m, p = data.size
    return n * n * (m + p) / 2 + n**3 / 6
