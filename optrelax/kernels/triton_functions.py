"""The three functions that Triton compiles: see `triton_kernels`, which launches them."""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

# A tile: lines are read once for ROWS rows, and a warp reads 128 neurons of a row at once.
ROWS = tl.constexpr(8)
COLS = tl.constexpr(128)
# The tile of the gradient in shared rows: GROUP examples at once, or there would be too few programs.
GROUP = tl.constexpr(4)
SHARED_ROWS = tl.constexpr(4)
SHARED_COLS = tl.constexpr(64)


@no_type_check  # Triton's own types: the names of the tensors stand for pointers
def rows_through(a, ls, us, lower, upper, pulled, low, high, k, n, step):
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
def gradient_in_lines(
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
def gradient_in_shared_rows(a, ls, us, lower, upper, grad, to_low, to_high, to_a, batch, k, n, chunk):
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
