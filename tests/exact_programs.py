"""Linear programs solved in rationals, by Bland's simplex method: what the layers' statuses and bounds are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from lp_cases import Data

ZERO, ONE = Fraction(0), Fraction(1)
Row = list[Fraction]


def exact_optimum(data: Data) -> float | Fraction:
    """The optimal value of one problem whose seven arguments are given; inf: infeasible, -inf: unbounded."""
    c, A, b, E, d, lower, upper = ([] if part is None else part.tolist() for part in data)
    if any(low > high for low, high in zip(lower, upper, strict=True)):
        return math.inf
    # x = start + signs.t with t >= 0
    start = [
        Fraction(low if low > -math.inf else high if high < math.inf else 0)
        for low, high in zip(lower, upper, strict=True)
    ]
    columns = [(j, 1 if lower[j] > -math.inf or upper[j] == math.inf else -1) for j in range(len(c))]
    columns += [(j, -1) for j in range(len(c)) if lower[j] == -math.inf and upper[j] == math.inf]
    rows: list[tuple[Row, Fraction, bool]] = []
    for matrix, sides, equal in ((A, b, False), (E, d, True)):
        for a, side in zip(matrix, sides, strict=True):
            if side < math.inf:
                moved = Fraction(side) - sum((Fraction(x) * s for x, s in zip(a, start, strict=True)), ZERO)
                rows.append(([Fraction(a[j]) * sign for j, sign in columns], moved, equal))
    for j, (low, high) in enumerate(zip(lower, upper, strict=True)):
        if -math.inf < low and high < math.inf:
            rows.append(([ONE if k == j else ZERO for k, _ in columns], Fraction(high) - Fraction(low), False))
    value = _simplex([Fraction(c[j]) * sign for j, sign in columns], rows)
    return (
        value
        if isinstance(value, float)
        else value + sum((Fraction(x) * s for x, s in zip(c, start, strict=True)), ZERO)
    )


def _simplex(cost: Row, rows: Sequence[tuple[Row, Fraction, bool]]) -> float | Fraction:
    """min cost.t over t >= 0 and the rows (a, side, whether it is an equality)."""
    n, m = len(cost), len(rows)
    table, basis = [], []
    for i, (a, side, equal) in enumerate(rows):
        row = [*a, *([ZERO] * (2 * m)), side]  # slacks, then artificial variables
        if not equal:
            row[n + i] = ONE
        if side < 0:
            row = [-x for x in row]
        basis.append(n + i if row[n + i] == 1 else n + m + i)
        row[basis[-1]] = ONE
        table.append(row)
    if _minimised(table, basis, [ZERO] * (n + m) + [ONE] * m, n + 2 * m) != 0:
        return math.inf
    for i in range(m):
        entering = next((j for j in range(n + m) if table[i][j] != 0), None)
        if basis[i] >= n + m and entering is not None:
            _pivot(table, basis, i, entering)
    return _minimised(table, basis, [*cost, *([ZERO] * (2 * m))], n + m)


def _minimised(table: list[Row], basis: list[int], cost: Row, allowed: int) -> float | Fraction:
    reduced = [*cost, ZERO]
    for row, held in zip(table, basis, strict=True):
        reduced = _without(reduced, row, held)
    while True:
        entering = next((j for j in range(allowed) if reduced[j] < 0), None)
        if entering is None:
            return -reduced[-1]
        steps = [
            (row[-1] / row[entering], held, i)
            for i, (row, held) in enumerate(zip(table, basis, strict=True))
            if row[entering] > 0
        ]
        if not steps:
            return -math.inf
        leaving = min(steps)[2]
        _pivot(table, basis, leaving, entering)
        reduced = _without(reduced, table[leaving], entering)


def _pivot(table: list[Row], basis: list[int], i: int, j: int) -> None:
    table[i] = [x / table[i][j] for x in table[i]]
    for k in range(len(table)):
        if k != i:
            table[k] = _without(table[k], table[i], j)
    basis[i] = j


def _without(row: Row, pivot: Row, j: int) -> Row:
    """`row` with its entry j eliminated by a row whose entry j is 1."""
    factor = row[j]
    return [x - factor * y for x, y in zip(row, pivot, strict=True)] if factor else row


def odd_programs(batch: int, n: int, m: int, p: int, seed: int, whole: bool) -> Data:
    """Small programs of every kind of bound and side, with equal rows and rows of zeros; `whole`: of small integers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        if whole:
            return torch.randint(-3, 4, shape, generator=generator).double()
        return (64 * torch.randn(shape, generator=generator, dtype=torch.float64)).round() / 64  # sums are exact

    def chance(share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < share

    c, A, E = draw(batch, n), draw(batch, m, n), draw(batch, p, n)
    kind = torch.randint(6, (batch, n), generator=generator)
    lower = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, 1.0, -1e6], dtype=torch.float64)[kind]
    upper = torch.tensor([1.0, torch.inf, torch.inf, 1.0, 1.0, 1e6], dtype=torch.float64)[kind]
    inside = draw(batch, n, 1).clamp(lower.unsqueeze(-1), upper.unsqueeze(-1))
    if m > 1:
        A[:, 1] = torch.where(chance(0.3, batch, 1), A[:, 0], A[:, 1])
        A[:, 0] *= ~chance(0.15, batch, 1)
    b = (A @ inside).squeeze(-1) + torch.where(chance(0.6, batch, m), draw(batch, m).abs(), 0.0)
    b = torch.where(chance(0.2, batch, m), draw(batch, m), b)
    b = torch.where(chance(0.1, batch, m), torch.inf, b)
    d = (E @ inside).squeeze(-1) + torch.where(chance(0.1, batch, p), draw(batch, p), 0.0)
    return Data(c, A, b, E, d, lower, upper)
