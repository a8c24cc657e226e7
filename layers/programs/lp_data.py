"""What goes into a solver and what comes out: a batch of linear programs, flattened to one batch dimension."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from optrelax.layers.batched import Batched
from optrelax.layers.programs.sparse_matrices import Entries, is_sparse
from optrelax.layers.solutions import LPSolution, Status


# The innermost steps of iterations call these two: their shapes are not checked in the tests.
def times(matrix: Tensor, x: Tensor) -> Tensor:
    """M x, [B, m], for x [B, n] and a matrix [m, n] shared by the batch or one a problem [B, m, n]."""
    if matrix.dim() == 2:
        return torch.sparse.mm(matrix, x.mT).mT if is_sparse(matrix) else x @ matrix.mT
    return torch.bmm(matrix, x.unsqueeze(-1)).squeeze(-1)


def transposed_times(matrix: Tensor, y: Tensor) -> Tensor:
    """M^T y, [B, n], for y [B, m] and a matrix [m, n] shared by the batch or one a problem [B, m, n]."""
    if matrix.dim() == 2:
        return torch.sparse.mm(matrix.mT, y.mT).mT if is_sparse(matrix) else y @ matrix
    return torch.bmm(y.unsqueeze(-2), matrix).squeeze(-2)


def stack_rows(*matrices: Float[Tensor, "... _ n"]) -> Float[Tensor, "... rows n"]:
    """The matrices on top of each other; [rows, n] where all are shared by the batch, else [B, rows, n].

    COO where one of them is sparse.
    """
    batches = {matrix.shape[0] for matrix in matrices if matrix.dim() == 3}
    if any(is_sparse(matrix) for matrix in matrices):
        return torch.cat([Entries.of(matrix).coo() for matrix in matrices], -2).coalesce()
    if not batches:
        return torch.cat(matrices, -2)
    return torch.cat([matrix.expand(*batches, -1, -1) for matrix in matrices], -2)


@dataclass(frozen=True, slots=True, eq=False)
class LPData:
    """min c.x subject to A x <= b, E x = d, lower <= x <= upper, for B problems; m or p may be 0.

    A and E keep two dimensions where the whole batch shares them, and may then be sparse (COO).
    """

    c: Float[Tensor, "B n"]
    A: Float[Tensor, "... m n"]
    b: Float[Tensor, "B m"]
    E: Float[Tensor, "... p n"]
    d: Float[Tensor, "B p"]
    lower: Float[Tensor, "B n"]
    upper: Float[Tensor, "B n"]
    P: Float[Tensor, "... n n"] | None = None
    """Of quadratic programs, which add x.P x / 2; shared by the batch where it has two dimensions."""

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(B problems, n variables, m inequalities, p equalities)."""
        return self.c.shape[0], self.c.shape[1], self.b.shape[1], self.d.shape[1]

    @property
    def shares_matrices(self) -> bool:
        """Whether the whole batch has one A and one E."""
        return self.A.dim() == 2 and self.E.dim() == 2

    def dense(self) -> LPData:
        """The same data, sparse matrices written out."""
        if not (is_sparse(self.A) or is_sparse(self.E)):
            return self
        return replace(self, A=self.A.to_dense(), E=self.E.to_dense())

    def map(self, function: Callable[[Tensor], Tensor]) -> LPData:
        """The same data with `function` applied to every tensor."""
        parts = (getattr(self, entry.name) for entry in fields(self))
        made: list[Any] = [part if part is None else function(part) for part in parts]
        return LPData(*made)

    def detach(self) -> LPData:
        """The same data outside the autograd graph."""
        parts = (getattr(self, entry.name) for entry in fields(self))
        return self.map(torch.Tensor.detach) if any(part is not None and part.requires_grad for part in parts) else self

    def double(self) -> LPData:
        """The same data in float64."""
        return self if self.c.dtype == torch.float64 else self.map(torch.Tensor.double)

    def push(self, y: Float[Tensor, "B m"], v: Float[Tensor, "B p"]) -> Tensor:
        """A^T y + E^T v, [B, n]."""
        if not v.shape[-1]:
            return transposed_times(self.A, y)
        if not y.shape[-1]:
            return transposed_times(self.E, v)
        return transposed_times(self.A, y) + transposed_times(self.E, v)

    def select(self, index: Bool[Tensor, " B"] | Int[Tensor, " s"] | slice) -> LPData:
        """Some of the problems; matrices shared by the batch stay shared."""
        return LPData(
            self.c[index],
            self.A if self.A.dim() == 2 else self.A[index],
            self.b[index],
            self.E if self.E.dim() == 2 else self.E[index],
            self.d[index],
            self.lower[index],
            self.upper[index],
            self.P if self.P is None or self.P.dim() == 2 else self.P[index],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answer(Batched):
    """What a solver claims for B problems; nothing in it is trusted."""

    primal: Float[Tensor, "B n"]
    inequality: Float[Tensor, "B m"]
    """y of A x <= b in L = c.x + y.(A x - b) + v.(E x - d)."""
    equality: Float[Tensor, "B p"]
    status: Int8[Tensor, " B"]
    iterations: Int[Tensor, " B"]
    objective: Float[Tensor, " B"] | None = None
    """c.x with the solver's own derivative attached, from solvers that differentiate themselves."""
    solver: str = ""
    """Who solved, where a solver chooses another."""
    proved: Bool[Tensor, " B"] | None = None
    """Where the solver has proved INFEASIBLE or UNBOUNDED itself; elsewhere the layer wants the rays."""

    def with_proofs(self) -> Answer:
        """The same from a solver that has proved all its claims that there is no optimum."""
        return replace(self, proved=(self.status == Status.INFEASIBLE) | (self.status == Status.UNBOUNDED))

    @staticmethod
    def empty(data: LPData) -> Answer:
        """The answer to no problems."""
        none = torch.zeros(0, dtype=torch.int8, device=data.c.device)
        primal, inequality, equality = (part.detach().clone() for part in (data.c, data.b, data.d))
        return Answer(primal, inequality, equality, none, none.long())

    @staticmethod
    def of(start: LPSolution, data: LPData) -> Answer:
        """A former solution as a starting point; ValueError where its shapes are another problem's."""
        size, n, m, p = data.size

        def flat(name: str, width: int) -> Tensor:
            tensor: Tensor = getattr(start, name).detach()
            if tensor.numel() != size * width or tensor.shape[-1] != width:
                raise ValueError(
                    f"LinearProgram: start.{name} has shape {tuple(tensor.shape)}, "
                    f"the batch has {size} problem(s) with {width}"
                )
            return tensor.reshape(size, width).to(data.c)

        points = flat("primal", n), flat("inequality", m), flat("equality", p)
        return Answer(*points, start.status.reshape(size), start.iterations.reshape(size))


class ProgramSolver(ABC):
    """The forward half of a layer for general programs: data in, a claimed primal and dual point out.

    A frozen dataclass of options, handed to a layer as `LinearProgram(solver)`.

    Sound: whatever it returns; the layer evaluates bound, gap and status from the points alone.

    Example:
        >>> [solver.__name__ for solver in (Auto, Cvxpy, Highs, PDHG) if issubclass(solver, ProgramSolver)]
        ['Auto', 'Cvxpy', 'Highs', 'PDHG']
    """

    tol: float
    """Relative gap that counts as OPTIMAL, and the tolerance of feasibility."""
    quadratic: ClassVar[bool] = False
    """Whether it takes data with P."""
    sparse: ClassVar[bool] = False
    """Whether it takes sparse A and E; for others they are written out."""

    @property
    def differentiates(self) -> bool:
        """Whether `solve` wants data inside the autograd graph and returns `Answer.objective`: else the layer does."""
        return False

    def fallback(self, data: LPData) -> ProgramSolver | None:
        """Who solves what the certificates leave unsettled; None: nobody."""
        return None

    @abstractmethod
    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems."""


@runtime_checkable
class OffersPrograms(Protocol):
    """A solver of several kinds of problems, general programs among them."""

    def for_programs(self) -> ProgramSolver:
        """The solver of general programs."""


def solver_of_programs(owner: str, solver: object, quadratic: bool) -> ProgramSolver:
    """The solver of general programs that was given, or that a solver of several kinds has; TypeError for others."""
    offers = isinstance(solver, OffersPrograms) and not isinstance(solver, type)
    made = solver.for_programs() if offers else solver  # type: ignore[attr-defined]
    if not isinstance(made, ProgramSolver):
        raise TypeError(f"{owner}: solver must be a solver object such as Highs() or PDHG(), got {solver!r}")
    if quadratic and not made.quadratic:
        raise TypeError(
            f"{owner}: {type(made).__name__} solves linear programs only; InteriorPoint() takes quadratic ones"
        )
    return made


def zero_rows(matrix: Float[Tensor, "... m n"]) -> Bool[Tensor, "... m"]:
    """Which rows hold nothing but 0."""
    return Entries.of(matrix).zero_rows() if is_sparse(matrix) else (matrix == 0).all(-1)


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite: one sum, except where that overflows."""
    if is_sparse(tensor):
        tensor = Entries.of(tensor).a
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def binding(data: LPData) -> Tensor:
    """b, with infinite sides for rows that the box keeps far from their sides: no limit, however it is written."""
    A = data.A.double()
    if is_sparse(A):
        at, low, high = Entries.of(A), data.lower.double(), data.upper.double()
        a = at.a
        terms = torch.where(a > 0, a * at.of_columns(high), torch.where(a < 0, a * at.of_columns(low), 0.0))
        reach = at.sums(terms.abs())
        return torch.where(data.b > 2 * reach + 1, torch.inf, data.b)
    low, high = data.lower.double().unsqueeze(-2), data.upper.double().unsqueeze(-2)
    terms = torch.where(A > 0, A * high, torch.where(A < 0, A * low, 0.0))
    return torch.where(data.b > 2 * terms.abs().sum(-1) + 1, torch.inf, data.b)


def without_open_rows(data: LPData) -> LPData:
    """The same problems; rows A x <= inf become 0 x <= 1, for solvers that take no infinite side."""
    open_ = data.b == torch.inf
    if not bool(open_.any()):
        return data
    if data.A.dim() == 2 and bool((open_ == open_[:1]).all()):
        A = torch.where(open_[0].unsqueeze(-1), 0.0, data.A)
    else:
        A = torch.where(open_.unsqueeze(-1), 0.0, data.A.expand(len(open_), -1, -1))
    return replace(data, A=A, b=torch.where(open_, 1.0, data.b))
