"""The relaxation step between parallel lines: one row gives the lower and the upper bound, from one read.

Where both lines of every activation share their slope (DeepZ, Fast-Lin), the coefficients of a row and of its negative
differ in sign alone: half the products of back-substitution are enough. Compiled on a CPU (`band_step.c`), Triton's on
a CUDA device (`triton_kernels.py`); elsewhere, and where the gradient is to be differentiated again, PyTorch's
operations do the same.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.domains.lines import Lines
from optrelax.kernels import native
from optrelax.kernels.relax_step import columns, rows_dot
from optrelax.kernels.triton_steps import passes
from optrelax.networks.ops import flatten_from


def band_step(a: Tensor, lines: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """Pull rows through an activation between parallel lines.

    a [batch or 1, k, *shape], lines [batch, *shape] -> coefficients [batch, k, *shape], and the constants of the lower
    and of the upper bound, [batch, k] each.
    Gradient: exact, to any order; in a coefficient of 0 the middle of the band.
    """
    shape = lines.lower_slope.shape
    flat = [flatten_from(t, 1) for t in (lines.lower_slope, lines.lower_intercept, lines.upper_intercept)]
    pulled, low, high = _Band.apply(*native.laid_out(flatten_from(a, 2), *flat))
    return pulled.reshape(*pulled.shape[:2], *shape[1:]), low, high


def range_over_box(a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row over a box: a [batch or 1, k, *shape], ends [batch, *shape] -> [batch, k].

    Gradient: exact, to any order; in a coefficient of 0 the middle of the box.
    """
    found: tuple[Tensor, Tensor] = _Range.apply(
        *native.laid_out(flatten_from(a, 2), flatten_from(lower, 1), flatten_from(upper, 1))
    )
    return found


_SIGNATURES = (
    "band(batch, k, n, shared, a[(1 if shared else batch) * k * n], slope?[batch * n], lower[batch * n], "
    "upper[batch * n], pulled?[batch * k * n], low[batch * k], high[batch * k])",
    "band_back(batch, k, n, shared, a[(1 if shared else batch) * k * n], slope?[batch * n], lower[batch * n], "
    "upper[batch * n], grad?[batch * k * n], to_low[batch * k], to_high[batch * k], to_a?[(1 if shared else "
    "batch) * k * n], to_slope?[batch * n], to_lower?[batch * n], to_upper?[batch * n])",
    "band_shared(batch, k, n, a[k * n], slope?[batch * n], lower[batch * n], upper[batch * n], grad?[batch * k * "
    "n], to_low[batch * k], to_high[batch * k], to_a[k * n])",
)


@functools.cache
def kernels() -> native.Build:
    """The step compiled for a CPU, or why there is none."""
    return native.build(Path(__file__).with_name("band_step.c"), *_SIGNATURES)


class _Band(torch.autograd.Function):
    """Saves the rows and the lines only."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by = passes(kernels(), a, slope, lower, upper)
        if by is not None:
            a, slope, lower, upper = (t.contiguous() for t in (a, slope, lower, upper))
            ctx.save_for_backward(a, slope, lower, upper)
            return _compiled(by, a, slope, lower, upper)
        ctx.save_for_backward(a, slope, lower, upper)
        return (a * slope[:, None], *_eager_range(a, lower, upper))

    @staticmethod
    def backward(ctx: Context, grad: Tensor, to_low: Tensor, to_high: Tensor) -> tuple[Tensor | None, ...]:
        a, slope, lower, upper = ctx.saved_tensors
        need = ctx.needs_input_grad
        by = None if torch.is_grad_enabled() else passes(kernels(), a, slope, lower, upper)
        if by is not None:
            return _compiled_gradient(by, a, slope, lower, upper, grad, to_low, to_high, need)
        found = _eager_gradient(a, lower, upper, to_low, to_high, (need[0], *need[2:]))
        to_a = found[0]
        if need[0]:
            part = grad * slope[:, None]
            to_a = to_a + (part.sum(0, keepdim=True) if a.shape[0] != part.shape[0] else part)
        return to_a, (grad * a).sum(1) if need[1] else None, *found[1:]


class _Range(torch.autograd.Function):
    """Saves the rows and the box only."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        by = passes(kernels(), a, lower, upper)
        if by is not None:
            a, lower, upper = (t.contiguous() for t in (a, lower, upper))
            ctx.save_for_backward(a, lower, upper)
            return _compiled(by, a, None, lower, upper)[1:]
        ctx.save_for_backward(a, lower, upper)
        return _eager_range(a, lower, upper)

    @staticmethod
    def backward(ctx: Context, to_low: Tensor, to_high: Tensor) -> tuple[Tensor | None, ...]:
        a, lower, upper = ctx.saved_tensors
        need = ctx.needs_input_grad
        by = None if torch.is_grad_enabled() else passes(kernels(), a, lower, upper)
        if by is not None:
            needed = (need[0], False, *need[1:])
            to_a, _, *ends = _compiled_gradient(by, a, None, lower, upper, None, to_low, to_high, needed)
            return to_a, *ends
        return _eager_gradient(a, lower, upper, to_low, to_high, need)


def _eager_range(a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    middle, spread = rows_dot(a, (lower + upper) / 2), rows_dot(a.abs(), (upper - lower) / 2)
    return middle - spread, middle + spread


def _eager_gradient(
    a: Tensor, lower: Tensor, upper: Tensor, to_low: Tensor, to_high: Tensor, need: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Gradients of the range in rows and ends, where they are needed."""
    to_a = to_lower = to_upper = None
    if need[0]:
        both, apart = (to_low + to_high)[..., None], (to_high - to_low)[..., None]
        to_a = both * ((lower + upper) / 2)[:, None] + apart * a.sign() * ((upper - lower) / 2)[:, None]
        if a.shape[0] != to_a.shape[0]:
            to_a = to_a.sum(0, keepdim=True)
    positive = a.relu()
    negative = a - positive
    if need[1]:
        to_lower = columns(positive, to_low) + columns(negative, to_high)
    if need[2]:
        to_upper = columns(negative, to_low) + columns(positive, to_high)
    return to_a, to_lower, to_upper


def _compiled(
    by: native.Kernels, a: Tensor, slope: Tensor | None, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, k, n = lower.shape[0], *a.shape[1:]
    pulled = a.new_empty(0 if slope is None else batch, k, n)
    low, high = a.new_empty(batch, k), a.new_empty(batch, k)
    sizes = (batch, k, n, int(a.shape[0] != batch))
    by.call("band", a.dtype, *sizes, a, slope, lower, upper, None if slope is None else pulled, low, high)
    return pulled, low, high


def _compiled_gradient(
    by: native.Kernels,
    a: Tensor,
    slope: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    grad: Tensor | None,
    to_low: Tensor,
    to_high: Tensor,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of rows, slopes and ends where they are needed."""
    batch, k, n = lower.shape[0], *a.shape[1:]
    shared = a.shape[0] != batch
    grad = None if grad is None else grad.contiguous()
    given = (a, slope, lower, upper, grad, to_low.contiguous(), to_high.contiguous())
    to_a = torch.empty_like(a) if need[0] else None
    to_slope = torch.empty_like(lower) if need[1] else None
    ends = [torch.empty_like(lower) if need[2] or need[3] else None for _ in range(2)]
    own = None if shared else to_a
    if own is not None or to_slope is not None or ends[0] is not None:
        by.call("band_back", a.dtype, batch, k, n, int(shared), *given, own, to_slope, *ends)
    if shared and to_a is not None:
        by.call("band_shared", a.dtype, batch, k, n, *given, to_a)
    return to_a, to_slope, *(t if wanted else None for t, wanted in zip(ends, need[2:], strict=True))
