"""Exact answers for small networks: mixed-integer programs solved by HiGHS.

What a MILP solver claims is not a certificate: its tolerances and its search are taken on trust. Its counterexamples
are: they are replayed through the network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optrelax.checks import require_range
from optrelax.frozen import filled
from optrelax.layers.affine_maps import AffineMaps
from optrelax.layers.network_lp import NetworkLP, export
from optrelax.layers.programs.highs_model import new_highs
from optrelax.networks.graph import Network
from optrelax.regions import Region, require_polyhedron
from optrelax.relaxations import resolve_bound, with_rounding

if TYPE_CHECKING:
    import highspy

__all__ = ["Milp", "MilpAnswer"]


@dataclass(frozen=True, slots=True, eq=False)
class MilpAnswer:
    """What the solver says about the rows of one example, and the point that its network replayed."""

    lower: Tensor
    """Claimed lower bound of each row, float64 [k]; -inf where a row was not settled in time or not asked."""
    upper: Tensor
    """Value of each row at the best point found for it, evaluated by the network, float64 [k]; inf without one."""
    point: Tensor | None
    """Point of the region at which the smallest of `upper` is attained, [*input_shape]."""
    message: str
    """What was left open, or empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Milp:
    """HiGHS on the exact mixed-integer formulation, one example and row at a time, in float64 on the CPU.

    Args:
        time_limit: seconds an example, all rows together.
        threads: of the solver.
        preactivation: a relaxation whose pre-activation bounds make the big-M constants: the tighter, the faster.

    Raises:
        ValueError: for an option out of range, and for an estimate as preactivation.

    Sound: no certificate (see the module).  Exact: to HiGHS's tolerances (1e-9) where the time suffices.
    Source: Tjeng, Xiao and Tedrake 2019.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> report = ox.certify(net, (x, net(x).argmax(1)), eps=0.003, relaxation="box", exact=Milp(time_limit=10.0))
        >>> report.certified, report.certified_milp
        (0.0, 1.0)
    """

    time_limit: float = 60.0
    threads: int = 1
    preactivation: Any = "crown"

    def __post_init__(self) -> None:
        require_range("Milp", "> 0 seconds", time_limit=self.time_limit)
        require_range("Milp", ">= 1", threads=self.threads)
        filled(self, preactivation=resolve_bound("Milp", self.preactivation))

    def minima(self, network: Network, region: Region, rows: Tensor) -> MilpAnswer:
        """Least value of each row over the region of one example: lower and upper meet where the time suffices.

        region: a batch of one.  rows [1, k, *output_shape].
        """
        return self._solve(network, region, rows, range(rows.shape[1]), sign=False)

    def decide(self, network: Network, region: Region, rows: Tensor, order: Sequence[int] | None = None) -> MilpAnswer:
        """Settle the signs alone: each row until it is > 0 by the solver's claim, ended by the first row <= 0.

        order: in which the rows are tried, the most doubtful first; default as given.
        """
        return self._solve(network, region, rows, order if order is not None else range(rows.shape[1]), sign=True)

    def _solve(self, network: Network, region: Region, rows: Tensor, order: Sequence[int], *, sign: bool) -> MilpAnswer:
        deadline, network = time.monotonic() + self.time_limit, network.lowered
        require_polyhedron("Milp", region, "the layers bound over any region")
        exact = region.detach().to(torch.float64)
        with torch.no_grad():
            before = with_rounding(self.preactivation, "outward").preactivation_bounds(network, exact)
            program = export(network, exact, before, integer=True, maps=AffineMaps(network))
            costs, offsets = program.objective(rows[0].double())
        search = _MilpSearch(network, exact, rows[0].detach().double().reshape(rows.shape[1], -1), program)
        lower = torch.full((rows.shape[1],), -torch.inf, dtype=torch.float64, device="cpu")
        open_rows = []
        for row in order:
            left = deadline - time.monotonic()
            if left > 0:
                lower[row] = search.run(row, costs[row], float(offsets[row]), left, self.threads, sign)
            if sign and float(search.upper[row]) <= 0:
                return MilpAnswer(lower, search.upper, search.point, "")
            reached = float(search.upper[row]) - float(lower[row]) <= 1e-6 * max(1.0, abs(float(search.upper[row])))
            settled = lower[row] > 0 if sign else reached and math.isfinite(lower[row])
            if not settled:
                open_rows.append(row)
        return MilpAnswer(lower, search.upper, search.point, self._message(open_rows, deadline))

    def _message(self, rows: Sequence[int], deadline: float) -> str:
        if not rows:
            return ""
        why = f"time limit of {self.time_limit:g} s" if time.monotonic() >= deadline else "solver's tolerance"
        return f"MILP left {len(rows)} row(s) open ({why})"


@dataclass
class _MilpSearch:
    """One example's program, and the best points found in it."""

    network: Network
    region: Region
    rows: Tensor
    program: NetworkLP
    point: Tensor | None = None
    upper: Tensor = field(init=False)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.upper = torch.full((len(self.rows),), torch.inf, dtype=torch.float64, device="cpu")

    def run(self, row: int, cost: np.ndarray, offset: float, seconds: float, threads: int, sign: bool) -> float:
        """Claimed lower bound of a row; improving points go to `upper` and `point` on the way."""
        import highspy

        solver = new_highs()
        solver.setOptionValue("threads", threads)
        solver.setOptionValue("time_limit", seconds)
        # The default drops entries below 1e-9, which is another problem.
        solver.setOptionValue("small_matrix_value", 1e-12)
        for name in ("mip_feasibility_tolerance", "primal_feasibility_tolerance", "dual_feasibility_tolerance"):
            solver.setOptionValue(name, 1e-9)
        solver.setOptionValue("mip_rel_gap", 0.0 if sign else 1e-7)
        solver.setOptionValue("mip_abs_gap", 1e-9)
        if solver.passModel(self.program.highs_model(cost, offset)) == highspy.HighsStatus.kError:
            return -math.inf
        self._watch(solver, row, sign)
        solver.run()
        if self.interrupted:
            raise KeyboardInterrupt
        return self._claim(solver, row)

    def _watch(self, solver: highspy.Highs, row: int, sign: bool) -> None:
        """Replay every improving point, and stop once the sign is known."""

        def guarded(event: Any, act: Any) -> None:
            # A Ctrl-C that arrives in here must not unwind through the solver's frames.
            try:
                if self.interrupted or act(event):
                    event.interrupt()
            except KeyboardInterrupt:
                self.interrupted = True
                event.interrupt()

        def improved(event: Any) -> bool:
            self._replay(np.array(event.data_out.mip_solution), row)
            return sign and float(self.upper[row]) <= 0

        def enough(event: Any) -> bool:
            return sign and (event.data_out.mip_dual_bound > 0 or float(self.upper[row]) <= 0)

        solver.cbMipImprovingSolution.subscribe(lambda event: guarded(event, improved))
        solver.cbMipInterrupt.subscribe(lambda event: guarded(event, enough))

    def _claim(self, solver: highspy.Highs, row: int) -> float:
        import highspy

        status, info = solver.getModelStatus(), solver.getInfo()
        solution = solver.getSolution()
        if solution.value_valid:
            self._replay(np.array(solution.col_value), row)
        if self.program.integer.any():
            # The region is never empty, so a claim of infeasibility is a numerical failure.
            failed = status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kSolveError)
            bound = -math.inf if failed else float(info.mip_dual_bound)
            return bound if bound < math.inf else -math.inf
        optimal = status == highspy.HighsModelStatus.kOptimal
        return float(info.objective_function_value) if optimal else -math.inf

    def _replay(self, values: np.ndarray, row: int) -> None:
        """Evaluate the network at the input part of a solution, moved into the region."""
        part = values[self.program.columns["input"]]
        if part.shape != (self.region.center[0].numel(),) or not np.isfinite(part).all():
            return
        with torch.no_grad():
            x = self.region.project(torch.from_numpy(part).to(self.region.like).reshape(self.region.shape))
            value = float(self.network(x).flatten().cpu() @ self.rows[row].cpu())
        if value < float(self.upper.min()):
            self.point = x[0]
        self.upper[row] = min(float(self.upper[row]), value)
