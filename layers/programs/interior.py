"""Batches of linear and convex quadratic programs by interior points: a compiled kernel, or PyTorch doing the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from optrelax.kernels import native
from optrelax.layers.programs.claims import believed
from optrelax.layers.programs.interior_steps import solve_together
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver, binding, without_open_rows
from optrelax.layers.solutions import Status

_BELOW = 1e-3  # below tol: the last steps cost little, and gradients want a point nearer than the gap shows
_SIGNATURES = (
    "interior(size, n, m, p, shared_a, shared_e, shared_p, limit, double tol, c[size * n], "
    "A?[(1 if shared_a else size) * m * n], b?[size * m], E?[(1 if shared_e else size) * p * n], d?[size * p], "
    "lower[size * n], upper[size * n], P?[(1 if shared_p else size) * n * n], x0?[size * n], y0?[size * (m + p)], "
    "x[size * n], y[size * (m + p)], int64 status[size], int64 iterations[size])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled method, or why there is none; its codes are those of `Status`."""
    return native.build(Path(__file__).with_name("interior.c"), *_SIGNATURES)


@dataclass(frozen=True, slots=True)
class InteriorPrograms(ProgramSolver):
    """Mehrotra's method for batches of programs; made by `InteriorPoint.for_programs`.

    compiled: take the kernel where there is a C compiler and the data lie on the CPU.
    """

    tol: float = 1e-6
    max_iterations: int = 60
    max_bytes: int = 512 * 2**20
    compiled: bool = True
    quadratic: ClassVar[bool] = True

    @torch.no_grad()
    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 linear or convex quadratic programs; in PyTorch a start is ignored."""
        exact, tol = data.detach().double(), self.tol * _BELOW
        if self.compiled and kernels().supports(exact.c):
            primal, duals, status, iterations = _compiled(exact, tol, self.max_iterations, start)
        else:
            chunk = max(1, self.max_bytes // _bytes_a_problem(exact))
            sides = binding(exact)
            whole = _with_a_row(without_open_rows(replace(exact, b=sides)))
            pieces = [whole.select(slice(i, i + chunk)) for i in range(0, exact.size[0], chunk)]
            parts = [solve_together(piece, tol, self.max_iterations) for piece in pieces]
            primal, duals, status, iterations = (torch.cat(part) for part in zip(*parts, strict=True))
            held = torch.where(sides == torch.inf, 0.0, duals[:, : exact.size[2]])
            duals = torch.cat([held, duals[:, exact.size[2] :]], -1)
        return self._answer(exact, primal, duals, status, iterations)

    def _answer(self, exact: LPData, primal: Tensor, duals: Tensor, status: Tensor, iterations: Tensor) -> Answer:
        """Rays are proved before they are believed, and are no points."""
        m = exact.size[2]
        y, v = duals[:, :m].clamp(min=0), duals[:, m : m + exact.size[3]]
        status = status.to(torch.int8)
        if not bool((status > Status.TIME_LIMIT).any()):
            return Answer(primal, y, v, status, iterations)
        status = believed(self, exact, primal, y, v, status)
        live = (status != Status.INFEASIBLE) & (status != Status.UNBOUNDED)
        primal, y, v = (torch.where(live.unsqueeze(-1), part, 0.0) for part in (primal, y, v))
        return Answer(primal, y, v, status, iterations).with_proofs()


def _compiled(
    data: LPData, tol: float, max_iterations: int, start: Answer | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, n, m, p = data.size
    ready = data.map(Tensor.contiguous)
    primal, duals = data.c.new_empty(size, n), data.c.new_empty(size, m + p)
    status, iterations = (torch.empty(size, dtype=torch.int64, device="cpu") for _ in range(2))
    warm: tuple[Tensor | None, Tensor | None] = (None, None)
    if start is not None:
        prices = torch.cat([start.inequality, start.equality], -1)
        warm = (start.primal.double().contiguous(), prices.double().contiguous())
    inputs = (ready.c, ready.A, ready.b, ready.E, ready.d, ready.lower, ready.upper, ready.P, *warm)
    shared = (int(t is None or t.dim() == 2) for t in (ready.A, ready.E, ready.P))
    outputs = (primal, duals, status, iterations)
    kernels().call("interior", torch.float64, size, n, m, p, *shared, max_iterations, tol, *inputs, *outputs)
    return outputs


def _with_a_row(data: LPData) -> LPData:
    """Problems without rows get one that says nothing, 0 x <= 1."""
    if data.size[2] + data.size[3]:
        return data
    return replace(data, A=data.c.new_zeros(1, data.size[1]), b=data.c.new_ones(data.size[0], 1))


def _bytes_a_problem(data: LPData) -> int:
    """Memory of one problem in flight in PyTorch: scaled matrices and their products, the factor and its copies."""
    _, n, m, p = data.size
    return 8 * (3 * (m + p) * n + 4 * n * n + 40 * (n + m + p))
