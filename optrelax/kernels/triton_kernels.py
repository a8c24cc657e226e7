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
from typing import Any

import torch
import triton
from torch import Tensor

from optrelax.kernels.triton_functions import (
    COLS,
    GROUP,
    ROWS,
    SHARED_COLS,
    SHARED_ROWS,
    gradient_in_lines,
    gradient_in_shared_rows,
    rows_through,
)

_ENOUGH = 1024  # programs that fill a large device; with fewer, sums are split
_LEAST_STEPS = 4  # of the loop in each part, so that adding the parts costs little
_ALIGNMENT = 16


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


_ROWS, _COLUMNS, _SHARED = (_Kernel(f) for f in (rows_through, gradient_in_lines, gradient_in_shared_rows))


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
