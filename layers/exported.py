"""Network LPs through their explicit sparse form: generic LP solvers, and pre-activation bounds that are constraints.

Of a solver's answer only the prices (`layers/prices.py`) and the primal point are used: the prices make a dual point,
whose bound the same sweep evaluates as every other, and the point is pushed through the hulls once more. An inaccurate
solver can be loose, never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.layers.ascent.dual_ascent import Answer, statuses
from optrelax.layers.network_lp import AffineMaps, NetworkLP, export
from optrelax.layers.prices import checked_objective, in_float64, priced, proves_contradiction
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems, Weights, backward_sweep, nearest_point
from optrelax.layers.programs.lp_data import LPData
from optrelax.layers.solutions import Status
from optrelax.regions import InputBox
from optrelax.rounding import unit_roundoff

_FEASIBILITY = 1e-6  # how far a point may lie beyond a pre-activation bound, in units of max(1, |l|, |u|)


@dataclass(frozen=True, slots=True)
class Exported:
    """A solver of explicit LPs as a solver of network LPs: one model an example, its rows as objectives.

    solver: `Highs` (its sparse entry), or another solver of `LinearProgram` (dense).
    implied: whether the LP implies its pre-activation bounds; a claim of contradiction is then a rounding error.
    Sound: yes, the bound is that of a dual point.  Exact: as the solver, in float64; `gap` says how far.
    INFEASIBLE is a proof, rounding included, that the pre-activation bounds contradict each other; a claim of it that
    cannot be proved is NUMERICAL.
    """

    solver: Any
    implied: bool = True

    def solve_network(self, problems: Problems, starts: list[DualPoint]) -> Answer:
        """Solve R problems; the best of `starts` stands in where the solver fails."""
        with torch.no_grad():
            exact = in_float64(problems)
            starts = [s.to(torch.float64) for s in starts]
            claim = _solve(self.solver, exact)
            answer = self._evaluate(exact, claim)
            if self.implied:
                answer = self._overrule(exact, answer, starts)
            else:
                answer = _judge(exact, answer, claim, unit_roundoff(problems.rows.dtype))
            failed = (answer.status != Status.OPTIMAL) & (answer.status != Status.INFEASIBLE)
            for start in starts if bool(failed.any()) else ():
                answer = _better_dual(exact, answer, failed, start)
            closed = self._closed(answer, claim)
            answer = replace(answer, status=torch.where(closed, int(Status.OPTIMAL), answer.status).to(torch.int8))
            return _cast(answer, problems.rows.dtype)

    def _closed(self, answer: Answer, claim: _Claim) -> Tensor:
        """Where both points show an optimum; not where given bounds may contradict each other."""
        closed = statuses(answer.lower, answer.objective, self.solver.tol) == Status.OPTIMAL
        return closed if self.implied else closed & (claim.status != Status.INFEASIBLE)

    def _evaluate(self, problems: Problems, claim: _Claim) -> Answer:
        """Both points, evaluated; OPTIMAL is what they show, whatever was claimed."""
        dual = priced(problems, claim.prices)
        lower = backward_sweep(problems, dual).value
        primal = nearest_point(problems, claim.x, claim.after)
        objective = checked_objective(problems, primal, dual, _FEASIBILITY)
        # The region is bounded, and a claim of optimality that the points do not bear out is none.
        refuted = (claim.status == Status.OPTIMAL) | (claim.status == Status.UNBOUNDED)
        status = torch.where(refuted, int(Status.NUMERICAL), claim.status).to(torch.int8)
        answer = Answer(dual, primal, lower, objective, status, claim.iterations)
        closed = self._closed(answer, claim)
        return replace(answer, status=torch.where(closed, int(Status.OPTIMAL), status).to(torch.int8))

    def _overrule(self, problems: Problems, answer: Answer, starts: list[DualPoint]) -> Answer:
        """Implied bounds contradict each other by their rounding alone: solve such problems without them."""
        index = (answer.status == Status.INFEASIBLE).nonzero()[:, 0]
        if not index.numel():
            return answer
        from optrelax.layers.interior_point import InteriorPoint

        finish = InteriorPoint(tol=self.solver.tol)
        return put(answer, index, finish.solve_network(problems.select(index), [s.select(index) for s in starts]))


@dataclass(frozen=True, slots=True)
class GivenBounds:
    """Pre-activation bounds that the LP does not imply: solved without them where they do not matter, else exported.

    first: a solver that assumes implied bounds.  Its bound is valid all the same, and its point counts where it
    happens to keep them; every other problem goes to `rest`, the optimum of the LP with the bounds as constraints.
    """

    first: Any
    rest: Exported

    def solve_network(self, problems: Problems, starts: list[DualPoint]) -> Answer:
        """Solve R problems."""
        with torch.no_grad():
            answer = self.first.solve_network(problems, starts)
            # Without a multiplier of the bounds it costs nothing to lie beyond them: only rounding is forgiven.
            rounding = 16 * unit_roundoff(problems.rows.dtype)
            objective = checked_objective(problems, answer.primal, answer.dual, rounding)
            answer = replace(answer, objective=objective, status=statuses(answer.lower, objective, self.first.tol))
            settled = answer.status == Status.OPTIMAL
            threshold = getattr(self.first, "threshold", None)
            if threshold is not None:
                settled |= objective.isfinite() & ((answer.lower > threshold) | (objective <= threshold))
            index = (~settled).nonzero()[:, 0]
            if not index.numel():
                return answer
            part = self.rest.solve_network(problems.select(index), [s.select(index) for s in (*starts, answer.dual)])
            return put(answer, index, replace(part, iterations=part.iterations + answer.iterations[index]))


def network_solver(solver: Any, implied: bool) -> Any:
    """What solves network LPs for a layer's solver, given whether the LP implies its pre-activation bounds."""
    if not hasattr(solver, "solve_network"):
        return Exported(solver, implied)
    if implied:
        return solver
    from optrelax.layers.programs.highs import Highs

    return GivenBounds(solver, Exported(Highs(tol=solver.tol), implied=False))


def solves_networks(solver: Any) -> bool:
    """Whether an object is a solver that network LPs can be handed to, directly or exported."""
    entries = ("solve_network", "solve_sparse", "solve")
    return not isinstance(solver, type) and any(hasattr(solver, entry) for entry in entries)


def _judge(problems: Problems, answer: Answer, claim: _Claim, unit: float) -> Answer:
    """Claims of contradiction proved (the bound is -inf, for every row of the example) or dropped (NUMERICAL)."""
    claimed = answer.status == Status.INFEASIBLE
    index = claimed.nonzero()[:, 0]
    if not index.numel():
        return answer
    rays = {name: p[index] for name, p in claim.prices.items()}
    proof = claim.proved[index] | proves_contradiction(problems.select(index), rays, unit)
    proved = claimed.index_put((index,), proof)
    if problems.example is not None:
        proved = torch.isin(problems.example, problems.example[proved])
    status = torch.where(claimed, int(Status.NUMERICAL), answer.status)
    return replace(
        answer,
        status=torch.where(proved, int(Status.INFEASIBLE), status).to(torch.int8),
        lower=torch.where(proved, -torch.inf, answer.lower),
        objective=torch.where(proved, torch.inf, answer.objective),
    )


def _better_dual(problems: Problems, answer: Answer, wanted: Tensor, start: DualPoint) -> Answer:
    """The answer with a start's dual point where that has the greater bound, among the wanted problems."""
    index = wanted.nonzero()[:, 0]
    value = backward_sweep(problems.select(index), start.select(index)).value
    better = value > answer.lower[index]
    index, value = index[better], value[better]
    dual = _put_dual(answer.dual, index, start.select(index))
    return replace(answer, dual=dual, lower=answer.lower.index_put((index,), value), sweeps=None)


def put(answer: Answer, index: Tensor, part: Answer) -> Answer:
    """The answer with some of its problems replaced."""

    def write(old: Tensor, new: Tensor) -> Tensor:
        return old.index_put((index,), new.to(old.dtype))

    tau = {name: write(t, part.primal.tau[name]) for name, t in answer.primal.tau.items()}
    return Answer(
        _put_dual(answer.dual, index, part.dual),
        PrimalPoint(write(answer.primal.x, part.primal.x), tau),
        *(write(getattr(answer, name), getattr(part, name)) for name in ("lower", "objective", "status", "iterations")),
    )


def _put_dual(dual: DualPoint, index: Tensor, part: DualPoint) -> DualPoint:
    """The dual point with some of its problems replaced; multipliers of bounds that one side lacks are 0."""

    def write(old: Weights, new: Weights) -> Weights:
        return {name: t.index_put((index,), new[name].to(t.dtype)) for name, t in old.items()}

    ends: Weights = {}
    for name, a in dual.alpha.items():
        if name in dual.ends or name in part.ends:
            old = dual.ends.get(name, torch.zeros_like(a))
            new = part.ends.get(name, torch.zeros_like(part.alpha[name]))
            ends[name] = old.index_put((index,), new.to(old.dtype))
    return DualPoint(write(dual.alpha, part.alpha), write(dual.beta, part.beta), ends)


def _cast(answer: Answer, dtype: torch.dtype) -> Answer:
    """The answer in another floating type."""
    return replace(
        answer,
        dual=answer.dual.to(dtype),
        primal=answer.primal.to(dtype),
        lower=answer.lower.to(dtype),
        objective=answer.objective.to(dtype),
    )


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
    proved: Tensor
    """Whether a claim of INFEASIBLE has been proved already."""


def _solve(solver: Any, problems: Problems) -> _Claim:
    """Solve the problems example by example."""
    example = problems.example
    device = problems.rows.device
    if example is None:
        example = torch.arange(problems.count, device=device)
    maps = AffineMaps(problems.network)
    shapes = {name: h.before[0] for name, h in problems.hulls.items()}
    claim = _Claim(
        torch.zeros_like(problems.lower),
        {name: torch.zeros_like(like) for name, like in shapes.items()},
        {name: torch.zeros_like(like) for name, like in shapes.items()},
        torch.zeros(problems.count, dtype=torch.int8, device=device),
        torch.zeros(problems.count, dtype=torch.int64, device=device),
        torch.zeros(problems.count, dtype=torch.bool, device=device),
    )
    for one in example.unique():
        index = (example == one).nonzero()[:, 0]
        program = _export(problems.select(index[:1]), maps)
        c, _ = program.objective(problems.rows[index])
        dense = not hasattr(solver, "solve_sparse")
        found = (_solve_dense if dense else _solve_sparse)(solver, program, c)

        def take(values: np.ndarray, like: Tensor) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(like).reshape(-1, *like.shape[1:])

        claim.x[index] = take(found.primal[:, program.columns["input"]], claim.x)
        for name, like in shapes.items():
            claim.after[name][index] = take(found.primal[:, program.columns[f"post:{name}"]], like)
            # The rows are z - W y = b, with L = c.v + duals.(A v - b): the price has the other sign.
            claim.prices[name][index] = take(-found.duals[:, program.rows[f"affine:{name}"]], like)
        claim.status[index] = torch.from_numpy(found.status).to(claim.status)
        claim.iterations[index] = torch.from_numpy(found.iterations).to(claim.iterations)
        # The solvers of dense problems prove what they say before they say it.
        claim.proved[index] = dense
    return claim


def _export(one: Problems, maps: AffineMaps) -> NetworkLP:
    before = {name: Bounds(*h.before) for name, h in one.hulls.items()}
    return export(one.network, InputBox(one.lower, one.upper), before, upto=one.target, maps=maps)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Answers to k objectives over one polyhedron, as `SparseAnswer` has them."""

    primal: np.ndarray
    duals: np.ndarray
    status: np.ndarray
    iterations: np.ndarray


def _solve_sparse(solver: Any, program: NetworkLP, c: np.ndarray) -> _Rows:
    sides = (program.row_lower, program.row_upper, program.col_lower, program.col_upper)
    found = solver.solve_sparse(c, program.matrix, *sides)
    return _Rows(found.primal, found.duals, found.status, found.iterations)


def _solve_dense(solver: Any, program: NetworkLP, c: np.ndarray) -> _Rows:
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
    duals = torch.zeros(k, len(low), dtype=torch.float64)
    duals[:, equal] = found.equality
    count = int(above.sum())
    duals[:, above] += found.inequality[:, :count]
    duals[:, below] -= found.inequality[:, count:]
    return _Rows(found.primal.numpy(), duals.numpy(), found.status.numpy(), found.iterations.numpy())
