"""Batches of small linear programs over one matrix: the dual simplex method from the basis of the first problem."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from optrelax.checks import require_range
from optrelax.kernels import native
from optrelax.layers.interior_point import InteriorPoint
from optrelax.layers.programs.implied_bounds import implied_box
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver
from optrelax.layers.programs.sparse_matrices import is_sparse
from optrelax.layers.solutions import Status

_STEPS = 3  # pivots a problem may take, a row and column
_SIGNATURES = (
    "simplex(size, n, m, p, limit, double work, c[size * n], A?[m * n], b?[size * m], E?[p * n], d?[size * p], "
    "lower[size * n], upper[size * n], low[size * n], high[size * n], x[size * n], y[size * (m + p)], "
    "int64 status[size], int64 iterations[size])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled method, or why there is none."""
    return native.build(Path(__file__).with_name("simplex.c"), *_SIGNATURES)


@dataclass(frozen=True, slots=True)
class DualSimplex(ProgramSolver):
    """The dual simplex method in cache for batches over one dense matrix, by a compiled kernel.

    Bases near each other cost a few pivots: the first problem starts from the rows' basis, the others from where that
    one ended. A point is a vertex; where the optimum is not unique, which one may depend on the first problem.

    Args:
        tol: relative gap that counts as OPTIMAL.
        rest: for what does not end in an optimum, for batches without one matrix and where there is no kernel.
        work: entries of its tableau that the second problem may change; where it changes more, `rest` solves all.

    Raises:
        ValueError: for an option out of range.

    Sound: yes, through the layer.  Exact: to rounding.

    Example:
        >>> c, ones = torch.tensor([[-1.0, -2.0], [1.0, -1.0]]), torch.ones(2)
        >>> LinearProgram(DualSimplex())(c, ones[None], ones[:1], lower=0 * ones, upper=ones).primal
        tensor([[0., 1.],
                [0., 1.]])
    """

    tol: float = 1e-6
    rest: InteriorPoint = field(default_factory=InteriorPoint)
    work: float = math.inf

    def __post_init__(self) -> None:
        require_range("DualSimplex", "> 0", tol=self.tol, work=self.work)

    @staticmethod
    def takes(data: LPData) -> bool:
        """Whether these are linear programs over one dense matrix, for which there is a kernel."""
        _, _, m, p = data.size
        plain = data.P is None and data.shares_matrices and not is_sparse(data.A) and not is_sparse(data.E)
        return plain and m + p > 0 and kernels().supports(data.c)

    @torch.no_grad()
    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems; a start goes to `rest` alone."""
        rest = replace(self.rest, tol=self.tol).for_programs()
        if not self.takes(data):
            return rest.solve(data, start)
        exact = data.detach().double()
        answer = _solved(exact, self.work)
        open_ = (answer.status != Status.OPTIMAL).nonzero().squeeze(-1)
        if not len(open_):
            return answer
        if len(open_) == len(answer.status):
            return replace(rest.solve(data, start), solver="InteriorPoint")
        part = None if start is None else start.select(open_)
        found = rest.solve(exact.select(open_), part)
        answer = answer.with_proofs().put(open_, found.with_proofs())  # it claims nothing that it has not proved
        return replace(answer, solver=f"DualSimplex, InteriorPoint for {len(open_)} of {data.size[0]}")


def _solved(data: LPData, work: float) -> Answer:
    """What the kernel finds; NUMERICAL is all that does not end in an optimum."""
    size, n, m, p = data.size
    ready, ends = data.map(Tensor.contiguous), implied_box(data)
    primal, duals = data.c.new_empty(size, n), data.c.new_empty(size, m + p)
    status, steps = (torch.empty(size, dtype=torch.int64, device="cpu") for _ in range(2))
    inputs = (ready.c, ready.A, ready.b, ready.E, ready.d, ready.lower, ready.upper, *(e.contiguous() for e in ends))
    limit = _STEPS * (n + m + p)
    kernels().call("simplex", torch.float64, size, n, m, p, limit, work, *inputs, primal, duals, status, steps)
    y, v = duals[:, :m].clamp(min=0), duals[:, m:]
    return Answer(primal, y, v, status.to(torch.int8), steps, solver="DualSimplex")
