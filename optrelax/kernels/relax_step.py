"""The relaxation step of back-substitution: rows choose a line by sign, in one pass, with a hand-written gradient.

On a CPU the pass is compiled (`relax_step.c`), on a CUDA device Triton makes it (`triton_kernels.py`). Without a
compiler or Triton, and where the gradient is to be differentiated again, PyTorch's operations do the same.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.domains.lines import Lines
from optrelax.kernels import native
from optrelax.kernels.triton_steps import passes
from optrelax.networks.ops import flatten_from


def relax_step(a: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """Pull rows through an activation: positive coefficients take the lower line, negative ones the upper.

    a [batch or 1, k, *shape], lines [batch, *shape] -> coefficients [batch, k, *shape], constant [batch, k].
    Gradient: exact, to any order; at a coefficient of 0 the upper line's slope.
    """
    shape = lines.lower_slope.shape
    flat = [
        flatten_from(t, 1) for t in (lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept)
    ]
    pulled, constant = _RelaxStep.apply(*native.laid_out(flatten_from(a, 2), *flat), lines.parallel)
    return pulled.reshape(*pulled.shape[:2], *shape[1:]), constant


def least_over_box(a: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Least value of each row over a box: a [batch or 1, k, *shape], ends [batch, *shape] -> [batch, k].

    Gradient: exact, to any order; in a coefficient of 0 the middle of the box.
    """
    found: Tensor = _LeastOverBox.apply(
        *native.laid_out(flatten_from(a, 2), flatten_from(lower, 1), flatten_from(upper, 1))
    )
    return found


_SIGNATURES = (
    "pull(batch, k, n, shared, a[(1 if shared else batch) * k * n], ls[batch * n], li[batch * n], us[batch * n], "
    "ui[batch * n], pulled[batch * k * n], constant[batch * k])",
    "push(batch, k, n, shared, a[(1 if shared else batch) * k * n], ls[batch * n], li[batch * n], us[batch * n], "
    "ui[batch * n], grad[batch * k * n], column[batch * k], to_a?[(1 if shared else batch) * k * n], to_ls?[batch "
    "* n], to_li?[batch * n], to_us?[batch * n], to_ui?[batch * n])",
    "shared(batch, k, n, a[k * n], ls[batch * n], li[batch * n], us[batch * n], ui[batch * n], grad[batch * k * "
    "n], column[batch * k], to_a[k * n])",
    "least(batch, k, n, shared, a[(1 if shared else batch) * k * n], lower[batch * n], upper[batch * n], "
    "value[batch * k])",
    "least_back(batch, k, n, shared, a[(1 if shared else batch) * k * n], lower[batch * n], upper[batch * n], "
    "column[batch * k], to_a?[(1 if shared else batch) * k * n], to_lower?[batch * n], to_upper?[batch * n])",
)


@functools.cache
def kernels() -> native.Build:
    """The step compiled for a CPU, or why there is none."""
    return native.build(Path(__file__).with_name("relax_step.c"), *_SIGNATURES)


def rows_dot(rows: Tensor, vector: Tensor) -> Tensor:
    """[batch or 1, k, n] times [batch, n] -> [batch, k], without copying shared rows."""
    if rows.shape[0] == 1:
        return vector @ rows[0].mT
    return (rows @ vector[..., None])[..., 0]


class _RelaxStep(torch.autograd.Function):
    """Saves the rows and the lines only: the sign choice is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Context, a: Tensor, ls: Tensor, li: Tensor, us: Tensor, ui: Tensor, parallel: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.parallel = parallel
        by = passes(kernels(), a, ls, li, us, ui)
        if by is not None:
            a, ls, li, us, ui = (t.contiguous() for t in (a, ls, li, us, ui))
            ctx.save_for_backward(a, ls, li, us, ui)
            return _compiled_step(by, a, ls, li, us, ui)
        ctx.save_for_backward(a, ls, li, us, ui)
        # constant = a+ . li + a- . ui = a . mid - |a| . half: products instead of choices
        constant = rows_dot(a, (li + ui) / 2) - rows_dot(a.abs(), (ui - li) / 2)
        if parallel:
            return a * ls[:, None], constant
        # a+ ls + a- us: one of the two products is 0, so the sum is exact; torch.where takes several times as long.
        positive = a.relu()
        negative = a - positive
        pulled = positive * ls[:, None] if a.shape[0] != ls.shape[0] else positive.mul_(ls[:, None])
        return pulled.addcmul_(negative, us[:, None]), constant

    @staticmethod
    def backward(ctx: Context, grad: Tensor, grad_constant: Tensor) -> tuple[Tensor | None, ...]:
        a, ls, li, us, ui = ctx.saved_tensors
        need = ctx.needs_input_grad
        by = None if torch.is_grad_enabled() else passes(kernels(), a, ls, li, us, ui)
        if by is not None:
            if ctx.parallel:  # one slope, which stands in both places
                need = (need[0], need[1] or need[3], need[2], need[1] or need[3], need[4])
            found = _compiled_gradient(by, a, ls, li, us, ui, grad.contiguous(), grad_constant.contiguous(), need)
            if ctx.parallel and found[1] is not None and found[3] is not None:
                found[1], found[3] = found[1] + found[3], None
            return (*found, None)
        positive = a.relu()
        negative = a - positive
        column = grad_constant[..., None]
        grad_a = grad_ls = grad_us = None
        if need[0]:
            lower = positive.sign()  # 1 where the lower line was taken; lerp is exact at 0 and 1
            slope = ls[:, None] if ctx.parallel else torch.lerp(us[:, None], ls[:, None], lower)
            grad_a = slope * grad
            grad_a.addcmul_(torch.lerp(ui[:, None], li[:, None], lower), column)
            if a.shape[0] == 1 and grad_a.shape[0] != 1:
                grad_a = grad_a.sum(0, keepdim=True)
        if ctx.parallel:
            grad_ls = (grad * a).sum(1) if need[1] or need[3] else None
        else:
            grad_ls = (grad * positive).sum(1) if need[1] else None
            grad_us = (grad * negative).sum(1) if need[3] else None
        grad_li = columns(positive, grad_constant) if need[2] else None
        grad_ui = columns(negative, grad_constant) if need[4] else None
        return grad_a, grad_ls, grad_li, grad_us, grad_ui, None


class _LeastOverBox(torch.autograd.Function):
    """Saves the rows and the box only."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        by = passes(kernels(), a, lower, upper)
        if by is None:
            ctx.save_for_backward(a, lower, upper)
            return rows_dot(a, (lower + upper) / 2) - rows_dot(a.abs(), (upper - lower) / 2)
        a, lower, upper = (t.contiguous() for t in (a, lower, upper))
        ctx.save_for_backward(a, lower, upper)
        batch, k, n = lower.shape[0], *a.shape[1:]
        value = a.new_empty(batch, k)
        by.call("least", a.dtype, batch, k, n, int(a.shape[0] != batch), a, lower, upper, value)
        return value

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, lower, upper = ctx.saved_tensors
        need = ctx.needs_input_grad
        shared = a.shape[0] != lower.shape[0]
        grad_a = grad_lower = grad_upper = None
        if need[0] and shared:
            # [k, n]: sums over the batch are products.
            sign = a[0].sign()
            grad_a = (grad.mT @ (lower + upper) - sign * (grad.mT @ (upper - lower)))[None] / 2
        by = None if torch.is_grad_enabled() else passes(kernels(), a, lower, upper)
        if by is not None:
            grad_a = torch.empty_like(a) if need[0] and not shared else grad_a
            ends = [torch.empty_like(lower) if need[1] or need[2] else None for _ in range(2)]
            own = None if shared else grad_a
            if own is not None or ends[0] is not None:
                sizes = (lower.shape[0], *a.shape[1:], int(shared))
                by.call("least_back", a.dtype, *sizes, a, lower, upper, grad.contiguous(), own, *ends)
            return grad_a, *(t if wanted else None for t, wanted in zip(ends, need[1:], strict=True))
        if need[0] and not shared:
            half = (upper - lower)[:, None] / 2
            grad_a = ((lower + upper)[:, None] / 2 - a.sign() * half) * grad[..., None]
        positive = a.relu()
        if need[1]:
            grad_lower = columns(positive, grad)
        if need[2]:
            grad_upper = columns(a - positive, grad)
        return grad_a, grad_lower, grad_upper


def _compiled_step(
    by: native.Kernels, a: Tensor, ls: Tensor, li: Tensor, us: Tensor, ui: Tensor
) -> tuple[Tensor, Tensor]:
    batch, k, n = ls.shape[0], *a.shape[1:]
    pulled, constant = a.new_empty(batch, k, n), a.new_empty(batch, k)
    shared = int(a.shape[0] != batch)
    by.call("pull", a.dtype, batch, k, n, shared, a, ls, li, us, ui, pulled, constant)
    return pulled, constant


def _compiled_gradient(
    by: native.Kernels,
    a: Tensor,
    ls: Tensor,
    li: Tensor,
    us: Tensor,
    ui: Tensor,
    grad: Tensor,
    column: Tensor,
    need: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of rows and lines where they are needed."""
    batch, k, n = ls.shape[0], *a.shape[1:]
    shared = a.shape[0] != batch
    given = (a, ls, li, us, ui, grad, column)
    to_a = torch.empty_like(a) if need[0] else None
    to_lines = [torch.empty_like(ls) if any(need[1:5]) else None for _ in range(4)]
    own = None if shared else to_a
    if own is not None or to_lines[0] is not None:
        by.call("push", a.dtype, batch, k, n, int(shared), *given, own, *to_lines)
    if shared and to_a is not None:
        by.call("shared", a.dtype, batch, k, n, *given, to_a)
    return [to_a, *(t if wanted else None for t, wanted in zip(to_lines, need[1:5], strict=True))]


def columns(rows: Tensor, weight: Tensor) -> Tensor:
    """Sum over rows of rows * weight: [batch or 1, k, n], [batch, k] -> [batch, n]."""
    if rows.shape[0] == 1:
        return weight @ rows[0]
    return (weight[:, None] @ rows)[:, 0]
