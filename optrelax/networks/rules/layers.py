"""Layers with weights, and pools: linear, convolution, normalisation, average and maximum over windows."""

from __future__ import annotations

import math
from typing import Any

import torch

from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks.calls import Call, Op, Refused
from optrelax.networks.ops import AveragePool2d, BatchNorm, Conv2d, Linear, MaxPool2d, Shape
from optrelax.networks.registry import rule

aten = torch.ops.aten


def pair(value: Any) -> tuple[int, int]:
    """One number or two as two."""
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    return int(first), int(second)


@rule(aten.linear)
def linear(call: Call) -> Op:
    call.only(0)
    weight = call.constant(1)
    assert weight is not None
    return Linear(call.shape(), weight, call.constant(2))


@rule(aten.conv2d.default)
def conv2d(call: Call) -> Op:
    return _conv2d(call, pair(call["padding"]))


@rule(aten.conv2d.padding)
def conv2d_by_name(call: Call) -> Op:
    if call["padding"] == "valid":
        return _conv2d(call, (0, 0))
    kernel = call.args[1].shape[2:]
    total = [d * (k - 1) for d, k in zip(pair(call["dilation"]), kernel, strict=True)]
    if any(t % 2 for t in total):
        raise Refused("padding='same' with an even kernel pads unevenly; pad by numbers")
    return _conv2d(call, (total[0] // 2, total[1] // 2))


def _conv2d(call: Call, padding: tuple[int, int]) -> Op:
    call.only(0)
    weight = call.constant(1)
    assert weight is not None
    geometry = ConvGeometry(pair(call["stride"]), padding, pair(call["dilation"]), int(call["groups"]))
    return Conv2d(_image(call), weight, call.constant(2), geometry)


def _image(call: Call) -> Shape:
    shape = call.shape()
    if len(shape) != 3:
        raise Refused(f"takes a batch of [c, h, w], got {shape} (an input without a batch dimension mixes the batch)")
    return shape


@rule(aten.batch_norm)
def batch_norm(call: Call) -> Op:
    call.only(0)
    mean, variance = call.constant(3), call.constant(4)
    if mean is None or variance is None:
        raise Refused("without running statistics it mixes the batch; track_running_stats=True")
    if call["training"]:
        raise Refused("is in training mode; call .eval()")
    return BatchNorm(call.shape(), call["eps"], mean, variance, call.constant(1), call.constant(2))


@rule(aten._native_batch_norm_legit_no_training)
def batch_norm_of_statistics(call: Call) -> tuple[Op, None, None]:
    call.only(0)
    mean, variance = call.constant(3), call.constant(4)
    assert mean is not None
    assert variance is not None
    return BatchNorm(call.shape(), call["eps"], mean, variance, call.constant(1), call.constant(2)), None, None


@rule(aten.avg_pool2d)
def avg_pool2d(call: Call) -> Op:
    if call["ceil_mode"]:
        raise Refused("ceil_mode=True has no rule; pad the input instead")
    size, divisor = pair(call["kernel_size"]), call["divisor_override"]
    if divisor is None and call["count_include_pad"]:
        divisor = math.prod(size)
    geometry = ConvGeometry(pair(call["stride"] or size), pair(call["padding"]))
    return AveragePool2d(_image(call), size, geometry, None if divisor is None else float(divisor))


@rule(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d)
def adaptive_avg_pool2d(call: Call) -> Op:
    shape, out = _image(call), call.output[1:]
    if any(n % o for n, o in zip(shape[1:], out, strict=True)):
        raise Refused(f"output {out} does not divide the input {shape[1:]}")
    kernel = (shape[1] // out[0], shape[2] // out[1])
    return AveragePool2d(shape, kernel, ConvGeometry(kernel), float(math.prod(kernel)))


@rule(aten.max_pool2d)
def max_pool2d(call: Call) -> Op:
    if call["ceil_mode"]:
        raise Refused("ceil_mode=True has no rule; pad the input instead")
    size = pair(call["kernel_size"])
    geometry = ConvGeometry(pair(call["stride"] or size), pair(call["padding"]), pair(call["dilation"]))
    return MaxPool2d(_image(call), size, geometry)


@rule(aten.max_pool2d_with_indices)
def max_pool2d_with_indices(call: Call) -> tuple[Op, None]:
    return max_pool2d(call), None
