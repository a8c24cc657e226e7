"""Network LPs through their explicit sparse form: generic LP solvers, and pre-activation bounds that are constraints.

Of a solver's answer only the prices (`layers/prices.py`) and the primal point are used: the prices make a dual point,
and the point is pushed through the hulls once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.layers.affine_maps import AffineMaps
from optrelax.layers.evaluation import Evaluation, best_dual, evaluate, solved
from optrelax.layers.network_lp import NetworkLP, export
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.prices import in_float64, priced
from optrelax.layers.problems import DualPoint, Problems, Weights
from optrelax.layers.programs.highs import Highs
from optrelax.layers.programs.lp_data import LPData, ProgramSolver
from optrelax.layers.programs.pdhg import PDHG
from optrelax.layers.solutions import Status
from optrelax.layers.sweeps import nearest_point
from optrelax.regions import Region
from optrelax.rounding import Rounding

Solver = NetworkSolver | ProgramSolver
"""What a layer of network LPs takes."""


@dataclass(frozen=True)
class ProgramSolverAdapter(NetworkSolver):
    """A solver of explicit LPs as a solver of network LPs: one model an example, its rows as objectives; in float64.

    solver: `Highs` (its sparse entry), or another solver of `LinearProgram` (dense).
    implied: whether the LP implies its pre-activation bounds; a claim of contradiction is then a rounding error.
    """

    solver: ProgramSolver
    implied: bool = True

    feasibility: ClassVar[float] = 1e-6

    @property
    def tol(self) -> float:  # type: ignore[override]
        """The solver's."""
        return self.solver.tol

    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        """Both points of R problems; the best of `starts` stands in where the solver fails."""
        with torch.no_grad():
            exact = in_float64(problems)
            first = [s.to(torch.float64) for s in starts]
            claim = _solve(_closer(self.solver), exact)
            points = _points(exact, claim)
            if self.implied:
                points = self._overrule(exact, points, first)
            found = evaluate(exact, points, self.tol, implied=self.implied, feasibility=self.feasibility)
            index = (found.status != Status.OPTIMAL).nonzero()[:, 0]
            if index.numel():
                duals = [d.select(index) for d in (points.dual, *first)]
                points = replace(points, dual=points.dual.put(index, best_dual(exact.select(index), duals)[0]))
            return points

    def _overrule(self, problems: Problems, points: Points, starts: list[DualPoint]) -> Points:
        """Implied bounds contradict each other by their rounding alone: solve such problems without them."""
        assert points.reason is not None
        index = (points.reason == Status.INFEASIBLE).nonzero()[:, 0]
        if not index.numel():
            return points
        from optrelax.layers.interior_point import InteriorPoint

        found = InteriorPoint(tol=self.tol).solve(problems.select(index), [s.select(index) for s in starts])
        mine = replace(points, reason=None, rays=None)
        reason = points.reason.index_fill(0, index, int(Status.ITERATION_LIMIT))
        return replace(mine.put(index, found), reason=reason)


def _closer(solver: ProgramSolver) -> ProgramSolver:
    """A first-order solver to half its tolerance: its points are judged in the network's terms, and move a little."""
    return replace(solver, tol=solver.tol / 2) if isinstance(solver, PDHG) else solver


def network_solver(solver: Solver, implied: bool = True) -> NetworkSolver:
    """What solves network LPs for a layer's solver, given whether the LP implies its pre-activation bounds."""
    return solver if isinstance(solver, NetworkSolver) else ProgramSolverAdapter(solver, implied)


def solved_under_given_bounds(
    solver: Solver, problems: Problems, starts: Sequence[DualPoint], rounding: Rounding = "nearest"
) -> Evaluation:
    """R problems whose pre-activation bounds are constraints that the LP does not imply.

    A solver that does not know them has a valid bound all the same, and its point counts where it happens to keep
    them; what it leaves open over a polyhedron goes to HiGHS, as the LP with the bounds as constraints, or the proof
    that they contradict each other: INFEASIBLE, for every problem of the example.
    """
    first = network_solver(solver, implied=False)
    found = solved(first, problems, starts, rounding=rounding, implied=False).points_alone()
    with torch.no_grad():
        known = [start for start in starts if start.ends]
        if known:  # multipliers of the bounds that an earlier solve has found
            found = _better_bound(problems, found, known, first.tol, rounding)
        index = (~_settled(found, first.threshold)).nonzero()[:, 0]
        if index.numel() and not isinstance(solver, Highs) and _has_rows(problems.region):
            rest = ProgramSolverAdapter(Highs(tol=first.tol), implied=False)
            mine = [s.select(index) for s in (*starts, found.dual)]
            part = solved(rest, problems.select(index), mine, rounding=rounding, implied=False).points_alone()
            found = found.put(index, replace(part, iterations=part.iterations + found.iterations[index]))
        return _spread(found, problems.example)


def _has_rows(region: Region) -> bool:
    """Whether an explicit LP can hold it: HiGHS knows no balls."""
    return region.select(slice(0, 1)).polyhedron() is not None


def _settled(found: Evaluation, threshold: float | None) -> Tensor:
    settled = (found.status == Status.OPTIMAL) | (found.status == Status.INFEASIBLE)
    if threshold is not None:
        settled |= found.objective.isfinite() & ((found.lower > threshold) | (found.objective <= threshold))
    return settled


def _better_bound(
    problems: Problems, found: Evaluation, starts: list[DualPoint], tol: float, rounding: Rounding
) -> Evaluation:
    """With the dual points of earlier solves where they hold more."""
    exact = in_float64(problems)
    dual, _ = best_dual(exact, [d.to(torch.float64) for d in (found.dual, *starts)])
    points = Points(dual, found.primal.to(torch.float64), found.iterations)
    again = evaluate(problems, points, tol, start=found.dual, rounding=rounding, implied=False).points_alone()
    keep = (found.status == Status.OPTIMAL) | (found.status == Status.INFEASIBLE) | ~(again.lower > found.lower)
    return found.where(keep, again)


def _spread(found: Evaluation, example: Tensor | None) -> Evaluation:
    """A contradiction concerns every problem of its example."""
    proved = found.status == Status.INFEASIBLE
    if example is None or not bool(proved.any()):
        return found
    proved = torch.isin(example, example[proved])
    status = torch.where(proved, int(Status.INFEASIBLE), found.status).to(torch.int8)
    lower = torch.where(proved, -torch.inf, found.lower)
    return replace(found, status=status, lower=lower, objective=torch.where(proved, torch.inf, found.objective))


# --- the explicit LP ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a solver says about R problems."""

    x: Tensor
    after: Weights
    prices: Weights
    """Of an optimum, or of a ray where the status is INFEASIBLE."""
    status: Tensor
    iterations: Tensor


def _points(problems: Problems, claim: _Claim) -> Points:
    """The dual point of the claimed prices, and the nearest point that keeps box and hulls."""
    dual, primal = priced(problems, claim.prices), nearest_point(problems, claim.x, claim.after)
    # The region is bounded, and a claim of optimality that the points do not bear out is none.
    return Points(dual, primal, claim.iterations, claim.status, claim.prices)


def _solve(solver: ProgramSolver, problems: Problems) -> _Claim:
    """Solve the problems example by example."""
    example = problems.example
    device = problems.rows.device
    if example is None:
        example = torch.arange(problems.count, device=device)
    maps = AffineMaps(problems.network)
    shapes = {name: h.before[0] for name, h in problems.hulls.items()}
    claim = _Claim(
        problems.region.like.new_zeros(problems.region.shape),
        {name: torch.zeros_like(like) for name, like in shapes.items()},
        {name: torch.zeros_like(like) for name, like in shapes.items()},
        torch.zeros(problems.count, dtype=torch.int8, device=device),
        torch.zeros(problems.count, dtype=torch.int64, device=device),
    )
    for one in example.unique():
        index = (example == one).nonzero()[:, 0]
        program = _export(problems.select(index[:1]), maps)
        c, _ = program.objective(problems.rows[index])
        found = _solve_sparse(solver, program, c) if isinstance(solver, Highs) else _solve_dense(solver, program, c)
        found.require_fit(type(solver).__name__, program, len(c))

        def take(values: np.ndarray, like: Tensor) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(like).reshape(-1, *like.shape[1:])

        claim.x[index] = take(found.primal[:, program.columns["input"]], claim.x)
        for name, like in shapes.items():
            claim.after[name][index] = take(found.primal[:, program.columns[f"post:{name}"]], like)
            # The rows are z - W y = b, with L = c.v + duals.(A v - b): the price has the other sign.
            claim.prices[name][index] = take(-found.duals[:, program.rows[f"affine:{name}"]], like)
        claim.status[index] = torch.from_numpy(found.status).to(claim.status)
        claim.iterations[index] = torch.from_numpy(found.iterations).to(claim.iterations)
    return claim


def _export(one: Problems, maps: AffineMaps) -> NetworkLP:
    before = {name: Bounds.known(*h.before) for name, h in one.hulls.items()}
    return export(one.network, one.region, before, upto=one.target, maps=maps)


@dataclass(frozen=True, slots=True)
class _RowsOfExample:
    """Answers to k objectives over one polyhedron, as `SparseAnswer` has them."""

    primal: np.ndarray
    duals: np.ndarray
    status: np.ndarray
    iterations: np.ndarray

    def require_fit(self, owner: str, program: NetworkLP, k: int) -> None:
        """ValueError that names what does not fit the problem."""
        rows, columns = program.matrix.shape
        wanted = {"primal": (k, columns), "duals": (k, rows), "status": (k,), "iterations": (k,)}
        for name, shape in wanted.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"{owner}: {name} of {k} objectives: wanted shape {shape}, got {got}")


def _solve_sparse(solver: Highs, program: NetworkLP, c: np.ndarray) -> _RowsOfExample:
    sides = (program.row_lower, program.row_upper, program.col_lower, program.col_upper)
    found = solver.solve_sparse(c, program.matrix, *sides)
    return _RowsOfExample(found.primal, found.duals, found.status, found.iterations)


def _solve_dense(solver: ProgramSolver, program: NetworkLP, c: np.ndarray) -> _RowsOfExample:
    low, high = (torch.from_numpy(side) for side in (program.row_lower, program.row_upper))
    matrix = torch.from_numpy(program.matrix.toarray())
    equal = low == high
    above, below = (side.isfinite() & ~equal for side in (high, low))
    k = len(c)
    data = LPData(
        torch.from_numpy(c),
        torch.cat([matrix[above], -matrix[below]]),
        torch.cat([high[above], -low[below]]).expand(k, -1),
        matrix[equal],
        low[equal].expand(k, -1),
        torch.from_numpy(program.col_lower).expand(k, -1),
        torch.from_numpy(program.col_upper).expand(k, -1),
    )
    found = solver.solve(data, None)
    duals = torch.zeros(k, len(low), dtype=torch.float64, device="cpu")
    duals[:, equal] = found.equality
    count = int(above.sum())
    duals[:, above] += found.inequality[:, :count]
    duals[:, below] -= found.inequality[:, count:]
    return _RowsOfExample(found.primal.numpy(), duals.numpy(), found.status.numpy(), found.iterations.numpy())
