"""Linear programs for the tests, and what they are compared with: SciPy's HiGHS, and exact rational arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor


class Data(NamedTuple):
    """The seven arguments of `LinearProgram`, any of them shared by the batch."""

    c: Tensor
    A: Tensor | None = None
    b: Tensor | None = None
    E: Tensor | None = None
    d: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Data:
        return Data(*(None if part is None else part.to(dtype) for part in self))

    def one(self, i: int) -> Data:
        """Problem i of a batch of one dimension, as arrays of its own."""
        dims = (1, 2, 1, 2, 1, 1, 1)
        return Data(
            *(part if part is None or part.dim() == dim else part[i] for part, dim in zip(self, dims, strict=True))
        )


def boxed(batch: int, m: int, n: int, p: int, seed: int = 0, tight: bool = False) -> Data:
    """Feasible problems in the unit box; `tight` makes a corner of the box satisfy every row with equality."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    point = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    point = point.round() if tight else point
    A, E = normal(batch, m, n), normal(batch, p, n)
    slack = 0 if tight else torch.rand(batch, m, generator=generator, dtype=torch.float64)
    b, d = (A @ point.unsqueeze(-1)).squeeze(-1) + slack, (E @ point.unsqueeze(-1)).squeeze(-1)
    zeros = torch.zeros(n, dtype=torch.float64)
    rows = (A, b) if m else (None, None)
    equalities = (E, d) if p else (None, None)
    return Data(normal(batch, n), *rows, *equalities, zeros, zeros + 1)


def covering(batch: int, m: int, n: int, seed: int = 0) -> Data:
    """min c.x, A x >= 1, x >= 0 with positive c: no upper bounds, given or implied."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(m, n, generator=generator, dtype=torch.float64)
    A = A * (A > 0.4) + 0.05
    c = torch.rand(batch, n, generator=generator, dtype=torch.float64) + 0.1
    return Data(c, -A, -torch.ones(m, dtype=torch.float64), lower=torch.zeros(n, dtype=torch.float64))


def packing(batch: int, m: int, n: int, seed: int = 0) -> Data:
    """max c.x, A x <= 1, x >= 0 with positive A: the rows imply upper bounds."""
    cover = covering(batch, m, n, seed)
    assert cover.A is not None
    assert cover.b is not None
    return Data(-cover.c, -cover.A, -cover.b, lower=cover.lower)


def assignment(batch: int, size: int, seed: int = 0) -> Data:
    """Assignment problems: dependent equalities, degenerate vertices."""
    generator = torch.Generator().manual_seed(seed)
    E = torch.zeros(2 * size, size * size, dtype=torch.float64)
    for i in range(size):
        E[i, i * size : (i + 1) * size] = 1
        E[size + i, i::size] = 1
    c = torch.rand(batch, size * size, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(size * size, dtype=torch.float64)
    return Data(c, None, None, E, torch.ones(2 * size, dtype=torch.float64), zeros, zeros + 1)


def fixed(batch: int, m: int, n: int, seed: int = 0) -> Data:
    """Half of the variables have no room."""
    data = boxed(batch, m, n, 1, seed)
    assert data.lower is not None
    assert data.upper is not None
    point = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held = torch.arange(n) % 2 == 0
    middle = data._replace(lower=torch.where(held, point, data.lower), upper=torch.where(held, point, data.upper))
    assert data.E is not None
    assert data.A is not None
    inside = (point + torch.where(held, 0.0, 0.3 - 0.5 * point)).expand(batch, n).unsqueeze(-1)
    return middle._replace(b=(data.A @ inside).squeeze(-1) + 0.1, d=(data.E @ inside).squeeze(-1))


def badly_scaled(batch: int, m: int, n: int, seed: int = 0) -> Data:
    """Rows of sizes from 1e-8 to 1e8, columns from 1e-2 to 1e2."""
    data = boxed(batch, m, n, 0, seed)
    assert data.A is not None
    assert data.b is not None
    assert data.upper is not None
    rows, columns = (torch.logspace(-k, k, size, dtype=torch.float64) for k, size in ((8, m), (2, n)))
    A = data.A * rows.unsqueeze(-1) / columns
    return data._replace(c=data.c / columns, A=A, b=data.b * rows, upper=data.upper * columns)


def free(batch: int, m: int, n: int, seed: int = 0) -> Data:
    """Variables without any bounds, made bounded by the rows: c = -A^T y for some y >= 0."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, m, n, generator=generator, dtype=torch.float64)
    y = torch.rand(batch, m, generator=generator, dtype=torch.float64)
    b = torch.rand(batch, m, generator=generator, dtype=torch.float64)
    return Data(-(y.unsqueeze(-2) @ A).squeeze(-2), A, b)


# One of each status over one set of rows x0 + x1 <= b0, -x0 - x1 <= b1 with x >= 0, min c.x.
MIXED = Data(
    torch.tensor([[1.0, 2.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 0.5]], dtype=torch.float64),
    torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64),
    torch.tensor([[3.0, -1.0], [-10.0, -1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64),
    lower=torch.zeros(2, dtype=torch.float64),
    upper=torch.tensor([[9.0, 9.0], [0.25, 9.0], [torch.inf, torch.inf], [5.0, 0.5]], dtype=torch.float64),
)

FAMILIES = {
    "feasible": lambda: boxed(5, 6, 8, 2),
    "degenerate": lambda: boxed(5, 8, 6, 2, seed=1, tight=True),
    "inequalities": lambda: boxed(4, 9, 7, 0, seed=2),
    "equalities": lambda: boxed(4, 0, 9, 3, seed=3),
    "bounds": lambda: boxed(4, 0, 5, 0, seed=4),
    "one": lambda: boxed(1, 3, 1, 0, seed=5),
    "covering": lambda: covering(4, 5, 7),
    "packing": lambda: packing(4, 5, 7),
    "assignment": lambda: assignment(3, 4),
    "fixed": lambda: fixed(4, 5, 6),
    "badly scaled": lambda: badly_scaled(4, 5, 6),
}


def arrays(data: Data) -> dict[str, np.ndarray | list[tuple[float, float]] | None]:
    """One problem as the arguments of `scipy.optimize.linprog`."""
    n = data.c.shape[-1]
    lower = torch.full((n,), -torch.inf) if data.lower is None else data.lower
    upper = torch.full((n,), torch.inf) if data.upper is None else data.upper
    host = {name: None if part is None else part.detach().double().numpy() for name, part in data._asdict().items()}
    return {
        "c": host["c"],
        "A_ub": host["A"],
        "b_ub": host["b"],
        "A_eq": host["E"],
        "b_eq": host["d"],
        "bounds": list(zip(lower.tolist(), upper.tolist(), strict=True)),
    }


def values(data: Data) -> Tensor:
    """Optimal values by SciPy's HiGHS, [batch]; inf where infeasible, -inf where unbounded."""
    found = []
    for i in range(data.c.shape[0]):
        result = linprog(**arrays(data.one(i)), method="highs-ds")
        assert result.status in (0, 2, 3, 4), result.message
        found.append({0: result.fun, 2: np.inf, 3: -np.inf}.get(result.status, np.nan))
    return torch.tensor(found, dtype=torch.float64)


def exact_value(
    c: Sequence[Fraction],
    rows: Sequence[tuple[Sequence[Fraction], Fraction]],
    equalities: Sequence[tuple[Sequence[Fraction], Fraction]],
) -> Fraction | None:
    """min c.x over a.x <= side for `rows` (bounds included) and a.x = side, in rationals; None where infeasible.

    By enumeration of the vertices: for bounded polyhedra of two or three variables.
    """
    n, best = len(c), None
    for chosen in combinations(rows, max(0, n - len(equalities))):
        point = _solved([*equalities, *chosen], n)
        if point is None:
            continue
        inside = all(_dot(a, point) <= side for a, side in rows)
        if inside and all(_dot(a, point) == side for a, side in equalities):
            value = _dot(c, point)
            best = value if best is None else min(best, value)
    return best


def _dot(a: Sequence[Fraction], x: Sequence[Fraction]) -> Fraction:
    return sum((p * q for p, q in zip(a, x, strict=True)), Fraction(0))


def _solved(system: Sequence[tuple[Sequence[Fraction], Fraction]], n: int) -> list[Fraction] | None:
    """The solution of n equations by Gauss-Jordan elimination; None where they are dependent."""
    table = [[*a, side] for a, side in system[:n]]
    for column in range(n):
        pivot = next((i for i in range(column, n) if table[i][column] != 0), None)
        if pivot is None:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        scale = table[column][column]
        table[column] = [entry / scale for entry in table[column]]
        for i in range(n):
            if i != column and table[i][column] != 0:
                factor = table[i][column]
                pairs = zip(table[i], table[column], strict=True)
                table[i] = [entry - factor * other for entry, other in pairs]
    return [row[n] for row in table]
