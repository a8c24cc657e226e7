"""Claims that a program has no optimum, believed where exact rays bear them out."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from optrelax.layers.programs.lp_data import LPData, ProgramSolver, stack_rows
from optrelax.layers.programs.rays import proves_infeasible, proves_unbounded
from optrelax.layers.programs.safe_bounds import keeps_constraints
from optrelax.layers.solutions import Status


def believed(
    solver: ProgramSolver,
    data: LPData,
    primal: Float[Tensor, "B n"],
    y: Float[Tensor, "B m"],
    v: Float[Tensor, "B p"],
    status: Int8[Tensor, " B"],
) -> Int8[Tensor, " B"]:
    """Statuses in which INFEASIBLE and UNBOUNDED are proved, and NUMERICAL says that a claim was not.

    (y, v) hold rays where INFEASIBLE is claimed, `primal` where UNBOUNDED is. Where a ray of descent is missing, the
    solver looks for the steepest in a box; where there is one, for a feasible point.
    """
    status = status.clone()
    index = (status == Status.INFEASIBLE).nonzero().squeeze(-1)
    if len(index):
        proved = proves_infeasible(data.select(index), y[index], v[index])
        status[index[~proved]] = Status.NUMERICAL
    open_ended = (data.lower.isinf() | data.upper.isinf()).any(-1) & (data.c != 0).any(-1)
    claimed = status == Status.UNBOUNDED
    index = ((claimed | (status == Status.NUMERICAL)) & open_ended).nonzero().squeeze(-1)
    status[claimed] = Status.NUMERICAL
    if len(index):
        status[index] = _descending(solver, data.select(index), primal[index], claimed[index], status[index])
    return status


def _descending(solver: ProgramSolver, data: LPData, ray: Tensor, claimed: Tensor, status: Tensor) -> Tensor:
    """UNBOUNDED where a ray of descent and a feasible point are found, INFEASIBLE where there is proved to be none."""
    status = status.clone()
    falls = claimed & proves_unbounded(data, ray)
    rest = (~falls).nonzero().squeeze(-1)
    if len(rest):
        some = data.select(rest)
        falls[rest] = proves_unbounded(some, solver.solve(_directions(some), None).primal)
    index = falls.nonzero().squeeze(-1)
    if len(index):
        some = data.select(index)
        # Interior points have no centre to go to where the feasible points have no end: the nearest to 0 is one point.
        P = torch.eye(data.size[1], device="cpu").to(data.c) if solver.quadratic else None
        found = solver.solve(replace(some, c=torch.zeros_like(some.c), P=P), None)
        feasible = keeps_constraints(some, found.primal.clamp(some.lower, some.upper), solver.tol)
        status[index[feasible]] = Status.UNBOUNDED
        status[index[found.status == Status.INFEASIBLE]] = Status.INFEASIBLE
    return status


def _directions(data: LPData) -> LPData:
    """The steepest direction of no more than a unit an entry in which every constraint holds for ever."""
    E = data.E if data.P is None else stack_rows(data.E, data.P)
    return LPData(
        c=data.c,
        A=data.A,
        b=torch.where(data.b == torch.inf, torch.inf, 0.0).to(data.b),
        E=E,
        d=data.c.new_zeros(len(data.c), E.shape[-2]),
        lower=torch.where(data.lower.isinf(), -1.0, 0.0).to(data.c),
        upper=torch.where(data.upper.isinf(), 1.0, 0.0).to(data.c),
    )
