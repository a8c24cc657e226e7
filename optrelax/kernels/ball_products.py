"""A ball through a matrix W, center W^T and radius |W|^T, and the gradient, in passes that share what products read.

A library's products read W and the ball twice, and want |W| and the parts of a gradient written out: for matrices that
fit the caches, that costs as much again as the products. Compiled, on a CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.kernels import native

_SIGNATURES = (
    "pair(n, m, k, center[n * k], radius[n * k], weight[k * m], down, across, bias?[m], to_center[n * m], "
    "to_radius[n * m])",
    "to_weight(n, k, m, weight[m * k], to_center[n * m], to_radius[n * m], center[n * k], radius[n * k], room[], "
    "found[m * k])",
)


@functools.cache
def kernels() -> native.Build:
    """The products compiled for a CPU, or why there are none."""
    return native.build(Path(__file__).with_name("ball_products.c"), *_SIGNATURES)


@functools.cache
def _tile() -> tuple[int, int]:
    """Examples whose gradients are laid out at a time, and rows of a tile."""
    return kernels().constant("SHORT"), kernels().constant("ROWS")


def through(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """center W^T + b and radius |W|^T for center and radius [n, in], W [out, in]: [n, out] each."""
    (n, k), m = center.shape, weight.shape[0]
    found = center.new_empty(n, m), center.new_empty(n, m)
    bias = None if bias is None else bias.contiguous()
    kernels().call("pair", center.dtype, n, m, k, center, radius, weight, 1, k, bias, *found)
    return found


def to_ball(to_center: Tensor, to_radius: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in the ball, [n, in], by those of what `through` found, [n, out]."""
    (n, k), m = to_center.shape, weight.shape[1]
    found = to_center.new_empty(n, m), to_center.new_empty(n, m)
    kernels().call("pair", to_center.dtype, n, m, k, to_center, to_radius, weight, m, 1, None, *found)
    return found


def to_weight(to_center: Tensor, to_radius: Tensor, center: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
    """Gradient in W, [out, in]; that of |w| at 0 is 0."""
    (n, k), m = center.shape, weight.shape[0]
    short, rows = _tile()
    room = weight.new_empty(2 * min(n, short) * (m + rows))
    found = torch.empty_like(weight)
    given = (weight, to_center, to_radius, center, radius, room, found)
    kernels().call("to_weight", weight.dtype, n, k, m, *given)
    return found


class LinearBall(torch.autograd.Function):
    """Center and radius [n, in] through a matrix W [out, in]: c W^T + b, r |W|^T."""

    @staticmethod
    def forward(
        ctx: Context, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        center, radius, weight = center.contiguous(), radius.contiguous(), weight.contiguous()
        ctx.save_for_backward(center, radius, weight)
        return through(center, radius, weight, bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        to_c, to_r = grads
        to_bias = to_c.sum(0) if need[3] else None
        if torch.is_grad_enabled():  # to be differentiated again
            to_w = to_c.mT @ center + weight.sign() * (to_r.mT @ radius) if need[2] else None
            return to_c @ weight, to_r @ weight.abs(), to_w, to_bias
        to_c, to_r = to_c.contiguous(), to_r.contiguous()
        to_center, to_radius = to_ball(to_c, to_r, weight) if need[0] or need[1] else (None, None)
        return to_center, to_radius, to_weight(to_c, to_r, center, radius, weight) if need[2] else None, to_bias
