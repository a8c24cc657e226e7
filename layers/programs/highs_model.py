"""One HiGHS instance: a model passed whole, changed and solved again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optrelax.layers.solutions import Status

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Run:
    """What HiGHS answers to one objective."""

    objective: float
    primal: Array
    duals: Array
    status: Status
    iterations: int
    seconds: float


_stdout = threading.Lock()


def new_highs() -> Any:
    """A silent HiGHS instance.

    Some versions print a banner on standard output while the instance is made, before any option can be set
    (HiGHS issue 2734), which would spoil what a program prints for another to read.
    """
    import highspy

    with _silenced():
        highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    return highs


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The process's standard output, C's buffer included, goes to the null device."""
    with _stdout:
        try:
            kept = os.dup(1)
        except OSError:  # closed: nothing can be printed
            yield
            return
        library = ctypes.CDLL(None) if os.name == "posix" else None
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            if library is not None:
                library.fflush(None)
            os.dup2(null, 1)
            yield
        finally:
            if library is not None:
                library.fflush(None)
            os.dup2(kept, 1)
            os.close(null)
            os.close(kept)


class Model:
    """One HiGHS instance, reused for problems with one matrix."""

    def __init__(self, threads: int, time_limit: float | None) -> None:
        import highspy

        self.api = highspy
        self.limit = time_limit
        self.highs = new_highs()
        self.highs.setOptionValue("threads", threads)
        # Choose the serial simplex outright: left to choose, HiGHS consults a scheduler shared by all threads.
        self.highs.setOptionValue("solver", "simplex")
        self.highs.setOptionValue("parallel", "off" if threads == 1 else "choose")
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
            self.highs.setOptionValue(name, 1e-9)
        # The default drops entries below 1e-9, which is another problem.
        self.highs.setOptionValue("small_matrix_value", 1e-12)
        self.loaded = False
        self.ok = False

    def load(
        self,
        matrix: csc_matrix,
        row_lower: Array,
        row_upper: Array,
        lower: Array,
        upper: Array,
        curvature: csc_matrix | None = None,
    ) -> None:
        """Pass a whole model, with zero costs; `curvature`: the lower triangle of P in x.P x / 2."""
        program = self.api.HighsLp()
        program.num_row_, program.num_col_ = matrix.shape
        program.col_cost_, program.col_lower_, program.col_upper_ = np.zeros(len(lower)), lower, upper
        program.row_lower_, program.row_upper_ = row_lower, row_upper
        program.a_matrix_.format_ = self.api.MatrixFormat.kColwise
        # HiGHS indexes with 32 bits.
        program.a_matrix_.start_ = matrix.indptr.astype(np.int32, copy=False)
        program.a_matrix_.index_ = matrix.indices.astype(np.int32, copy=False)
        program.a_matrix_.value_ = matrix.data
        self.shape = matrix.shape
        self.loaded = self.ok = self.highs.passModel(program) != self.api.HighsStatus.kError
        if curvature is not None and curvature.nnz:
            hessian = self.api.HighsHessian()
            hessian.dim_, hessian.format_ = len(lower), self.api.HessianFormat.kTriangular
            hessian.start_ = curvature.indptr.astype(np.int32, copy=False)
            hessian.index_ = curvature.indices.astype(np.int32, copy=False)
            hessian.value_ = curvature.data
            self.highs.setOptionValue("solver", "choose")
            self.ok &= self.highs.passHessian(hessian) != self.api.HighsStatus.kError

    def change(self, row_lower: Array, row_upper: Array, lower: Array, upper: Array) -> None:
        """Other sides and bounds on the same matrix."""
        rows, columns = (np.arange(size, dtype=np.int32) for size in self.shape)
        answers = (
            self.highs.changeColsBounds(len(columns), columns, lower, upper),
            self.highs.changeRowsBounds(len(rows), rows, row_lower, row_upper),
        )
        # HiGHS refuses some extreme values; that is the failure of this problem, not of the next.
        self.ok = self.api.HighsStatus.kError not in answers

    def solve(self, cost: Array) -> Run:
        """Minimise one objective from the present basis."""
        begin = time.perf_counter()
        status, iterations = Status.NUMERICAL, 0
        columns = np.arange(self.shape[1], dtype=np.int32)
        if self.ok and self.highs.changeColsCost(len(columns), columns, cost) != self.api.HighsStatus.kError:
            status, iterations = self._run()
            if status == Status.NUMERICAL or not self._shown(status):
                # A stale basis or presolve can be at fault, and presolve knows no ray: once more from scratch.
                self.highs.clearSolver()
                self.highs.setOptionValue("presolve", "off")
                status, again = self._run()
                self.highs.setOptionValue("presolve", "choose")
                iterations += again
        primal, duals = self._point(status)
        has_point = status != Status.UNBOUNDED and self.highs.getSolution().value_valid
        return Run(
            float(cost @ primal) if has_point else float("nan"),
            primal,
            duals,
            status,
            iterations,
            time.perf_counter() - begin,
        )

    def _run(self) -> tuple[Status, int]:
        if self.limit is not None:
            # HiGHS counts the time of all runs of an instance against the limit.
            self.highs.setOptionValue("time_limit", self.highs.getRunTime() + self.limit)
        self.highs.run()
        info = self.highs.getInfo()
        return self._status(self.highs.getModelStatus()), max(0, int(info.simplex_iteration_count))

    def _shown(self, status: Status) -> bool:
        """Whether HiGHS has the ray that a claim wants."""
        if status == Status.INFEASIBLE:
            return bool(self.highs.getDualRay()[1])
        return status != Status.UNBOUNDED or bool(self.highs.getPrimalRay()[1])

    def _status(self, claimed: Any) -> Status:
        kind = self.api.HighsModelStatus
        table: dict[object, Status] = {
            kind.kOptimal: Status.OPTIMAL,
            kind.kModelEmpty: Status.OPTIMAL,
            kind.kInfeasible: Status.INFEASIBLE,
            kind.kUnbounded: Status.UNBOUNDED,
            kind.kTimeLimit: Status.TIME_LIMIT,
            kind.kIterationLimit: Status.ITERATION_LIMIT,
        }
        # Unbounded or infeasible, which presolve may leave open, counts as failed: the second try settles it.
        return table.get(claimed, Status.NUMERICAL)

    def _point(self, status: Status) -> tuple[Array, Array]:
        """(primal, duals); the rays where there is no optimum, zeros where HiGHS has none."""
        rows, columns = self.shape
        solution = self.highs.getSolution()
        primal = np.array(solution.col_value) if solution.value_valid else np.zeros(columns)
        duals = -np.array(solution.row_dual) if solution.dual_valid else np.zeros(rows)
        if status == Status.INFEASIBLE:
            _, found, ray = self.highs.getDualRay()
            duals = -np.asarray(ray, dtype=np.float64) if found else np.zeros(rows)
        if status == Status.UNBOUNDED:
            _, found, ray = self.highs.getPrimalRay()
            primal = np.asarray(ray, dtype=np.float64) if found else np.zeros(columns)
        return _sized(primal, columns), _sized(duals, rows)


def _sized(values: Array, size: int) -> Array:
    return values if values.shape == (size,) else np.zeros(size)
