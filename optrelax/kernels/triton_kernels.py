"""The relaxation step in Triton: every function of relax_step.c and band_step.c, under its name, with its arguments.

Three kernels do the work: rows pulled through lines or reduced over a box, the gradient in rows and lines, the gradient
in rows that the batch shares. What a call lacks (no slopes over a box, one end instead of two) is None in the kernel,
and compiled away. Importing this module imports Triton: `triton_steps` does so where there is a CUDA device.

Deterministic: no atomics; a sum over rows or examples is made by one program, or by parts that are added in order, and
how many there are depends on the sizes alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile: lines are read once for ROWS rows, and a warp reads 128 neurons of a row at once.
ROWS = tl.constexpr(8)
COLS = tl.constexpr(128)
# The tile of the gradient in shared rows: GROUP examples at once, or there would be too few programs.
GROUP = tl.constexpr(4)
SHARED_ROWS = tl.constexpr(4)
SHARED_COLS = tl.constexpr(64)

_ENOUGH = 1024  # programs that fill a large device; with fewer, sums are split
_LEAST_STEPS = 4  # of the loop in each part, so that adding the parts costs little
_ALIGNMENT = 16


@no_type_check  # Triton's own types: the names of the tensors stand for pointers
def _rows(a, ls, us, lower, upper, pulled, low, high, k, n, step):
    """One example's rows, ROWS of them: coefficients through the slopes, and the least (and greatest) value."""
    blocks = tl.cdiv(k, ROWS)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = rows < k
    source, target = ((example * step + rows) * n)[:, None], ((example * k + rows) * n)[:, None]
    least = tl.zeros((ROWS, COLS), a.dtype.element_ty)
    greatest = tl.zeros((ROWS, COLS), a.dtype.element_ty)
    for start in range(0, n, COLS):
        columns = start + tl.arange(0, COLS)
        there = columns < n
        here, line = inside[:, None] & there[None, :], example * n + columns
        x = tl.load(a + (source + columns[None, :]), mask=here, other=0.0)
        l = tl.load(lower + line, mask=there, other=0.0)[None, :]
        u = tl.load(upper + line, mask=there, other=0.0)[None, :]
        least += x * tl.where(x > 0, l, u)
        if high is not None:
            greatest += x * tl.where(x > 0, u, l)
        if ls is not None:
            slope = tl.load(ls + line, mask=there, other=0.0)[None, :]
            if us is not None:
                slope = tl.where(x > 0, slope, tl.load(us + line, mask=there, other=0.0)[None, :])
            tl.store(pulled + (target + columns[None, :]), x * slope, mask=here)
    tl.store(low + (example * k + rows), tl.sum(least, axis=1), mask=inside)
    if high is not None:
        tl.store(high + (example * k + rows), tl.sum(greatest, axis=1), mask=inside)


@no_type_check
def _columns(
    a, ls, us, lower, upper, grad, to_low, to_high, to_a, to_ls, to_us, to_lower, to_upper, batch, k, n, step, chunk
):
    """One example's neurons, COLS of them: the gradient in `chunk` of its rows, and their sum for the lines."""
    blocks = tl.cdiv(n, COLS)
    columns = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    there = columns < n
    example = (tl.program_id(0) // blocks % batch).to(tl.int64)
    part = tl.program_id(0) // blocks // batch
    line = example * n + columns
    if to_a is not None:
        l = tl.load(lower + line, mask=there, other=0.0)[None, :]
        u = tl.load(upper + line, mask=there, other=0.0)[None, :]
        if ls is not None:
            below = tl.load(ls + line, mask=there, other=0.0)[None, :]
            if us is not None:
                above = tl.load(us + line, mask=there, other=0.0)[None, :]
    sum_ls = tl.zeros((ROWS, COLS), a.dtype.element_ty)
    sum_us = tl.zeros((ROWS, COLS), a.dtype.element_ty)
    sum_lower = tl.zeros((ROWS, COLS), a.dtype.element_ty)
    sum_upper = tl.zeros((ROWS, COLS), a.dtype.element_ty)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, k), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < k
        here = inside[:, None] & there[None, :]
        x = tl.load(a + (((example * step + rows) * n)[:, None] + columns[None, :]), mask=here, other=0.0)
        target = ((example * k + rows) * n)[:, None] + columns[None, :]
        p = tl.load(to_low + (example * k + rows), mask=inside, other=0.0)[:, None]
        q = tl.zeros_like(p)
        if to_high is not None:
            q = tl.load(to_high + (example * k + rows), mask=inside, other=0.0)[:, None]
        to_l, to_u = tl.where(x > 0, p, q), tl.where(x > 0, q, p)
        if to_lower is not None:
            sum_lower += x * to_l
            sum_upper += x * to_u
        if ls is not None:
            g = tl.load(grad + target, mask=here, other=0.0)
            if to_us is not None:
                sum_ls += tl.where(x > 0, x * g, 0.0)
                sum_us += tl.where(x > 0, 0.0, x * g)
            elif to_ls is not None:
                sum_ls += x * g
        if to_a is not None:
            if us is None:  # at 0 the middle; a step with two slopes takes the upper line there
                to_l = tl.where(x == 0, (p + q) * 0.5, to_l)
                to_u = tl.where(x == 0, (p + q) * 0.5, to_u)
            found = to_l * l + to_u * u
            if ls is not None:
                slope = below
                if us is not None:
                    slope = tl.where(x > 0, below, above)
                found += slope * g
            tl.store(to_a + target, found, mask=here)
    line += part.to(tl.int64) * batch * n
    if to_lower is not None:
        tl.store(to_lower + line, tl.sum(sum_lower, axis=0), mask=there)
        tl.store(to_upper + line, tl.sum(sum_upper, axis=0), mask=there)
    if to_ls is not None:
        tl.store(to_ls + line, tl.sum(sum_ls, axis=0), mask=there)
    if to_us is not None:
        tl.store(to_us + line, tl.sum(sum_us, axis=0), mask=there)


@no_type_check
def _shared(a, ls, us, lower, upper, grad, to_low, to_high, to_a, batch, k, n, chunk):
    """A tile of rows [k, n] that the batch shares: the gradient in them, summed over `chunk` examples."""
    blocks, across = tl.cdiv(k, SHARED_ROWS), tl.cdiv(n, SHARED_COLS)
    columns = tl.program_id(0) % across * SHARED_COLS + tl.arange(0, SHARED_COLS)
    rows = tl.program_id(0) // across % blocks * SHARED_ROWS + tl.arange(0, SHARED_ROWS)
    part = (tl.program_id(0) // across // blocks).to(tl.int64)
    there, inside = columns < n, rows < k
    tile = inside[:, None] & there[None, :]
    place = (rows.to(tl.int64) * n)[:, None] + columns[None, :]
    x = tl.load(a + place, mask=tile, other=0.0)[None, :, :]
    total = tl.zeros((GROUP, SHARED_ROWS, SHARED_COLS), a.dtype.element_ty)
    last = tl.minimum(part * chunk + chunk, batch)
    for start in range(part * chunk, last, GROUP):
        examples = start + tl.arange(0, GROUP)
        now = examples < last
        at, few = (examples * k)[:, None] + rows[None, :], now[:, None] & inside[None, :]
        line, along = (examples * n)[:, None] + columns[None, :], now[:, None] & there[None, :]
        p = tl.load(to_low + at, mask=few, other=0.0)[:, :, None]
        q = tl.zeros_like(p)
        if to_high is not None:
            q = tl.load(to_high + at, mask=few, other=0.0)[:, :, None]
        to_l, to_u = tl.where(x > 0, p, q), tl.where(x > 0, q, p)
        if us is None:
            to_l, to_u = tl.where(x == 0, (p + q) * 0.5, to_l), tl.where(x == 0, (p + q) * 0.5, to_u)
        total += to_l * tl.load(lower + line, mask=along, other=0.0)[:, None, :]
        total += to_u * tl.load(upper + line, mask=along, other=0.0)[:, None, :]
        if ls is not None:
            slope = tl.load(ls + line, mask=along, other=0.0)[:, None, :]
            if us is not None:
                slope = tl.where(x > 0, slope, tl.load(us + line, mask=along, other=0.0)[:, None, :])
            within = now[:, None, None] & tile[None, :, :]
            total += slope * tl.load(grad + ((examples * k * n)[:, None, None] + place[None, :, :]), within, other=0.0)
    tl.store(to_a + (part * k * n + place), tl.sum(total, axis=0), mask=tile)


class _Kernel:
    """A kernel in two variants of each pattern of tensors: for aligned rows, read 16 bytes at a time, and for others.

    Nothing else is compiled in, the sizes least of all: another batch or another number of rows runs the same code.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        names = list(inspect.signature(function).parameters)
        self.aligned = triton.jit(
            function, do_not_specialize=[n for n in ("batch", "k", "step", "chunk") if n in names]
        )
        self.any = triton.jit(function, do_not_specialize=names)

    def launch(self, programs: int, n: int, *arguments: Tensor | int | None) -> None:
        if programs == 0:
            return
        tensors = [t for t in arguments if isinstance(t, Tensor)]
        aligned = n % _ALIGNMENT == 0 and all(t.data_ptr() % _ALIGNMENT == 0 for t in tensors)
        run(self.aligned if aligned else self.any, programs, *arguments)


def run(function: Any, programs: int, *arguments: Tensor | int | None) -> None:
    """Launch on the current device."""
    function[(programs,)](*arguments)


_ROWS, _COLUMNS, _SHARED = _Kernel(_rows), _Kernel(_columns), _Kernel(_shared)


def pull(
    batch: int,
    k: int,
    n: int,
    shared: int,
    a: Tensor,
    ls: Tensor | None,
    li: Tensor,
    us: Tensor | None,
    ui: Tensor,
    pulled: Tensor | None,
    constant: Tensor,
    high: Tensor | None = None,
) -> None:
    """Rows [batch or 1, k, n] through lines [batch, n]."""
    step = 0 if shared else k
    _ROWS.launch(batch * triton.cdiv(k, ROWS.value), n, a, ls, us, li, ui, pulled, constant, high, k, n, step)


def least(batch: int, k: int, n: int, shared: int, a: Tensor, lower: Tensor, upper: Tensor, value: Tensor) -> None:
    pull(batch, k, n, shared, a, None, lower, None, upper, None, value)


def band(
    batch: int,
    k: int,
    n: int,
    shared: int,
    a: Tensor,
    slope: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    pulled: Tensor,
    low: Tensor,
    high: Tensor,
) -> None:
    pull(batch, k, n, shared, a, slope, lower, None, upper, None if slope is None else pulled, low, high)


def push(
    batch: int,
    k: int,
    n: int,
    shared: int,
    a: Tensor,
    ls: Tensor | None,
    li: Tensor,
    us: Tensor | None,
    ui: Tensor,
    grad: Tensor | None,
    column: Tensor,
    to_a: Tensor | None,
    to_ls: Tensor | None,
    to_li: Tensor | None,
    to_us: Tensor | None,
    to_ui: Tensor | None,
    to_high: Tensor | None = None,
) -> None:
    """Gradients in rows of each example's own and in lines; None: not wanted."""
    programs = batch * triton.cdiv(n, COLS.value)
    parts, steps = _parts(programs, triton.cdiv(k, ROWS.value))
    sums = [
        None if t is None else t.new_empty(parts, batch, n) if parts > 1 else t for t in (to_ls, to_us, to_li, to_ui)
    ]
    given = (a, ls, us, li, ui, grad if ls is not None else None, column, to_high)
    sizes = (batch, k, n, 0 if shared else k, steps * ROWS.value)
    _COLUMNS.launch(parts * programs, n, *given, to_a, *sums, *sizes)
    _add(parts, sums, (to_ls, to_us, to_li, to_ui))


def least_back(
    batch: int,
    k: int,
    n: int,
    shared: int,
    a: Tensor,
    lower: Tensor,
    upper: Tensor,
    column: Tensor,
    to_a: Tensor | None,
    to_lower: Tensor | None,
    to_upper: Tensor | None,
) -> None:
    ends = (None, to_lower, None, to_upper)
    push(batch, k, n, shared, a, None, lower, None, upper, None, column, to_a, *ends)


def band_back(
    batch: int,
    k: int,
    n: int,
    shared: int,
    a: Tensor,
    slope: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    grad: Tensor | None,
    to_low: Tensor,
    to_high: Tensor,
    to_a: Tensor | None,
    to_slope: Tensor | None,
    to_lower: Tensor | None,
    to_upper: Tensor | None,
) -> None:
    given = (a, slope, lower, None, upper, grad, to_low, to_a, to_slope, to_lower, None, to_upper)
    push(batch, k, n, shared, *given, to_high)


def shared(
    batch: int,
    k: int,
    n: int,
    a: Tensor,
    ls: Tensor | None,
    li: Tensor,
    us: Tensor | None,
    ui: Tensor,
    grad: Tensor | None,
    column: Tensor,
    to_a: Tensor,
    to_high: Tensor | None = None,
) -> None:
    """Gradient in rows [1, k, n] that the batch shares: summed over it."""
    programs = triton.cdiv(k, SHARED_ROWS.value) * triton.cdiv(n, SHARED_COLS.value)
    parts, steps = _parts(programs, triton.cdiv(batch, GROUP.value))
    total = to_a.new_empty(parts, k, n) if parts > 1 else to_a
    given = (a, ls, us, li, ui, grad if ls is not None else None, column, to_high, total)
    _SHARED.launch(parts * programs, n, *given, batch, k, n, steps * GROUP.value)
    _add(parts, [total], (to_a[0],))


def band_shared(
    batch: int,
    k: int,
    n: int,
    a: Tensor,
    slope: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    grad: Tensor | None,
    to_low: Tensor,
    to_high: Tensor,
    to_a: Tensor,
) -> None:
    shared(batch, k, n, a, slope, lower, None, upper, grad, to_low, to_a, to_high)


def _parts(programs: int, steps: int) -> tuple[int, int]:
    """How many programs share a loop of that many steps, and how many steps each makes."""
    parts = max(1, min(steps // _LEAST_STEPS, _ENOUGH // max(programs, 1)))
    each = max(1, -(-steps // parts))
    return max(1, -(-steps // each)), each


def _add(parts: int, sums: list[Tensor | None], found: tuple[Tensor | None, ...]) -> None:
    if parts > 1:
        for part, whole in zip(sums, found, strict=True):
            if part is not None and whole is not None:
                torch.sum(part, 0, out=whole)
