"""Means and maxima over windows, and interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks.calls import Call, Op
from optrelax.networks.images import AveragePool2d
from optrelax.networks.linear_maps import Separable, axis_matrix
from optrelax.networks.maxima import Greatest, MaxPool
from optrelax.networks.ops import Shape
from optrelax.networks.registry import rule
from optrelax.networks.rules.convolutions import numbers, spatial

aten = torch.ops.aten


@rule(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
def average_pool(call: Call) -> Op:
    rank = int(call.target[len("avg_pool")])
    shape, kernel = spatial(call, rank), numbers(call["kernel_size"], rank)
    stride, padding = numbers(call["stride"] or kernel, rank), numbers(call["padding"], rank)
    divisor = call["divisor_override"] if "divisor_override" in call.names else None
    counted, ceil_mode = bool(call["count_include_pad"]), bool(call["ceil_mode"])
    if rank == 2 and not ceil_mode:
        by = math.prod(kernel) if divisor is None and counted else divisor
        geometry = ConvGeometry(stride, padding)
        return AveragePool2d(shape, (kernel[0], kernel[1]), geometry, None if by is None else float(by))
    matrices = {}
    for d, (n, k, s, p) in enumerate(zip(shape[1:], kernel, stride, padding, strict=True), start=1):
        pool = partial(F.avg_pool1d, kernel_size=k, stride=s, padding=p, ceil_mode=ceil_mode, count_include_pad=counted)
        matrices[d] = axis_matrix(pool, n)
        if divisor is not None:  # sums instead: every window's entries count the same
            matrices[d] = (matrices[d] != 0).double() / (divisor if d == 1 else 1)
    return Separable(shape, matrices)


@rule(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, aten._adaptive_avg_pool2d)
def adaptive_average_pool(call: Call) -> Op:
    out = call.output[1:]
    shape = spatial(call, len(out))
    if len(out) == 2 and all(n % o == 0 for n, o in zip(shape[1:], out, strict=True)):
        kernel = (shape[1] // out[0], shape[2] // out[1])
        return AveragePool2d(shape, kernel, ConvGeometry(kernel), float(math.prod(kernel)))
    sizes = enumerate(zip(shape[1:], out, strict=True), start=1)
    return Separable(shape, {d: axis_matrix(partial(F.adaptive_avg_pool1d, output_size=o), n) for d, (n, o) in sizes})


@rule(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)
def max_pool(call: Call) -> Op:
    rank = int(call.target[len("max_pool")])
    kernel = numbers(call["kernel_size"], rank)
    stride = numbers(call["stride"] or kernel, rank)
    padding, dilation = numbers(call["padding"], rank), numbers(call["dilation"], rank)
    return MaxPool(spatial(call, rank), kernel, stride, padding, dilation, bool(call["ceil_mode"]))


@rule(aten.max_pool1d_with_indices, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices)
def max_pool_with_indices(call: Call) -> tuple[Op, None]:
    return max_pool(call), None


@rule(aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d)
def adaptive_max_pool(call: Call) -> tuple[Op, None]:
    out = call.output[1:]
    shape = spatial(call, len(out))
    places = []
    for n, o in zip(shape[1:], out, strict=True):
        ranges = [(i * n // o, -(-(i + 1) * n // o)) for i in range(o)]
        most = max(stop - start for start, stop in ranges)
        places.append(torch.tensor([[*range(a, b), *[-1] * (most - b + a)] for a, b in ranges], device="cpu"))
    return Greatest.on_image(shape, places), None


@rule(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d)
def linear_interpolation(call: Call) -> Op:
    def resize(out: int, factor: float | None, x: Tensor) -> Tensor:
        found: Tensor = aten.upsample_linear1d.default(x, [out], bool(call["align_corners"]), factor)
        return found

    return _interpolated(call, resize)


@rule(aten.upsample_bicubic2d)
def cubic_interpolation(call: Call) -> Op:
    return _interpolated(call, _in_a_column(call, aten.upsample_bicubic2d.default))


Resize = Callable[[int, float | None, Tensor], Tensor]  # new size, the factor asked for, signals [batch, 1, n]


def _in_a_column(call: Call, op: Any) -> Resize:
    """An op of images that have one column."""

    def resize(out: int, factor: float | None, x: Tensor) -> Tensor:
        found: Tensor = op(x[..., None], [out, 1], bool(call["align_corners"]), factor, None)[..., 0]
        return found

    return resize


def _interpolated(call: Call, resize: Resize) -> Op:
    """One matrix a dimension: what the op makes of single ones."""
    out = call.output[1:]
    shape: Shape = spatial(call, len(out))
    factors = call["scale_factors"] if "scale_factors" in call.names else None
    matrices = {}
    for d, (n, o) in enumerate(zip(shape[1:], out, strict=True), start=1):
        factor = None if factors is None else float(factors[d - 1])
        matrices[d] = axis_matrix(partial(resize, o, factor), n)
    return Separable(shape, matrices)
