"""What the points of a solver are worth: the one place where bounds, gaps and statuses of network LPs are made.

A dual point with weights in [0, 1] is a bound whoever found it, and a primal point pushed through the hulls is feasible
whoever found it. So a solver that errs, or lies, can be loose and never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.layers.batched import Batched
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.prices import beyond_bounds, in_float64, proves_contradiction
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems, Weights
from optrelax.layers.solutions import Status
from optrelax.layers.sweeps import Backward, Feasible, backward_sweep, dual_value, primal_sweep
from optrelax.rounding import Rounding, cast_down, unit_roundoff

_FORGIVEN = 16
"""Unit roundoffs that a point may lie beyond a given pre-activation bound at no cost."""
_LARGEST = 1e-6
"""The most that a solver's points may lie beyond such a bound, charged at its multiplier."""


@dataclass(frozen=True, slots=True)
class Evaluation(Batched):
    """Points of R problems in the region, the hulls and [0, 1], and what they show."""

    dual: DualPoint
    primal: PrimalPoint
    lower: Tensor
    """Dual value at `dual`, rounded as asked; -inf where it overflows or the problem contradicts itself."""
    objective: Tensor
    """Objective of `primal`; inf where that is not feasible."""
    status: Tensor
    iterations: Tensor
    back: Backward | None = None
    """The sweeps of both points in the problems' type, where they were made: a gradient rule needs them once more."""
    feasible: Feasible | None = None

    @property
    def gap(self) -> Tensor:
        """Absolute; inf without a bound or a feasible point."""
        return self.objective - self.lower

    def points_alone(self) -> Evaluation:
        """Without the sweeps, whose memory is many times that of the points."""
        return replace(self, back=None, feasible=None)


def solved(
    solver: NetworkSolver,
    problems: Problems,
    starts: Sequence[DualPoint],
    *,
    rounding: Rounding = "nearest",
    implied: bool = True,
) -> Evaluation:
    """A solver's points for R problems, evaluated; options as for `evaluate`."""
    with torch.no_grad():
        points = solver.solve(problems, starts)
        return evaluate(
            problems,
            points,
            solver.tol,
            start=starts[0],
            rounding=rounding,
            implied=implied,
            feasibility=solver.feasibility,
            owner=type(solver).__name__,
        )


def solved_after(
    solver: NetworkSolver,
    problems: Problems,
    starts: Sequence[DualPoint],
    earlier: Points,
    *,
    rounding: Rounding = "nearest",
) -> Evaluation:
    """The points of an earlier solve, where they show an optimum; elsewhere the solver's, as by `solved`."""
    with torch.no_grad():
        earlier = earlier.to(problems.rows.dtype)
        found = evaluate(problems, earlier, solver.aim, start=starts[0], rounding=rounding, owner="start")
        left = (found.status != Status.OPTIMAL).nonzero()[:, 0]
        if len(left) == 0:
            return found
        rest = solved(solver, problems.select(left), [s.select(left) for s in starts], rounding=rounding)
        return found.points_alone().put(left, rest.points_alone())


def evaluate(
    problems: Problems,
    points: Points,
    tol: float,
    *,
    start: DualPoint | None = None,
    rounding: Rounding = "nearest",
    implied: bool = True,
    feasibility: float = 0.0,
    owner: str = "solver",
) -> Evaluation:
    """Bound, gap and status of every problem's points: all that is believed of a solver.

    start: in place of dual points that are no numbers.  implied: whether the LP implies its pre-activation bounds;
    else they are constraints, which a primal point has to keep to `feasibility`.  owner: who is named in errors.
    Sound: yes, for any points.  Outward, in real arithmetic, evaluated in float64 and rounded down.
    OPTIMAL is a gap within tol * max(1, |lower|) as reported, INFEASIBLE a proof that the bounds contradict each other.
    Raises ValueError for points of other shapes than the problems'.
    """
    _require_shapes(owner, problems, points)
    dtype = problems.rows.dtype
    wide = torch.float64 if rounding == "outward" else torch.promote_types(dtype, points.primal.x.dtype)
    exact = problems if wide == dtype else in_float64(problems)
    dual, back, lower = _bounded(exact, _admitted(points.dual, wide), start, rounding)
    primal, feasible = _attained(exact, points.primal.to(wide))
    objective = feasible.objective
    if not implied:
        allowed = max(min(feasibility, _LARGEST), _FORGIVEN * unit_roundoff(dtype))
        objective = objective + beyond_bounds(exact, feasible, dual, allowed)
    lower = cast_down(lower, dtype) if rounding == "outward" else lower.to(dtype)
    # What overflows is no bound.
    lower = torch.where(lower.isfinite(), lower, -torch.inf)
    objective = objective.to(dtype)
    # What lies below a bound by more than rounding has lost its digits: it shows no optimum.
    lost = lower - objective > tol * lower.abs().clamp_min(1)
    objective = torch.where(objective.isfinite() & ~lost, objective, torch.inf)
    optimal = _within(tol, lower, objective)
    status = torch.where(optimal, int(Status.OPTIMAL), _reasons(points, lower, lost)).to(torch.int8)
    if rounding == "outward" and not bool(optimal.all()):
        status = _too_wide(exact, dual, objective, tol, status)
    if not implied and points.rays is not None and points.reason is not None:
        proved = _contradictions(problems, points.reason, points.rays)
        status = torch.where(proved, int(Status.INFEASIBLE), status).to(torch.int8)
        lower, objective = torch.where(proved, -torch.inf, lower), torch.where(proved, torch.inf, objective)
    found = Evaluation(dual.to(dtype), primal.to(dtype), lower, objective, status, points.iterations)
    return replace(found, back=back, feasible=feasible) if wide == dtype and back is not None else found


def best_dual(problems: Problems, duals: Sequence[DualPoint]) -> tuple[DualPoint, Backward]:
    """Problem by problem the dual point with the greatest bound, and its sweep."""
    best, back = duals[0], backward_sweep(problems, duals[0])
    for other in duals[1:]:
        found = backward_sweep(problems, other)
        better = (found.value > back.value) | back.value.isnan()
        best, back = other.where(better, best), found.where(better, back)
    return best, back


def best_points(problems: Problems, first: Points, second: Points) -> Points:
    """The better dual and the better primal point of two, problem by problem; counts are the second's."""
    dual, _ = best_dual(problems, [first.dual, second.dual])
    mine, other = (primal_sweep(problems, points.primal).objective for points in (first, second))
    return replace(second, dual=dual, primal=first.primal.where(~(other < mine) & ~mine.isnan(), second.primal))


# --- points -------------------------------------------------------------------------------------------------------


def _require_shapes(owner: str, problems: Problems, points: Points) -> None:
    """ValueError that names the first part of the points that does not fit."""
    shapes = {name: h.free.shape for name, h in problems.hulls.items()}
    two = {name: shapes[name] for name, h in problems.hulls.items() if h.above1 is not None}
    count = problems.region.shape[:1]
    parts: list[tuple[str, Weights, dict[str, torch.Size]]] = [
        ("lower weights (dual.alpha)", points.dual.alpha, shapes),
        ("upper weights (dual.beta)", points.dual.beta, two),
        ("multipliers (dual.ends)", points.dual.ends, {n: s for n, s in shapes.items() if n in points.dual.ends}),
        ("fractions (primal.tau)", points.primal.tau, shapes),
        ("input (primal.x)", {"": points.primal.x}, {"": problems.region.shape}),
        ("iterations", {"": points.iterations}, {"": count}),
        ("rays", points.rays or {}, shapes if points.rays else {}),
        ("reason", {} if points.reason is None else {"": points.reason}, {} if points.reason is None else {"": count}),
    ]
    for part, given, wanted in parts:
        for name in sorted(given.keys() | wanted.keys()):
            where = f"{owner}: {part}" + (f" of activation {problems.network[name].path!r}" if name in shapes else "")
            if name not in wanted:
                raise ValueError(f"{where} are not asked for, got {name!r}; return those of {sorted(wanted)}")
            if name not in given:
                raise ValueError(f"{where} are missing, wanted {tuple(wanted[name])}")
            if given[name].shape != wanted[name]:
                raise ValueError(f"{where}: wanted {tuple(wanted[name])}, got {tuple(given[name].shape)}")


def _admitted(dual: DualPoint, dtype: torch.dtype) -> DualPoint:
    """Weights in [0, 1]; what is no number stays so, and makes the bound none."""
    given = dual.to(dtype)
    alpha, beta = ({n: w.clamp(0, 1) for n, w in part.items()} for part in (given.alpha, given.beta))
    return DualPoint(alpha, beta, given.ends)


def _bounded(
    problems: Problems, dual: DualPoint, start: DualPoint | None, rounding: Rounding
) -> tuple[DualPoint, Backward | None, Tensor]:
    """The dual points, `start`'s where they make no bound; their sweep to nearest; and their bounds, [R]."""
    back = backward_sweep(problems, dual) if rounding == "nearest" else None
    lower = _outward(problems, dual) if back is None else back.value
    lost = ~lower.isfinite()
    if start is not None and bool(lost.any()):
        index = lost.nonzero()[:, 0]
        some, other = problems.select(index), _admitted(start.select(index), problems.rows.dtype)
        dual = dual.put(index, other)
        if back is None:
            return dual, None, lower.index_put((index,), _outward(some, other))
        back = back.put(index, backward_sweep(some, other))
        lower = back.value
    return dual, back, lower


def _outward(problems: Problems, dual: DualPoint) -> Tensor:
    before = {name: Bounds.known(*h.before) for name, h in problems.hulls.items() if h.before}
    return dual_value(problems, dual, "outward", before)


def _attained(problems: Problems, point: PrimalPoint) -> tuple[PrimalPoint, Feasible]:
    """The points brought into region and hulls, some point of these in place of what is no number; their sweep."""
    x = problems.region.into_hull(point.x)
    point = PrimalPoint(x, {n: t.clamp(0, 1) for n, t in point.tau.items()})
    feasible = primal_sweep(problems, point)
    lost = feasible.objective.isnan()
    if bool(lost.any()):
        index = lost.nonzero()[:, 0]
        some = problems.select(index)
        any_ = PrimalPoint(some.region.center, {n: torch.zeros_like(t[index]) for n, t in point.tau.items()})
        point, feasible = point.put(index, any_), feasible.put(index, primal_sweep(some, any_))
    return point, feasible


# --- statuses -----------------------------------------------------------------------------------------------------


def _within(tol: float, lower: Tensor, objective: Tensor) -> Tensor:
    near = objective - lower <= tol * lower.abs().clamp_min(1)
    return near & _ordinary(lower) & objective.isfinite()


def _ordinary(lower: Tensor) -> Tensor:
    """False where two such values added would overflow: no optimum is claimed there."""
    return lower.abs() <= torch.finfo(lower.dtype).max / 2


def _reasons(points: Points, lower: Tensor, lost: Tensor) -> Tensor:
    """Why a problem is not OPTIMAL, as far as a solver is believed: a claim that its points do not bear out is none."""
    reason = torch.full_like(points.iterations, int(Status.ITERATION_LIMIT)) if points.reason is None else points.reason
    honest = (reason == Status.ITERATION_LIMIT) | (reason == Status.TIME_LIMIT)
    return torch.where(honest & _ordinary(lower) & ~lost, reason, int(Status.NUMERICAL))


def _too_wide(problems: Problems, dual: DualPoint, objective: Tensor, tol: float, status: Tensor) -> Tensor:
    """NUMERICAL where the gap is closed but for the allowance for rounding: no solver could close it."""
    index = (status != Status.OPTIMAL).nonzero()[:, 0]
    nearest = backward_sweep(problems.select(index), dual.select(index)).value
    wide = _within(tol, nearest, objective[index].to(nearest))
    return status.index_put(
        (index[wide],), torch.tensor(int(Status.NUMERICAL), dtype=status.dtype, device=status.device)
    )


def _contradictions(problems: Problems, reason: Tensor, rays: Weights) -> Tensor:
    """Which claims of INFEASIBLE their rays prove, [R]."""
    claimed = reason == Status.INFEASIBLE
    index = claimed.nonzero()[:, 0]
    if not index.numel():
        return claimed
    some = in_float64(problems.select(index))
    own = {name: ray[index].to(some.rows) for name, ray in rays.items()}
    proof = proves_contradiction(some, own, unit_roundoff(problems.rows.dtype))
    return claimed.index_put((index,), proof)
