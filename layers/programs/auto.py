"""The solver of a program chosen by counted work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from optrelax.layers.interior_point import InteriorPoint
from optrelax.layers.programs.active_set import ActiveSet
from optrelax.layers.programs.highs import Highs
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.programs.simplex import DualSimplex

# Products of one iteration: below, a problem and its factor stay in a core's cache, where interior points are about ten
# times as fast as the simplex method. benchmarks/programs.py measures it.
_PRODUCTS = 1e8
_ENTRIES = 1.5  # of a tableau that are changed in the time in which ten iterations make one product each
_ALIKE = 16  # problems over one matrix from which on the first one's basis pays for the others


@dataclass(frozen=True, slots=True)
class Auto(ProgramSolver):
    """InteriorPoint where its products are few, with Highs for what that leaves unsettled; Highs elsewhere.

    Of 16 problems or more over one matrix the second shows whether the first basis helps: then DualSimplex solves all.
    Quadratic programs go to InteriorPoint, and where products are few what that leaves unsettled to ActiveSet.
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
    quadratic: ClassVar[bool] = True
    sparse: ClassVar[bool] = True

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems."""
        if data.P is None and _products(data) > _PRODUCTS:
            return replace(self.exact.solve(data, start), solver="Highs")
        data, interior = data.dense(), replace(self.interior, tol=self.tol)
        if start is None and data.size[0] >= _ALIKE and DualSimplex.takes(data):
            return DualSimplex(self.tol, interior, _ENTRIES * _least_products(data)).solve(data, None)
        return replace(interior.for_programs().solve(data, start), solver="InteriorPoint")

    def fallback(self, data: LPData) -> ProgramSolver | None:
        """`exact`, where it has not been asked yet; of quadratic programs `ActiveSet`."""
        if _products(data) > _PRODUCTS:
            return None
        return self.exact if data.P is None else ActiveSet(self.tol, self.exact)


def _products(data: LPData) -> float:
    """Of one interior-point iteration: the normal equations and their factor."""
    _, n, m, p = data.size
    return n * n * (m + p) / 2 + n**3 / 6


def _least_products(data: LPData) -> float:
    """The same by rows where these are fewer."""
    _, n, m, p = data.size
    less, more = sorted((n, m + p))
    return less * less * more / 2 + less**3 / 6
