"""Rows pulled back through a convolution: PyTorch's transposed convolution, or a pass of our own where that is faster.

With few channels on the image's side (the first layer of most networks) PyTorch's reaches some 5 GFLOP/s on a CPU; the
compiled pass (`convolution.c`) runs over whole planes instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from optrelax.autograd_contexts import Context
from optrelax.kernels import native

Pair = tuple[int, int]


def pair(sides: Iterable[int]) -> Pair:
    """Height and width, of an image or a kernel, as the two that they are."""
    high, wide = sides
    return high, wide


_FEW = 4  # channels a group of the image up to which the compiled pass is faster; level with PyTorch at 8


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """Settings of a convolution, one number a dimension of the image."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def pull_rows(a: Tensor, weight: Tensor, geometry: ConvGeometry, image: Pair) -> Tensor:
    """The transpose of a convolution: a [n, out, high, wide], weight [out, in / groups, kh, kw] -> [n, in, *image].

    image: rows and columns of the convolution's input, which its strides do not tell.
    Gradient: exact, to any order.
    """
    if weight.shape[1] <= _FEW and kernels().supports(a, weight):
        found: Tensor = _Pull.apply(*native.laid_out(a, weight), geometry, image)
        return found
    return _transposed(a, weight, geometry, image)


_SIGNATURES = (
    "pull(int64 geometry[16], a[], weight[], image[])",
    "pull_back(int64 geometry[16], a[], weight[], image[], to_a?[], to_weight?[])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled passes, or why there are none."""
    return native.build(Path(__file__).with_name("convolution.c"), *_SIGNATURES)


def _transposed(a: Tensor, weight: Tensor, geometry: ConvGeometry, image: Pair) -> Tensor:
    g = geometry
    # What the strides left over at the far edge is part of the image too (as zeros).
    leftover = [
        n - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, o, s, p, d, k in zip(image, a.shape[2:], g.stride, g.padding, g.dilation, weight.shape[2:], strict=True)
    ]
    return F.conv_transpose2d(a, weight, None, g.stride, g.padding, leftover, g.groups, g.dilation)


class _Pull(torch.autograd.Function):
    """Keeps the rows and the weight."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, weight: Tensor, geometry: ConvGeometry, image: Pair) -> Tensor:
        a, weight = a.contiguous(), weight.contiguous()
        ctx.save_for_backward(a, weight)
        ctx.geometry = geometry
        found = a.new_empty(a.shape[0], weight.shape[1] * geometry.groups, *image)
        kernels().call("pull", a.dtype, _numbers(a, weight, geometry, found), a, weight, found)
        return found

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, weight = ctx.saved_tensors
        g, need = ctx.geometry, ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            settings = (g.stride, g.padding, g.dilation, g.groups)
            to_a = F.conv2d(grad, weight, None, *settings) if need[0] else None
            to_weight = conv2d_weight(grad, weight.shape, a, *settings) if need[1] else None
            return to_a, to_weight, None, None
        grad = grad.contiguous()
        to_a = torch.empty_like(a) if need[0] else None
        to_weight = torch.empty_like(weight) if need[1] else None
        kernels().call("pull_back", a.dtype, _numbers(a, weight, g, grad), a, weight, grad, to_a, to_weight)
        return to_a, to_weight, None, None


def _numbers(a: Tensor, weight: Tensor, g: ConvGeometry, image: Tensor) -> Tensor:
    """The geometry as the kernels read it."""
    resolutions = (*a.shape[2:], *image.shape[2:], *weight.shape[2:])
    numbers = [*a.shape[:2], image.shape[1], g.groups, *resolutions, *g.stride, *g.padding, *g.dilation]
    return torch.tensor(numbers, device="cpu")
