"""The reference: the linear program as a cvxpylayers layer, solved by SCS or Clarabel."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from optrelax.checks import require_choice, require_range
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver, binding, without_open_rows
from optrelax.layers.programs.rays import proves_infeasible, proves_unbounded
from optrelax.layers.solutions import Status

_Mask = tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Cvxpy(ProgramSolver):
    """cvxpylayers with Clarabel or SCS: conic solves on the CPU, differentiable through their KKT systems.

    INFEASIBLE and UNBOUNDED are checked by the solver's rays.  Iterations are not reported (-1).

    Args:
        solver: "CLARABEL" or "SCS".
        eps: the solver's own tolerance.
        layer: whether `.lower.backward()` is cvxpylayers' derivative of c.x* and `.primal` carries its derivative of
            the argmin: how generic layers do it, kept for comparison. At a degenerate vertex of an LP that KKT system
            is singular.
        tol: relative certified gap, and feasibility, that counts as OPTIMAL. 0 stands for 100 eps: a residual of eps in
            the duals costs eps times the size of the variables' bounds in a safe bound.
        workers: solves at a time; default one a core.

    Raises:
        ValueError: for another solver, and for an option out of range.

    Sound: yes, through the layer.  Exact: to about `eps`.
    Gradient: by default the layer's rule; with layer=True cvxpylayers' own.

    Example:
        >>> found = LinearProgram(Cvxpy())(torch.tensor([1.0, -1.0]), lower=torch.zeros(2), upper=torch.ones(2))
        >>> round(found.lower.item(), 4), Status(int(found.status)).name
        (-1.0, 'OPTIMAL')
    """

    solver: Literal["SCS", "CLARABEL"] = "CLARABEL"
    eps: float = 1e-9
    layer: bool = False
    tol: float = 0.0
    workers: int | None = None

    def __post_init__(self) -> None:
        require_choice("Cvxpy", "solver", self.solver, "SCS", "CLARABEL")
        require_range("Cvxpy", "> 0", eps=self.eps)
        require_range("Cvxpy", ">= 0", tol=self.tol)
        require_range("Cvxpy", ">= 1", optional=True, workers=self.workers)
        if self.tol == 0:
            object.__setattr__(self, "tol", 100 * self.eps)

    @property
    def differentiates(self) -> bool:
        """Whether gradients come from cvxpylayers."""
        return self.layer

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems; the conic solvers start afresh."""
        host = data.map(lambda tensor: tensor.double().cpu())
        limits = binding(host)
        host = without_open_rows(replace(host, b=limits))
        finite = torch.cat([host.lower.isfinite(), host.upper.isfinite()], -1)
        # A parametrised problem has fixed constraints: one layer for each set of finite bounds in the batch.
        patterns, which = finite.unique(dim=0, return_inverse=True)
        parts = []
        for number, pattern in enumerate(patterns):
            index = (which == number).nonzero().squeeze(-1)
            parts.append((index, self._solve_alike(host.select(index), pattern.tolist())))
        order = torch.cat([index for index, _ in parts]).argsort()
        primal, y, v, status = (torch.cat([part[i] for _, part in parts])[order] for i in range(4))
        y = torch.where(limits == torch.inf, 0.0, y)  # the least price of a side of 1e8 would cost the bound much
        objective = (data.c * primal.to(data.c)).sum(-1) if self.layer else None
        device = data.c.device
        return Answer(
            primal.to(device),
            y.detach().to(device),
            v.detach().to(device),
            status.to(device),
            torch.full_like(status, -1, dtype=torch.int64).to(device),
            objective,
        ).with_proofs()

    def _solve_alike(self, data: LPData, finite: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(primal, y, v, status) of problems with the same finite bounds."""
        _, n, m, p = data.size
        if m + p == 0 and not any(finite):
            free = torch.where((data.c != 0).any(-1), int(Status.UNBOUNDED), int(Status.OPTIMAL))
            return torch.zeros_like(data.c), data.b, data.d, free.to(torch.int8)
        layer = _layer(n, m, p, tuple(finite[:n]), tuple(finite[n:]))
        primal, y, v = self._run(layer, data, finite)
        point, duals = primal.detach(), torch.cat([y, v], -1).detach()
        status = _claims(data.detach(), point, y.detach(), v.detach())
        failed = status != Status.OPTIMAL
        if bool(failed.any()) and primal.requires_grad:
            # A failed problem has NaN derivatives, which would reach the data that it shares: leave it out.
            good = (~failed).nonzero().squeeze(-1)
            primal = torch.zeros_like(point)
            if len(good):
                primal = primal.index_copy(0, good, self._run(layer, data.select(good), finite)[0])
        held = failed.unsqueeze(-1)
        duals = torch.where(held, 0.0, duals)
        return torch.where(held, 0.0, primal), duals[:, :m], duals[:, m:], status

    def _run(self, layer: Any, data: LPData, finite: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        size, n, m, p = data.size
        below = torch.tensor(finite[:n], device="cpu")
        above = torch.tensor(finite[n:], device="cpu")
        values = [data.c]
        values += [data.A, data.b] if m else []
        values += [data.E, data.d] if p else []
        values += [data.lower[:, below]] if bool(below.any()) else []
        values += [data.upper[:, above]] if bool(above.any()) else []
        with warnings.catch_warnings(), torch.set_grad_enabled(self.layer and torch.is_grad_enabled()):
            # "Solved/Inaccurate": the layer's certificate says how far.
            warnings.simplefilter("ignore")
            wanted = torch.is_grad_enabled() and any(value.requires_grad for value in values)
            primal, *duals = layer(*values, solver_args=self._solver_args(backward=wanted))
        y = duals.pop(0) if m else primal.new_zeros(size, 0)
        v = duals.pop(0) if p else primal.new_zeros(size, 0)
        return primal, y, v

    def _solver_args(self, backward: bool) -> dict[str, object]:
        jobs = -1 if self.workers is None else self.workers
        names = ("eps",) if self.solver == "SCS" else ("tol_gap_abs", "tol_gap_rel", "tol_feas")
        args: dict[str, object] = dict.fromkeys(names, self.eps)
        # Without this one failure fails the whole batch.
        args |= {"solve_method": self.solver, "n_jobs_forward": jobs, "raise_on_error": False}
        return args | ({"n_jobs_backward": jobs} if backward else {})


def _claims(data: LPData, primal: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Statuses, which cvxpylayers does not tell: solvers return rays or NaN in place of a solution, [B]."""
    status = torch.full((len(primal),), Status.OPTIMAL, dtype=torch.int8, device="cpu")
    status[~torch.cat([primal, y, v], -1).isfinite().all(-1)] = Status.NUMERICAL
    status[proves_unbounded(data, primal)] = Status.UNBOUNDED
    status[proves_infeasible(data, y, v)] = Status.INFEASIBLE
    return status


@lru_cache(maxsize=64)
def _layer(n: int, m: int, p: int, below: _Mask, above: _Mask) -> object:
    """The parametrised problem of one shape; its outputs are x and the multipliers of the rows there are."""
    import cvxpy as cp
    import numpy as np
    from cvxpylayers.torch import CvxpyLayer

    x, c = cp.Variable(n), cp.Parameter(n)
    parameters, constraints = [c], []
    for rows, sense in ((m, "<="), (p, "==")):
        if rows:
            matrix, side = cp.Parameter((rows, n)), cp.Parameter(rows)
            parameters += [matrix, side]
            constraints.append(matrix @ x <= side if sense == "<=" else matrix @ x == side)
    outputs = [x, *(constraint.dual_variables[0] for constraint in constraints)]
    for mask, sense in ((below, ">="), (above, "<=")):
        index = np.flatnonzero(mask)
        if len(index):
            side = cp.Parameter(len(index))
            parameters.append(side)
            constraints.append(x[index] >= side if sense == ">=" else x[index] <= side)
    return CvxpyLayer(cp.Problem(cp.Minimize(c @ x), constraints), parameters, outputs)
