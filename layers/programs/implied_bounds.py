"""Bounds on variables that the rows imply, rounded outward: x_j <= (b_i - least activity of the rest) / a_ij."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from optrelax.kernels import native
from optrelax.layers.programs.lp_data import LPData, all_finite, stack_rows
from optrelax.layers.programs.sparse_matrices import Entries, count_entries, is_sparse
from optrelax.rounding import SLACK, down, gamma, underflow, up

_CHUNK = 2**24  # entries of one [problems, rows, n] block
_SPARSE = 0.25  # share of entries below which only those of a shared matrix are looked at
_ROUNDS = 3
_SIGNATURES = (
    "implied(size, n, m, p, shared_a, shared_e, rounds, double share, double lost, "
    "A?[(1 if shared_a else size) * m * n], b?[size * m], E?[(1 if shared_e else size) * p * n], d?[size * p], "
    "lower[size * n], upper[size * n], low[size * n], high[size * n], "
    "int64 places[threads * ((m + p) * (n + 1) + 2)], numbers[threads * ((m + p + 2) * n + 1)])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled rounds, or why there are none."""
    return native.build(Path(__file__).with_name("implied.c"), *_SIGNATURES)


def product(r: Tensor, x: Tensor) -> Tensor:
    """r x, with 0 times infinity 0: x stands for every real number up to its infinite bound."""
    plain = r * x
    return torch.where((r == 0) | (x == 0), 0.0, plain) if bool(plain.isnan().any()) else plain


def implied_box(data: LPData) -> tuple[Tensor, Tensor]:
    """The variables' bounds, infinite ones replaced by what the rows imply (given bounds stay as they are)."""
    lower, upper = data.lower, data.upper
    if data.size[2] + data.size[3] == 0 or (all_finite(lower) and all_finite(upper)):
        return lower, upper
    if not is_sparse(data.A) and not is_sparse(data.E) and kernels().supports(data.c):
        return _compiled(data.detach())
    per_problem = max(1, count_entries(data.A) + 2 * count_entries(data.E))
    step = max(1, _CHUNK // per_problem)
    parts = [_implied(data.select(slice(i, i + step))) for i in range(0, data.size[0], step)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _compiled(data: LPData) -> tuple[Tensor, Tensor]:
    size, n, m, p = data.size
    share, lost = _row_error(n)
    low, high = (torch.empty_like(data.c, memory_format=torch.contiguous_format) for _ in range(2))
    threads = torch.get_num_threads()
    places = torch.empty(threads * ((m + p) * (n + 1) + 2), dtype=torch.int64, device="cpu")
    numbers = data.c.new_empty(threads * ((m + p + 2) * n + 1))
    ready = data.map(Tensor.contiguous)
    shared = int(data.A.dim() == 2), int(data.E.dim() == 2)
    inputs = (ready.A, ready.b, ready.E, ready.d, ready.lower, ready.upper)
    room = (low, high, places, numbers)
    kernels().call("implied", torch.float64, size, n, m, p, *shared, _ROUNDS, share, lost, *inputs, *room)
    return low, high


def _row_error(n: int) -> tuple[float, float]:
    """What a sum of n terms and a side may be off, relative to their sizes and absolutely."""
    return SLACK * gamma(n + 4, torch.float64), underflow(n + 4, torch.float64)


def _implied(data: LPData) -> tuple[Tensor, Tensor]:
    """Rounds of `_one_round`, each from the bounds of the one before."""
    rows = stack_rows(data.A, data.E, -data.E)
    sides = torch.cat([data.b, data.d, -data.d], -1)
    entries = _entries(rows)
    lower, upper = data.lower, data.upper
    for _ in range(_ROUNDS):
        low, high = _one_round(entries, sides, lower, upper)
        new_lower = torch.where(lower.isinf(), low, lower)
        new_upper = torch.where(upper.isinf(), high, upper)
        still = bool((new_lower == lower).all()) and bool((new_upper == upper).all())
        lower, upper = new_lower, new_upper
        if still or (all_finite(lower) and all_finite(upper)):
            break
    return lower, upper


def _entries(rows: Tensor) -> _Dense | Entries:
    if is_sparse(rows):
        return Entries.of(rows)
    if rows.dim() == 2 and int(rows.count_nonzero()) < _SPARSE * rows.numel():
        return Entries.of(rows)
    return _Dense(rows)


class _Dense:
    """All entries of [..., rows, n], as `Entries` has those of a sparse matrix."""

    def __init__(self, rows: Tensor) -> None:
        self.a, self.n = rows, rows.shape[-1]

    def of_columns(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2)

    def of_rows(self, s: Tensor) -> Tensor:
        return s.unsqueeze(-1)

    def sums(self, t: Tensor) -> Tensor:
        return t.sum(-1)

    def least(self, t: Tensor) -> Tensor:
        return t.amin(-2)


def _one_round(entries: _Dense | Entries, sides: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) that the rows a.x <= side imply from the present bounds, [B, n] each."""
    a, n = entries.a, entries.n
    terms = torch.minimum(product(a, entries.of_columns(lower)), product(a, entries.of_columns(upper)))
    open_end = (~terms.isfinite()).to(terms)
    finite = torch.where(open_end > 0, 0.0, terms)
    rest_open = entries.of_rows(entries.sums(open_end)) - open_end
    size = entries.of_rows(entries.sums(finite.abs()) + sides.abs())
    share, lost = _row_error(n)
    error = share * size + lost
    room = up(entries.of_rows(sides) - (entries.of_rows(entries.sums(finite)) - finite) + error)
    quotient = room / torch.where(a == 0, 1.0, a)
    known = (rest_open == 0) & quotient.isfinite()
    high = entries.least(torch.where(known & (a > 0), up(quotient), torch.inf))
    low = -entries.least(torch.where(known & (a < 0), -down(quotient), torch.inf))
    return low, high
