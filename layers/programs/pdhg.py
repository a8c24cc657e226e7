"""A batched first-order LP solver in plain torch: restarted, reflected Halpern primal-dual hybrid gradient.

One step needs one product with K = [A; E] and one with its transpose, for the whole batch at once:

    x+ = box(x - tau (c + K^T s)),   s+ = cone(s + sigma (K (2 x+ - x) - q)),   z <- w (2 z+ - z) + (1 - w) z_anchor

with multipliers s = (y, v), sides q = (b, d), w = (k + 1) / (k + 2), k steps since the anchor. The matrix is
equilibrated first. Restarts move the anchor when the fixed-point error has fallen enough, and rebalance tau against
sigma.
Sources: Applegate et al. 2021 (PDLP), Lu & Yang 2024 (reflected restarted Halpern PDHG), Lu, Peng & Yang 2025 (cuPDLPx:
the restart rule and the controller of the primal weight), Applegate et al. 2024 (certificates from diverging iterates).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optrelax.checks import require_choice, require_range
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.programs.pdhg_steps import Best, Iterate, Scaled, take
from optrelax.layers.programs.rays import proves_infeasible, proves_unbounded
from optrelax.layers.solutions import Status

_RUNNING = -1


@dataclass(frozen=True, slots=True)
class PDHG(ProgramSolver):
    """Restarted primal-dual hybrid gradient for whole batches, on the device and in the dtype of the data.

    Each problem stops by itself and leaves the batch.  Deterministic.  Warm start: yes.
    INFEASIBLE is shown by a Farkas ray (a proof where the variables' bounds are finite), UNBOUNDED by a ray and a point
    feasible to `tol`.

    Args:
        tol: relative gap and feasibility, both.
        max_iterations: of each problem.
        check_every: iterations between looks at the stopping rule and at the restart rule; the first looks come
            earlier, after 0, 1, 2, 4, ... iterations, and iterations after the last look are not made.
        restart: "adaptive", or "never" (for measurements).

    Raises:
        ValueError: for an option out of range.

    Sound: yes, through the layer; the multipliers kept are those of the best safe bound among the points looked at, so
    more iterations or a smaller `tol` never loosen it.  Exact: to `tol`; float32 reaches about 1e-4.

    Example:
        >>> c, A, b = torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.ones(1, 2).double(), torch.ones(1).double()
        >>> found = LinearProgram(PDHG(tol=1e-4))(c, A, b, lower=0 * c, upper=0 * c + 1)
        >>> round(found.lower.item(), 3)
        -2.0
    """

    tol: float = 1e-6
    max_iterations: int = 100_000
    check_every: int = 40
    restart: Literal["adaptive", "never"] = "adaptive"
    sparse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_range("PDHG", "> 0", tol=self.tol)
        require_range("PDHG", ">= 0", max_iterations=self.max_iterations)
        require_range("PDHG", ">= 1", check_every=self.check_every)
        require_choice("PDHG", "restart", self.restart, "adaptive", "never")

    @torch.no_grad()
    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems, from `start` or from the point of the box nearest 0 with zero multipliers."""
        if data.size[2] + data.size[3] == 0:
            return _bounds_only(data)
        # Somewhat below tol, so that the layer's own evaluation agrees.
        tol = 0.9 * self.tol
        scaled = Scaled.of(data)
        state = Iterate.begin(scaled, start)
        run = _PDHGSolve(data, scaled, state, Best.begin(scaled, state))
        run.look(tol)
        # Looks come at fixed iterations, whatever the limit: a larger limit only adds looks.
        while (following := run.done + min(max(run.done, 1), self.check_every)) <= self.max_iterations:
            if len(run.alive) == 0:
                break
            run.advance(following, restart=self.restart == "adaptive")
            run.look(tol)
        run.put_away(torch.full_like(run.alive, Status.ITERATION_LIMIT))
        return run.answer()


def _bounds_only(data: LPData) -> Answer:
    """Problems without rows: each variable goes to the bound that its cost points to, 0 or the nearest without cost."""
    end = torch.where(data.c > 0, data.lower, data.upper)
    x = torch.where((data.c == 0) | end.isinf(), torch.zeros_like(end).clamp(data.lower, data.upper), end)
    falls = ((data.c != 0) & end.isinf()).any(-1)
    status = torch.where(falls, int(Status.UNBOUNDED), int(Status.OPTIMAL)).to(torch.int8)
    return Answer(x, data.b, data.d, status, torch.zeros_like(status, dtype=torch.int64)).with_proofs()


class _PDHGSolve:
    """One solve: the problems still running, and the answers of those that have finished."""

    def __init__(self, data: LPData, scaled: Scaled, state: Iterate, best: Best) -> None:
        self.data = data
        self.scaled, self.state, self.best = scaled, state, best
        self.alive = torch.arange(data.size[0], device=data.c.device)
        self.done = 0
        self.primal, self.duals = torch.zeros_like(best.x), torch.zeros_like(best.s)
        self.status = torch.zeros(data.size[0], dtype=torch.int8, device=data.c.device)
        self.iterations = torch.zeros_like(self.alive)

    def advance(self, until: int, restart: bool) -> None:
        """Iterate; the restart rule is looked at once, at the end."""
        before = self.state.error
        self.state = self.state.advance(self.scaled, until - self.done)
        self.done = until
        if restart:
            self.state = self.state.restarted(self.done, before)

    def look(self, tol: float) -> None:
        """Keep the best points and put away the problems that have finished."""
        self.best = self.best.improved(self.scaled, self.state, tol)
        status = torch.full_like(self.alive, _RUNNING)
        status[~self.state.finite()] = Status.NUMERICAL
        status[self.best.converged(tol)] = Status.OPTIMAL
        if self.done:
            self._look_for_rays(status, tol)
        if bool((status != _RUNNING).any()):
            self.put_away(status)

    def put_away(self, status: Tensor) -> None:
        """Store the problems whose status is set and go on with the others."""
        index = (status != _RUNNING).nonzero().squeeze(-1)
        where = self.alive[index]
        self.primal[where] = self.best.x[index] * self.scaled.columns[index]
        self.duals[where] = self.best.s[index] * self.scaled.rows[index]
        self.status[where] = status[index].to(torch.int8)
        self.iterations[where] = self.done
        rest = (status == _RUNNING).nonzero().squeeze(-1)
        self.alive = self.alive[rest]
        self.scaled, self.best = take(self.scaled, rest), take(self.best, rest)
        self.state = take(self.state, rest)

    def answer(self) -> Answer:
        """All answers, in the original units and order."""
        m = self.data.b.shape[1]
        y, v = self.duals[:, :m], self.duals[:, m:]
        return Answer(self.primal, y, v, self.status, self.iterations).with_proofs()

    def _look_for_rays(self, status: Tensor, tol: float) -> None:
        """Set INFEASIBLE and UNBOUNDED where the iterates' displacement since the anchor, or the iterate, is a ray."""
        scaled, state = self.scaled, self.state
        for ray in (state.step_s - state.anchor_s, state.step_s):
            ray = scaled.cone(ray)
            value, _ = scaled.dual_value(ray, scaled.push(ray), 0.0)
            # A cheap necessary sign first; the proof is evaluated on the few that show it.
            index = ((value > 0) & (status == _RUNNING)).nonzero().squeeze(-1)
            if len(index):
                some, s = self.data.select(self.alive[index]), (ray * scaled.rows)[index]
                proved = proves_infeasible(some, s[:, : scaled.m], s[:, scaled.m :])
                status[index[proved]] = Status.INFEASIBLE
        falls = ((state.step_x - state.anchor_x) * scaled.c).sum(-1) < 0
        open_ended = (scaled.implied_l.isinf() | scaled.implied_u.isinf()).any(-1)
        candidate = falls & open_ended & (self.best.violation <= tol) & (status == _RUNNING)
        index = candidate.nonzero().squeeze(-1)
        if len(index):
            ray = ((state.step_x - state.anchor_x) * scaled.columns)[index]
            proved = proves_unbounded(self.data.select(self.alive[index]), ray)
            status[index[proved]] = Status.UNBOUNDED
