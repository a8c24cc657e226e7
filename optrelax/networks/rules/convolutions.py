"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks.calls import Call, Refused, Value
from optrelax.networks.convolutions import Convolution, TransposedConvolution
from optrelax.networks.images import Conv2d
from optrelax.networks.ops import Shape, Source
from optrelax.networks.registry import rule
from optrelax.networks.views import Pad

aten = torch.ops.aten


def numbers(value: Any, rank: int) -> tuple[int, ...]:
    """One number a dimension, given as such, as one number or as a list of one."""
    given = [value] if isinstance(value, int) else list(value)
    found = given * rank if len(given) == 1 else given
    if len(found) != rank:
        raise Refused(f"wants {rank} numbers, got {given}")
    return tuple(int(n) for n in found)


def spatial(call: Call, rank: int) -> Shape:
    """Shape of the image that the call reads, [c, *spatial]."""
    shape = call.only(0).shape
    if len(shape) != rank + 1:
        wanted = ", ".join(("c", "d", "h", "w")[:1] + ("d", "h", "w")[3 - rank :])
        raise Refused(f"takes a batch of [{wanted}], got {shape} (an input without a batch dimension mixes the batch)")
    return shape


def _weight(call: Call) -> tuple[Source, int]:
    weight = call.constant(1)
    if weight is None:
        raise Refused("has no weight")
    return weight, len(call.shape(1)) - 2


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(call: Call) -> Value:
    weight, rank = _weight(call)
    return convolved(call, weight, [(p, p) for p in numbers(call["padding"], rank)])


@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution_by_name(call: Call) -> Value:
    weight, rank = _weight(call)
    if call["padding"] == "valid":
        return convolved(call, weight, [(0, 0)] * rank)
    sizes = zip(numbers(call["dilation"], rank), call.shape(1)[2:], strict=True)
    total = [d * (k - 1) for d, k in sizes]
    return convolved(call, weight, [(t // 2, t - t // 2) for t in total])


def convolved(call: Call, weight: Source, padding: Sequence[tuple[int, int]]) -> Value:
    """The convolution with that much padding before and after each dimension."""
    rank = len(padding)
    value, shape = call.value(0), spatial(call, rank)
    if any(before != after for before, after in padding):
        value = call.add(Pad(shape, [(0, 0), *padding]), value)
        shape, padding = value.shape, [(0, 0)] * rank
    stride, dilation = numbers(call["stride"], rank), numbers(call["dilation"], rank)
    around, groups, bias = tuple(p for p, _ in padding), int(call["groups"]), call.constant(2)
    kind = Conv2d if rank == 2 else Convolution
    return call.add(kind(shape, weight, bias, ConvGeometry(stride, around, dilation, groups)), value)


@rule(aten.conv_transpose1d, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(call: Call) -> TransposedConvolution:
    weight, rank = _weight(call)
    geometry = ConvGeometry(
        numbers(call["stride"], rank),
        numbers(call["padding"], rank),
        numbers(call["dilation"], rank),
        int(call["groups"]),
    )
    extra = numbers(call["output_padding"], rank)
    return TransposedConvolution(spatial(call, rank), weight, call.constant(2), geometry, extra)
