"""The mixed-integer linear-program layer, by HiGHS's branch and bound."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from optrelax.checks import require_range
from optrelax.cores import usable_cores
from optrelax.layers.programs import arguments
from optrelax.layers.programs.argmin import PrimalGradient
from optrelax.layers.programs.gomory import root_cuts
from optrelax.layers.programs.highs_model import new_highs
from optrelax.layers.programs.linear_program import LinearProgram
from optrelax.layers.programs.lp_data import LPData, stack_rows
from optrelax.layers.programs.modelled import integers_of
from optrelax.layers.solutions import LPSolution, Status, require_optimal
from optrelax.rounding import Rounding

_WHOLE = 1e-9  # what an integer may be off


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MIPSolution(LPSolution):
    """An integer point of each problem, and what is known below it.

    `lower` is the safe bound of the linear relaxation: it holds for the integer program, and is all that is proved.
    `gap` is `value` - `lower`. `inequality` and `equality` are the multipliers of the program with the integers held.

    Sound: `lower`; `claimed` is the solver's word.  Gradient: by the rules of the `MixedIntegerProgram` that made it.

    Example:
        >>> layer, two = MixedIntegerProgram(integer=[True, True]), 2 * torch.ones(2)
        >>> found = layer(torch.tensor([-1.0, -1.0]), torch.ones(1, 2), torch.tensor([1.5]), lower=0 * two, upper=two)
        >>> found.value.item(), round(found.lower.item(), 3)  # the relaxation reaches -1.5
        (-1.0, -1.5)
    """

    value: Float[Tensor, "*batch"] | None = None
    """Objective of the integer point; inf without one. Its gradient is that of the program with the integers held."""
    claimed: Float[Tensor, "*batch"] | None = None
    """HiGHS's own lower bound by branch and bound: taken on trust, no certificate."""


class MixedIntegerProgram(LinearProgram):
    """min c.x subject to A x <= b, E x = d, lower <= x <= upper, x_j an integer where `integer`; any leading shape.

    Args:
        integer: mask [n] of booleans.
        solver: of the linear relaxation, as for `LinearProgram`.
        cuts: Gomory's, of the relaxation that `primal_gradient` differentiates.
        time_limit: seconds a problem; None: no limit.
        mip_gap: HiGHS's own relative gap that counts as OPTIMAL.
        workers: problems at a time; None: one a core.
        rounding: as for `LinearProgram`.
        primal_gradient: as for `LinearProgram`.
        throw: as for `LinearProgram`.

    Raises:
        TypeError: as `LinearProgram`, and for an `integer` that is no mask.
        ValueError: as `LinearProgram`, and for an option out of range.

    Sound: `lower` is the safe bound of the linear relaxation; `claimed`, HiGHS's bound, is no certificate.
    Status: OPTIMAL where HiGHS closed its own gap (`mip_gap`), TIME_LIMIT where it ran out of `time_limit` seconds a
    problem (`value` is inf where it found no point by then); INFEASIBLE, UNBOUNDED and NUMERICAL likewise by its word,
    but for what is proved of the relaxation: that it is infeasible, or a finite bound.
    Gradient: of `value` with the integers held, which is exact wherever the optimal integers are unique; of `primal`
    by `primal_gradient`, such as `Regularised(strength)`: that of the linear relaxation with Gomory's cuts at the root,
    whose optimum is often the integer point. It is a surrogate, since the integer argmin is piecewise constant; the
    cuts' coefficients are held fixed. `lower` has the plain relaxation's gradient.
    Source: Ferber et al. 2020 (MIPaaL), whose regularisation is the same; the cuts: see `gomory`.

    Example:
        >>> weights, limit = torch.tensor([[3.0, 4.0, 5.0]]), torch.tensor([7.0])  # a knapsack
        >>> values = torch.tensor([4.0, 5.0, 6.0])
        >>> layer = MixedIntegerProgram(integer=[True] * 3)
        >>> layer(-values, weights, limit, lower=torch.zeros(3), upper=torch.ones(3)).primal
        tensor([1., 1., 0.])
    """

    _owner = "MixedIntegerProgram"
    _sparse = False
    integer: Tensor

    def __init__(
        self,
        integer: Tensor | Sequence[object],
        solver: object = "auto",
        *,
        cuts: int = 4,
        time_limit: float | None = None,
        mip_gap: float = 1e-6,
        workers: int | None = None,
        rounding: Rounding = "nearest",
        primal_gradient: PrimalGradient | None = None,
        throw: bool = False,
    ) -> None:
        """`integer` [n]; `solver` takes the linear programs; `workers`: problems at a time, default one a core.

        cuts: most rounds of root cuts that `primal_gradient` is strengthened by; 0 for the plain relaxation.
        """
        super().__init__(solver, rounding=rounding, primal_gradient=primal_gradient, throw=throw)
        mask = integer if isinstance(integer, Tensor) else torch.as_tensor(integer, device="cpu")
        if mask.dtype != torch.bool or mask.dim() != 1:
            raise TypeError(
                f"{self._owner}: integer must be a mask [n] of booleans, got {mask.dtype} {list(mask.shape)}"
            )
        require_range(self._owner, "> 0 seconds", optional=True, time_limit=time_limit)
        require_range(self._owner, ">= 0", cuts=cuts, mip_gap=mip_gap)
        require_range(self._owner, ">= 1", optional=True, workers=workers)
        self.register_buffer("integer", mask, persistent=False)
        self.cuts, self.time_limit, self.mip_gap, self.workers = cuts, time_limit, mip_gap, workers

    @classmethod
    def _of_problem(cls, problem: object, **options: Any) -> MixedIntegerProgram:
        return cls(integers_of(problem), **options)

    def _solve(self, given: dict[str, Tensor], start: LPSolution | None) -> MIPSolution:
        n = given["c"].shape[-1]
        if self.integer.shape != (n,):
            raise ValueError(f"{self._owner}: integer has {len(self.integer)} entries, c has {n} variable(s)")
        relaxed = LinearProgram(self._solver, rounding=self.rounding)._solve(given, start)
        batch = relaxed.status.shape
        data = arguments.flatten(given, arguments.batch_shape(given)).detach().double()
        found = self._branch(data.map(Tensor.cpu))
        point, claimed, status = (part.to(data.c.device) for part in found)
        known = point.isfinite().all(1).reshape(batch)
        point = torch.where(known[..., None], point.reshape(*batch, n), 0.0)
        whole = torch.where(self.integer, point.round().to(given["c"]), 0.0)
        held = {
            "lower": torch.where(self.integer, whole, given["lower"]),
            "upper": torch.where(self.integer, whole, given["upper"]),
        }
        fixed = LinearProgram(self._solver, rounding=self.rounding)
        best = fixed(**(given | held))
        status = status.reshape(batch)
        settled = known & ((status == Status.OPTIMAL) | (status == Status.TIME_LIMIT))
        solved = settled & (best.status == Status.OPTIMAL) & relaxed.lower.isfinite()
        value = torch.where(solved, best.lower, torch.inf)
        # Claims that contradict what is proved: an optimum without its point, a fall beside a finite bound.
        false = (status == Status.OPTIMAL) & ~solved | (status == Status.UNBOUNDED) & relaxed.lower.isfinite()
        status = torch.where(false, int(Status.NUMERICAL), status)
        status = torch.where(relaxed.status == Status.INFEASIBLE, int(Status.INFEASIBLE), status).to(torch.int8)
        primal = best.primal.detach()
        if self.primal_gradient is not None:
            # The integer point, with the derivative of the relaxation that the root cuts strengthen.
            smooth = self._strengthened(given, data, batch)
            primal = primal + (smooth - smooth.detach())
        solution = MIPSolution(
            lower=relaxed.lower,
            primal=primal,
            inequality=best.inequality,
            equality=best.equality,
            gap=(value - relaxed.lower).detach().nan_to_num(torch.inf, torch.inf, torch.inf),
            status=status,
            iterations=relaxed.iterations,
            solver="Highs (branch and bound)",
            value=value,
            claimed=claimed.reshape(batch).to(given["c"]),
        )
        if self.throw:
            require_optimal(self._owner, solution.status)
        return solution

    def _strengthened(self, given: dict[str, Tensor], data: LPData, batch: torch.Size) -> Tensor:
        """The regularised argmin of the relaxation with root cuts, whose coefficients are held fixed."""
        rows, sides = root_cuts(data.map(Tensor.cpu), self.integer.cpu().numpy(), self.cuts)
        if rows.shape[1]:
            A, b = given["A"], given["b"]
            G, h = (part.to(given["c"]).reshape(*batch, *part.shape[1:]) for part in (rows, sides))
            A, b = A.expand(*batch, *A.shape[-2:]), b.expand(*batch, b.shape[-1])
            given = given | {"A": torch.cat([A, G], -2), "b": torch.cat([b, h], -1)}
        layer = LinearProgram(self._solver, rounding=self.rounding, primal_gradient=self.primal_gradient)
        return layer._solve(given, None).primal

    def _branch(self, data: LPData) -> tuple[Tensor, Tensor, Tensor]:
        """(points, claimed bounds, statuses) of each problem, on the host."""
        size, n = data.size[:2]
        if size == 0:
            return data.c, data.c.new_zeros(0), torch.zeros(0, dtype=torch.int8, device="cpu")
        kinds = self.integer.cpu().numpy()
        with ThreadPoolExecutor(min(size, self.workers or usable_cores())) as pool:
            found = list(pool.map(lambda i: self._one(data.select(slice(i, i + 1)), kinds), range(size)))
        points = torch.from_numpy(np.stack([point for point, _, _ in found]).reshape(size, n))
        claimed = torch.tensor([bound for _, bound, _ in found], dtype=torch.float64, device="cpu")
        return points, claimed, torch.tensor([int(status) for _, _, status in found], dtype=torch.int8, device="cpu")

    def _one(self, data: LPData, integer: Any) -> tuple[Any, float, Status]:
        import highspy
        from scipy.sparse import csc_matrix

        n = data.size[1]
        A, E = (matrix if matrix.dim() == 2 else matrix[0] for matrix in (data.A, data.E))
        matrix = csc_matrix(stack_rows(A, E).numpy())
        program = highspy.HighsLp()
        program.num_row_, program.num_col_ = matrix.shape
        program.col_cost_ = data.c[0].numpy()
        program.col_lower_, program.col_upper_ = ends = _whole_ends(data, integer)
        if bool((ends[0] > ends[1]).any()):
            return np.zeros(n), -np.inf, Status.INFEASIBLE
        program.row_lower_ = torch.cat([torch.full_like(data.b[0], -torch.inf), data.d[0]]).numpy()
        program.row_upper_ = torch.cat([data.b[0], data.d[0]]).numpy()
        program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        program.a_matrix_.start_ = matrix.indptr.astype(np.int32, copy=False)
        program.a_matrix_.index_ = matrix.indices.astype(np.int32, copy=False)
        program.a_matrix_.value_ = matrix.data
        whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        program.integrality_ = [whole if kind else real for kind in integer]
        solver = new_highs()
        options: dict[str, Any] = {"threads": 1, "mip_rel_gap": self.mip_gap, "mip_feasibility_tolerance": _WHOLE}
        # HiGHS's presolve of mixed-integer programs (1.15) cuts off points that exist, and may run forever.
        options |= {"small_matrix_value": 1e-12, "presolve": "off"}
        options |= {} if self.time_limit is None else {"time_limit": self.time_limit}
        for name, value in options.items():
            solver.setOptionValue(name, value)
        if solver.passModel(program) == highspy.HighsStatus.kError:
            return np.zeros(n), -np.inf, Status.NUMERICAL
        solver.run()
        kind = highspy.HighsModelStatus
        solution = solver.getSolution()
        point = np.array(solution.col_value) if solution.value_valid else np.zeros(n)
        table = {
            kind.kOptimal: Status.OPTIMAL,
            kind.kTimeLimit: Status.TIME_LIMIT,
            kind.kInfeasible: Status.INFEASIBLE,
            kind.kUnbounded: Status.UNBOUNDED,
        }
        status = table.get(solver.getModelStatus(), Status.NUMERICAL)
        info = solver.getInfo()
        bound = float(info.mip_dual_bound if integer.any() else info.objective_function_value)
        return point, bound if status in (Status.OPTIMAL, Status.TIME_LIMIT) else -np.inf, status


def _whole_ends(data: LPData, integer: Any) -> tuple[Any, Any]:
    """The variables' ends, those of integers moved to the integers within.

    The same program; between fractional ends HiGHS (1.15) may cut off integer points, whatever its options.
    """
    lower, upper = data.lower[0].numpy(), data.upper[0].numpy()
    return np.where(integer, np.ceil(lower - _WHOLE), lower), np.where(integer, np.floor(upper + _WHOLE), upper)
