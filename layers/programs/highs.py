"""HiGHS, the exact solver: simplex on the CPU, one thread an LP, several LPs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optrelax.checks import require_range
from optrelax.cores import usable_cores
from optrelax.layers.programs.claims import believed
from optrelax.layers.programs.highs_model import Array, Model, Run
from optrelax.layers.programs.lp_data import Answer, LPData, ProgramSolver, stack_rows
from optrelax.layers.programs.sparse_matrices import Entries, is_sparse
from optrelax.layers.solutions import Status

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SparseAnswer:
    """HiGHS's answers to k objectives over one sparse polyhedron.

    The row multipliers follow L = c.x + duals.(M x - row), that is: reduced costs are c + M^T duals, positive duals
    hold row_upper and negative ones row_lower.
    """

    objective: Array
    """c.x, [k]; nan where HiGHS gave no point."""
    primal: Array
    """[k, n]."""
    duals: Array
    """[k, rows]; for INFEASIBLE a Farkas ray, where HiGHS has one."""
    status: NDArray[np.int8]
    """`Status` as HiGHS claims it, [k]."""
    iterations: NDArray[np.int64]
    """Simplex iterations, [k]."""
    seconds: Array
    """Wall time of each solve, [k]."""


@dataclass(frozen=True, slots=True)
class Highs(ProgramSolver):
    """Exact solutions by HiGHS's simplex method, in float64 on the CPU.

    Arrays are passed whole. Problems that share A and E share a model: it is passed once a worker, and each problem
    starts from the basis of the one before, so where an optimum is not unique the point (never the value) may depend on
    `workers`. INFEASIBLE and UNBOUNDED are checked by their rays; a ray that does not stand up makes the status
    NUMERICAL.

    Args:
        threads: threads of one LP (1 is best for LPs of this size).
        time_limit: seconds an LP.
        workers: LPs at a time; default one a core.
        tol: relative gap that counts as OPTIMAL.

    Raises:
        ValueError: for an option out of range.

    Sound: yes, through the layer.  Exact: to `tol`, checked by the layer.

    Example:
        >>> c = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        >>> found = LinearProgram(Highs())(c, lower=-torch.ones(2), upper=torch.ones(2))
        >>> found.lower
        tensor([-2., -1.])
    """

    threads: int = 1
    time_limit: float | None = None
    workers: int | None = None
    tol: float = 1e-6
    sparse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_range("Highs", ">= 1", threads=self.threads)
        require_range("Highs", ">= 1", optional=True, workers=self.workers)
        require_range("Highs", ">= 0 seconds", optional=True, time_limit=self.time_limit)
        require_range("Highs", "> 0", tol=self.tol)

    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems; a start is of no use to the simplex method and is ignored."""
        size, m = data.size[0], data.size[2]
        host = data.map(lambda tensor: tensor.double().cpu())
        workers = min(self.workers or usable_cores(), size)
        chunks = np.array_split(np.arange(size), workers)
        if len(chunks) == 1:
            parts = [self._chunk(host, chunks[0])]
        else:
            # HiGHS releases the interpreter lock while it solves.
            with ThreadPoolExecutor(len(chunks)) as pool:
                parts = list(pool.map(lambda chunk: self._chunk(host, chunk), chunks))
        primal, duals, status, iterations = (
            torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))
            for name in ("primal", "duals", "status", "iterations")
        )
        y, v = duals[:, :m].clamp(min=0), duals[:, m:]
        claimed = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)
        if bool((status > Status.TIME_LIMIT).any()):
            status = believed(self, host, primal, y, v, status)
            primal, y, v = (torch.where(claimed.unsqueeze(-1), 0.0, part) for part in (primal, y, v))
        answer = (primal, y, v, status, iterations)
        x, y, v, codes, counts = (part.to(data.c.device) for part in answer)
        return Answer(x, y, v, codes, counts).with_proofs()

    def solve_sparse(
        self,
        c: Array,
        matrix: csc_matrix,
        row_lower: Array,
        row_upper: Array,
        col_lower: Array,
        col_upper: Array,
    ) -> SparseAnswer:
        """min c_i.x subject to row_lower <= M x <= row_upper, col_lower <= x <= col_upper, for each objective c_i.

        Sound: no, this is what HiGHS claims; `sparse_bounds.sparse_bounds` makes its duals into bounds.
        c [k, n], matrix [rows, n] in float64; infinite bounds allowed.  The model is passed once a worker, and each
        objective starts from the last basis.
        Raises ValueError for shapes that do not fit and for NaN.
        """
        from scipy.sparse import csc_matrix

        c = np.atleast_2d(np.asarray(c, dtype=np.float64))
        k, n = c.shape
        matrix = csc_matrix(matrix)
        sides = _check_sparse(c, matrix, row_lower, row_upper, col_lower, col_upper)
        chunks = np.array_split(np.arange(k), max(1, min(self.workers or usable_cores(), k)))

        def run(chunk: Indices) -> SparseAnswer:
            model = Model(self.threads, self.time_limit)
            model.load(matrix, *sides)
            return _collect([model.solve(c[i]) for i in chunk], n, matrix.shape[0])

        with ThreadPoolExecutor(len(chunks)) as pool:
            return _concatenate(list(pool.map(run, chunks)))

    def _chunk(self, data: LPData, chunk: Indices) -> SparseAnswer:
        """Solve the problems of one worker."""
        shared = by_columns(stack_rows(data.A, data.E)) if data.shares_matrices else None
        model, results = Model(self.threads, self.time_limit), []
        for i in chunk:
            one = data.select(slice(int(i), int(i) + 1))
            row_upper = torch.cat([one.b[0], one.d[0]]).numpy()
            row_lower = torch.cat([torch.full_like(one.b[0], -torch.inf), one.d[0]]).numpy()
            cost, lower, upper = one.c[0].numpy(), one.lower[0].numpy(), one.upper[0].numpy()
            if shared is None or not model.loaded:
                matrix = shared if shared is not None else by_columns(stack_rows(one.A, one.E)[0])
                model.load(matrix, row_lower, row_upper, lower, upper)
            else:
                model.change(row_lower, row_upper, lower, upper)
            results.append(model.solve(cost))
        return _collect(results, data.c.shape[1], data.b.shape[1] + data.d.shape[1])


def by_columns(matrix: Tensor) -> csc_matrix:
    """A matrix of any layout as HiGHS takes it."""
    from scipy.sparse import coo_matrix, csc_matrix

    if not is_sparse(matrix):
        return csc_matrix(matrix.numpy())
    at = Entries.of(matrix)
    return coo_matrix((at.a.numpy(), (at.i.numpy(), at.j.numpy())), shape=(at.m, at.n)).tocsc()


def _collect(results: Sequence[Run], columns: int, rows: int) -> SparseAnswer:
    return SparseAnswer(
        objective=np.array([one.objective for one in results]),
        primal=np.stack([one.primal for one in results]) if results else np.zeros((0, columns)),
        duals=np.stack([one.duals for one in results]) if results else np.zeros((0, rows)),
        status=np.array([one.status for one in results], dtype=np.int8),
        iterations=np.array([one.iterations for one in results], dtype=np.int64),
        seconds=np.array([one.seconds for one in results]),
    )


def _concatenate(parts: Sequence[SparseAnswer]) -> SparseAnswer:
    names = SparseAnswer.__dataclass_fields__
    return SparseAnswer(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _check_sparse(c: Array, matrix: csc_matrix, *sides: Array) -> list[Array]:
    """The sides as float64 vectors; ValueError where they do not fit."""
    rows, n = matrix.shape
    if c.shape[1] != n:
        raise ValueError(f"Highs: c has {c.shape[1]} columns, the matrix has {n}")
    names = ("row_lower", "row_upper", "col_lower", "col_upper")
    arrays = [np.asarray(side, dtype=np.float64) for side in sides]
    for name, array, size in zip(names, arrays, (rows, rows, n, n), strict=True):
        if array.shape != (size,):
            raise ValueError(f"Highs: {name} has shape {array.shape}, wanted ({size},) to fit the matrix")
    for name, array in zip(("c", "matrix", *names), (c, matrix.data, *arrays), strict=True):
        if bool(np.isnan(array).any()):
            raise ValueError(f"Highs: {name} holds NaN")
    return arrays
