"""Small systems c + M s = 0 in floating point with a proved error, and in rationals."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optrelax.rounding import SLACK, gamma, underflow

_F64 = torch.float64
_MOST = 1024  # entries of a system that is eliminated in rationals


def products(
    M: Float[Tensor, "q k"], s: Float[Tensor, " k"], c: Float[Tensor, " q"] | None = None
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """(c + M s, a bound on its rounding error)."""
    start = torch.zeros_like(M[:, 0]) if c is None else c
    terms = M.shape[1] + 2
    size = start.abs() + M.abs() @ s.abs()
    return start + M @ s, 2 * SLACK * (gamma(terms, _F64) * size + underflow(terms, _F64))


def exactly_zero(
    M: Float[Tensor, "q k"], s: Float[Tensor, " k"], c: Float[Tensor, " q"] | None = None
) -> Bool[Tensor, " q"]:
    """Which entries of c + M s vanish in rationals."""
    value, error = products(M, s, c)
    zero = value.abs() <= error
    held = s.nonzero().squeeze(-1)
    exact = [Fraction(x) for x in s[held].tolist()]
    for i in zero.nonzero().squeeze(-1).tolist():
        start = Fraction(0) if c is None else Fraction(float(c[i]))
        pairs = zip(M[i, held].tolist(), exact, strict=True)
        zero[i] = sum((Fraction(a) * x for a, x in pairs if a), start) == 0
    return zero


def exact_correction(
    M: Float[Tensor, "q k"], s: Float[Tensor, " k"], c: Float[Tensor, " q"], m: int
) -> Float[Tensor, " k"] | None:
    """|delta| of an exact solution s + delta of c + M s = 0; None where there is none, or M is large.

    The first m entries move only where they are not 0, and the larger ones before the smaller.
    """
    if M.numel() > _MOST:
        return None
    exact = [Fraction(x) for x in s.tolist()]
    table = []
    for row, start in zip(M.tolist(), c.tolist(), strict=True):
        entries = [Fraction(x) for x in row]
        table.append(
            [*entries, Fraction(start) + sum((a * x for a, x in zip(entries, exact, strict=True) if a), Fraction(0))]
        )
    size = s.abs()
    size[m:] = torch.inf
    order = [j for j in size.argsort(descending=True).tolist() if size[j] > 0]
    held = _eliminated(table, order)
    if any(row[-1] for i, row in enumerate(table) if i not in held.values()):
        return None
    delta = torch.zeros_like(s)
    for j, i in held.items():
        delta[j] = _above(abs(table[i][-1]))
    return delta if bool(delta.isfinite().all()) else None


def _above(x: Fraction) -> float:
    """A float no smaller than x >= 0."""
    near = float(x)
    return near if near >= x else math.nextafter(near, math.inf)


def _eliminated(table: list[list[Fraction]], order: list[int]) -> dict[int, int]:
    """Gauss-Jordan elimination of the columns in this order; the row of each that was eliminated."""
    held: dict[int, int] = {}
    for j in order:
        free = (i for i, row in enumerate(table) if row[j] and i not in held.values())
        pivot = next(free, None)
        if pivot is None:
            continue
        table[pivot] = [x / table[pivot][j] for x in table[pivot]]
        for i, row in enumerate(table):
            if i != pivot and row[j]:
                table[i] = [x - row[j] * y if y else x for x, y in zip(row, table[pivot], strict=True)]
        held[j] = pivot
    return held
