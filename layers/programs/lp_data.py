"""What goes into a solver and what comes out: a batch of linear programs, flattened to one batch dimension."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from optrelax.layers.programs.sparse_matrices import Entries, is_sparse

NAMES = ("c", "A", "b", "E", "d", "lower", "upper")
_DIMS = {"c": 1, "A": 2, "b": 1, "E": 2, "d": 1, "lower": 1, "upper": 1, "P": 2}

_NO_LIMIT = 1e20  # a side that other solvers, too, take for infinite


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
class Answer:
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

    @abstractmethod
    def solve(self, data: LPData, start: Answer | None) -> Answer:
        """Solve B >= 1 problems."""


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
        return torch.where((data.b > 2 * reach + 1) | (data.b >= _NO_LIMIT), torch.inf, data.b)
    low, high = data.lower.double().unsqueeze(-2), data.upper.double().unsqueeze(-2)
    terms = torch.where(A > 0, A * high, torch.where(A < 0, A * low, 0.0))
    return torch.where((data.b > 2 * terms.abs().sum(-1) + 1) | (data.b >= _NO_LIMIT), torch.inf, data.b)


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


def gather(
    c: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    E: Tensor | None,
    d: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    P: Tensor | None = None,
    owner: str = "LinearProgram",
    sparse: bool = False,
) -> dict[str, Tensor]:
    """The tensors, missing ones filled in (no rows, infinite bounds), checked one by one and together.

    Sparse matrices are written out, unless `sparse` says that they need not.

    TypeError: not a tensor, or not float32 or float64.  ValueError: shapes that do not fit, mixed dtypes or devices,
    NaN, infinite entries outside the bounds and b, only one of A and b (or E and d).  RuntimeError: inside torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{owner}: vmap and the other transforms of torch.func are not supported; leading dimensions are a batch, "
            "and backward() or torch.autograd.grad differentiates"
        )
    sparse = sparse and all(M is None or M.dim() == 2 for M in (A, E))
    A, E = (_laid_out(name, matrix, owner, sparse) for name, matrix in (("A", A), ("E", E)))
    given = dict(zip(NAMES, (c, A, b, E, d, lower, upper), strict=True))
    if P is not None:
        given["P"] = _laid_out("P", P, owner, False)
    for matrix, vector in (("A", "b"), ("E", "d")):
        if (given[matrix] is None) != (given[vector] is None):
            raise ValueError(f"{owner}: give both {matrix} and {vector} or neither")
    _check_kinds(given, owner)
    n = c.shape[-1]
    defaults = {
        **{name: c.new_zeros(0, n) for name in ("A", "E")},
        **{name: c.new_zeros(0) for name in ("b", "d")},
        "lower": c.new_full((n,), -torch.inf),
        "upper": c.new_full((n,), torch.inf),
    }
    data = {name: defaults[name] if value is None else value for name, value in given.items()}
    _check_shapes(data, owner)
    _check_values({name: value for name, value in data.items() if given[name] is not None}, owner)
    return data


def _laid_out(name: str, matrix: Tensor | None, owner: str, sparse: bool) -> Tensor | None:
    """A sparse matrix as it is, or written out; its gradient is sparse again."""
    if not isinstance(matrix, Tensor) or matrix.layout == torch.strided:
        return matrix
    if matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise TypeError(f"{owner}: {name} must be dense, COO or CSR, got {matrix.layout}")
    return matrix if sparse else matrix.to_dense()


def _check_kinds(given: dict[str, Tensor | None], owner: str) -> None:
    c = given["c"]
    for name, value in given.items():
        if value is None and name != "c":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{owner}: {name} must be float32 or float64, got {value.dtype}")
        assert c is not None
        if value.dtype != c.dtype:
            raise ValueError(f"{owner}: {name} is {value.dtype}, c is {c.dtype}; give one dtype")
        if value.device != c.device:
            raise ValueError(f"{owner}: {name} is on {value.device}, c on {c.device}; give one device")
        if value.dim() < _DIMS[name]:
            raise ValueError(
                f"{owner}: {name} needs at least {_DIMS[name]} dimension(s), got shape {tuple(value.shape)}"
            )


def _check_shapes(data: dict[str, Tensor], owner: str) -> None:
    n, m, p = data["c"].shape[-1], data["A"].shape[-2], data["E"].shape[-2]
    if n == 0:
        raise ValueError(f"{owner}: c has no variables (its last dimension is 0)")
    wanted = {"c": (n,), "A": (m, n), "b": (m,), "E": (p, n), "d": (p,), "lower": (n,), "upper": (n,), "P": (n, n)}
    for name, value in data.items():
        tail, shape = wanted[name], tuple(value.shape)
        if shape[-len(tail) :] != tail:
            listed = ", ".join(str(size) for size in tail)
            raise ValueError(
                f"{owner}: {name} has shape {shape}, wanted [*batch, {listed}] to fit c with {n} variable(s), "
                f"A with {m} and E with {p} row(s)"
            )


def _check_values(data: dict[str, Tensor], owner: str) -> None:
    for name, value in data.items():
        entries = value.detach()
        entries = Entries.of(entries).a if is_sparse(entries) else entries
        if all_finite(entries):
            continue
        if bool(entries.isnan().any()):
            where = entries.isnan().nonzero()[0].tolist()
            raise ValueError(f"{owner}: {name} holds NaN (first at {where})")
        if name in ("lower", "upper"):
            wrong = entries == (torch.inf if name == "lower" else -torch.inf)
            allowed = "-inf" if name == "lower" else "inf"
            wanted = f"must be finite or {allowed}"
        elif name == "b":
            wrong, wanted = entries == -torch.inf, "must be finite, or inf for no limit"
        else:
            wrong, wanted = entries.isinf(), "must be finite"
        if bool(wrong.any()):
            first = wrong.nonzero()[0].tolist()
            raise ValueError(f"{owner}: {name} {wanted}, got {entries[wrong][0].item()} at {first}")


def batch_shape(data: dict[str, Tensor], owner: str = "LinearProgram") -> torch.Size:
    """The common leading shape; ValueError where the leading shapes do not broadcast."""
    leading = {name: value.shape[: value.dim() - _DIMS[name]] for name, value in data.items()}
    shapes = {shape for shape in leading.values() if shape}
    if len(shapes) < 2:
        return shapes.pop() if shapes else torch.Size()
    try:
        return torch.broadcast_shapes(*leading.values())
    except RuntimeError as error:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in leading.items() if shape)
        raise ValueError(f"{owner}: leading shapes do not broadcast: {listed}") from error


def flatten(data: dict[str, Tensor], batch: torch.Size) -> LPData:
    """Broadcast to the batch and flatten it, keeping matrices that the whole batch shares as one [m, n]."""

    def flat(name: str) -> Tensor:
        value, dims = data[name], _DIMS[name]
        if is_sparse(value):
            return Entries.of(value.detach()).coo()
        tail = value.shape[value.dim() - dims :]
        if dims == 2 and value.dim() > 2 and value.shape[:-2].numel() == 1:
            value = value.reshape(tail)
        if (dims == 2 and value.dim() == 2) or (len(batch) == 1 and value.shape == batch + tail):
            return value
        return value.expand(batch + tail).reshape(batch.numel(), *tail)

    parts: list[Any] = [*(flat(name) for name in NAMES), flat("P") if "P" in data else None]
    return LPData(*parts)
