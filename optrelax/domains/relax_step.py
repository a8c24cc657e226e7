"""The relaxation step of back-substitution: rows choose a line by sign, in one pass, with a hand-written gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optrelax.lines import Lines
from optrelax.ops import flatten_from


def relax_step(a: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """Pull rows through an activation: positive coefficients take the lower line, negative ones the upper.

    a [batch or 1, k, *shape], lines [batch, *shape] -> coefficients [batch, k, *shape], constant [batch, k].
    Gradient: exact; at a coefficient of 0 the upper line's slope.  A double backward raises RuntimeError.
    """
    shape = lines.lower_slope.shape
    flat = [
        flatten_from(t, 1) for t in (lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept)
    ]
    pulled, constant = _RelaxStep.apply(flatten_from(a, 2), *flat, lines.parallel)
    return pulled.reshape(*pulled.shape[:2], *shape[1:]), constant


def _rows_dot(rows: Tensor, vector: Tensor) -> Tensor:
    """[batch or 1, k, n] times [batch, n] -> [batch, k], without copying shared rows."""
    if rows.shape[0] == 1:
        return vector @ rows[0].mT
    return (rows @ vector[..., None])[..., 0]


class _RelaxStep(torch.autograd.Function):
    """Saves the rows and the lines only: the sign choice is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, ls: Tensor, li: Tensor, us: Tensor, ui: Tensor, parallel: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, ls, li, us, ui)
        ctx.parallel = parallel
        # constant = a+ . li + a- . ui = a . mid - |a| . half: products instead of choices
        constant = _rows_dot(a, (li + ui) / 2) - _rows_dot(a.abs(), (ui - li) / 2)
        if parallel:
            return a * ls[:, None], constant
        # a+ ls + a- us: one of the two products is 0, so the sum is exact; torch.where takes several times as long.
        positive = a.relu()
        negative = a - positive
        pulled = positive * ls[:, None] if a.shape[0] != ls.shape[0] else positive.mul_(ls[:, None])
        return pulled.addcmul_(negative, us[:, None]), constant

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_constant: Tensor) -> tuple[Tensor | None, ...]:
        a, ls, li, us, ui = ctx.saved_tensors
        need = ctx.needs_input_grad
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
        grad_li = _columns(positive, grad_constant) if need[2] else None
        grad_ui = _columns(negative, grad_constant) if need[4] else None
        return grad_a, grad_ls, grad_li, grad_us, grad_ui, None


def _columns(rows: Tensor, weight: Tensor) -> Tensor:
    """Sum over rows of rows * weight: [batch or 1, k, n], [batch, k] -> [batch, n]."""
    if rows.shape[0] == 1:
        return weight @ rows[0]
    return (weight[:, None] @ rows)[:, 0]
