"""Quadratic programs that interior points leave open, one by one: degenerate ones, and those without an optimum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from optrelax.layers.batched import join
from optrelax.layers.programs.claims import believed
from optrelax.layers.programs.highs import Highs, by_columns
from optrelax.layers.programs.highs_model import Model
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver, stack_rows
from optrelax.layers.solutions import Status

_SECONDS = 5.0  # HiGHS's method may cycle


@dataclass(frozen=True, slots=True)
class ActiveSet(ProgramSolver):
    """Convex quadratic programs by HiGHS's active-set method, on the CPU; what that fails on, by linear programs.

    For the few problems that `Auto` hands over. Where no point is found, HiGHS's simplex method looks for a Farkas ray,
    then for a ray along which the objective falls for ever.

    Args:
        tol: relative gap that counts as OPTIMAL.
        exact: solves the linear programs.

    Sound: yes, through the layer.  Exact: to `tol`, where its status is OPTIMAL.
    """

    tol: float = 1e-6
    exact: Highs = field(default_factory=Highs)
    quadratic: ClassVar[bool] = True

    @torch.no_grad()
    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems; a start is ignored."""
        host = data.detach().map(lambda tensor: tensor.double().cpu())
        found = join([self._one(host.select(slice(i, i + 1))) for i in range(host.size[0])])
        primal, y, v = (part.to(data.c.device) for part in (found.primal, found.inequality, found.equality))
        status, iterations = found.status.to(data.c.device), found.iterations.to(data.c.device)
        return Answer(primal, y, v, status, iterations).with_proofs()

    def _one(self, data: LPData) -> Answer:
        assert data.P is not None
        linear = replace(data, P=None)
        if not bool(data.P.any()):
            return self.exact.solve(linear, None)
        found = self._by_active_sets(data)
        if found.status.item() == Status.OPTIMAL:
            return found
        feasible = self.exact.solve(replace(linear, c=torch.zeros_like(data.c)), None)
        if feasible.status.item() == Status.INFEASIBLE:
            return feasible
        status = torch.full_like(found.status, int(Status.NUMERICAL))
        settled = believed(self.exact, data, found.primal, found.inequality, found.equality, status)
        return replace(found, status=settled)

    def _by_active_sets(self, data: LPData) -> Answer:
        from scipy.sparse import csc_matrix

        m = data.size[2]
        model = Model(1, self.exact.time_limit or _SECONDS)
        K = stack_rows(data.A, data.E)
        assert data.P is not None
        P = (data.P if data.P.dim() == 2 else data.P[0]).numpy()
        upper = torch.cat([data.b[0], data.d[0]]).numpy()
        lower = np.concatenate([np.full(m, -np.inf), data.d[0].numpy()])
        ends = (data.lower[0].numpy(), data.upper[0].numpy())
        model.load(by_columns(K if K.dim() == 2 else K[0]), lower, upper, *ends, csc_matrix(np.tril(P)))
        run = model.solve(data.c[0].numpy())

        def row(part: np.ndarray) -> Tensor:
            return torch.from_numpy(part).unsqueeze(0)

        duals, status = row(run.duals), torch.tensor([int(run.status)], dtype=torch.int8, device="cpu")
        count = torch.tensor([run.iterations], device="cpu")
        return Answer(row(run.primal), duals[:, :m].clamp(min=0), duals[:, m:], status, count).with_proofs()
