"""Rules of ONNX ops that look through windows: convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.convolutions import CONVOLUTIONS, TRANSPOSED
from optrelax.networks.maxima import POOLS
from optrelax.networks.onnx_nodes import Function, OnnxNode, require_small, rule, text_of

_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@rule("Conv")
def conv(node: OnnxNode) -> Function:
    weight = node.constant(1)
    spatial = _spatial(node)
    kernel = [int(n) for n in weight.shape[2:]]
    _require_attribute(node, "kernel_shape", kernel)
    stride, dilation, begin, end = _window(node, kernel, spatial)
    groups, function = int(node.get("group", 1)), CONVOLUTIONS[len(spatial)]
    if begin == end:
        return lambda x, w, b=None: function(x, w, b, stride, begin, dilation, groups)
    pads = reversed_pads(begin, end)
    return lambda x, w, b=None: function(F.pad(x, pads), w, b, stride, 0, dilation, groups)


@rule("ConvTranspose")
def conv_transpose(node: OnnxNode) -> Function:
    weight = node.constant(1)
    spatial = _spatial(node)
    rank, kernel = len(spatial), [int(n) for n in weight.shape[2:]]
    _require_attribute(node, "kernel_shape", kernel)
    stride, dilation = _each(node, "strides", rank), _each(node, "dilations", rank)
    extra = _each(node, "output_padding", rank, 0)
    groups, function = int(node.get("group", 1)), TRANSPOSED[rank]
    # Without padding; the specification's pads are cut off afterwards.
    full = [
        s * (n - 1) + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(spatial, stride, dilation, kernel, extra, strict=True)
    ]
    require_small(full)
    begin, end = _transposed_pads(node, spatial, stride, full)
    if begin == end and all(p >= 0 for p in begin):
        return lambda x, w, b=None: function(x, w, b, stride, begin, extra, groups, dilation)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)) or min(begin + end) < 0:
        raise ValueError(f"output_padding {extra}, pads {begin} and {end} have no rule together")
    index = (slice(None), slice(None), *(slice(b, n - e) for b, e, n in zip(begin, end, full, strict=True)))
    return lambda x, w, b=None: function(x, w, b, stride, 0, extra, groups, dilation)[index]


def _transposed_pads(
    node: OnnxNode, spatial: Sequence[int], stride: Sequence[int], full: Sequence[int]
) -> tuple[list[int], list[int]]:
    rank, auto = len(spatial), text_of(node.get("auto_pad", "NOTSET"))
    if "output_shape" in node.attributes:
        wanted = [int(n) for n in node.attributes["output_shape"]][-rank:]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(spatial, stride, strict=True)]
    else:
        pads = [int(p) for p in node.get("pads", [0] * 2 * rank)] if auto == "NOTSET" else [0] * 2 * rank
        return pads[:rank], pads[rank:]
    total = [f - w for f, w in zip(full, wanted, strict=True)]
    half, rest = [t // 2 for t in total], [t - t // 2 for t in total]
    return (rest, half) if auto != "SAME_UPPER" else (half, rest)


@rule("MaxPool")
def max_pool(node: OnnxNode) -> Function:
    if node.outputs > 1:
        raise ValueError("gives the places of the maxima, which have no rule")
    spatial, kernel = _spatial(node), [int(n) for n in node.get("kernel_shape", [])]
    stride, dilation, begin, end = _window(node, kernel, spatial)
    function, ceil = POOLS[len(spatial)], bool(node.get("ceil_mode", 0))
    if begin == end:
        return lambda x: function(x, kernel, stride, begin, dilation, ceil)
    # Padding never is the greatest: the windows of torch's padding (`begin` on both sides, whole windows or all that
    # start inside) are the same, apart from how many there are.
    sizes = [_windows(each, ceil) for each in zip(spatial, kernel, stride, dilation, begin, end, strict=True)]
    for mode in (False, True):
        there = [_windows(each, mode) for each in zip(spatial, kernel, stride, dilation, begin, begin, strict=True)]
        if all(t >= n for t, n in zip(there, sizes, strict=True)):
            index = (slice(None), slice(None), *(slice(0, n) for n in sizes))
            return lambda x: function(x, kernel, stride, begin, dilation, mode)[index]
    raise ValueError(f"pads {begin} before and {end} behind have no rule for kernel {kernel}, stride {stride}")


def _windows(dimension: tuple[int, ...], ceil: bool) -> int:
    """Windows of a pooling along one dimension; one that starts in the padding behind does not count."""
    n, k, s, d, begin, end = dimension
    room = n + begin + end - d * (k - 1) - 1
    count = (-(-room // s) if ceil else room // s) + 1
    return count - 1 if ceil and (count - 1) * s >= n + begin else count


@rule("AveragePool")
def average_pool(node: OnnxNode) -> Function:
    spatial, kernel = _spatial(node), [int(n) for n in node.get("kernel_shape", [])]
    stride, dilation, begin, end = _window(node, kernel, spatial)
    if any(d != 1 for d in dilation):
        raise ValueError(f"dilations {dilation} have no rule")
    function, ceil = _AVG_POOL[len(spatial)], bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    if begin == end:
        return lambda x: function(x, kernel, stride, begin, ceil, counted)
    if ceil:
        raise ValueError("ceil_mode with unequal pads has no rule")
    pads = reversed_pads(begin, end)
    if counted:
        return lambda x: function(F.pad(x, pads), kernel, stride)
    inside = function(F.pad(torch.ones(1, 1, *spatial, dtype=torch.float64, device="cpu"), pads), kernel, stride)

    def uncounted(x: Tensor) -> Tensor:
        return function(F.pad(x, pads), kernel, stride) / inside.to(x)

    return uncounted


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: OnnxNode) -> Function:
    dims = tuple(range(2, 2 + len(_spatial(node))))
    if node.op == "GlobalAveragePool":
        return lambda x: x.mean(dims, keepdim=True)
    return lambda x: x.amax(dims, keepdim=True)


def _spatial(node: OnnxNode) -> list[int]:
    shape = node.value(0).shape
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"takes [batch, channels, 1 to 3 dimensions], got {list(shape)}")
    return list(shape[2:])


def _each(node: OnnxNode, name: str, rank: int, default: int = 1) -> list[int]:
    found = [int(n) for n in node.get(name, [default] * rank)]
    if len(found) != rank or min(found) < default:
        raise ValueError(f"{name} must be {rank} numbers >= {default}, got {found}")
    return found


def _require_attribute(node: OnnxNode, name: str, value: list[int]) -> None:
    got = [int(n) for n in node.get(name, value)]
    if got != value:
        raise ValueError(f"{name} {got} is not that of the weight, {value}")


def _window(node: OnnxNode, kernel: list[int], spatial: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Stride, dilation and the padding before and behind each dimension."""
    rank = len(spatial)
    if len(kernel) != rank or min(kernel) < 1:
        raise ValueError(f"kernel_shape {kernel} does not fit {rank} dimensions")
    stride, dilation = _each(node, "strides", rank), _each(node, "dilations", rank)
    auto = text_of(node.get("auto_pad", "NOTSET"))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
            for n, s, d, k in zip(spatial, stride, dilation, kernel, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return (stride, dilation, less, more) if auto == "SAME_UPPER" else (stride, dilation, more, less)
    if auto not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {auto!r} is unknown")
    pads = [int(p) for p in node.get("pads", [0] * 2 * rank)] if auto == "NOTSET" else [0] * 2 * rank
    if len(pads) != 2 * rank or min(pads) < 0:
        raise ValueError(f"pads must be {2 * rank} numbers >= 0, got {pads}")
    require_small([n + b + e for n, b, e in zip(spatial, pads[:rank], pads[rank:], strict=True)])
    return stride, dilation, pads[:rank], pads[rank:]


def reversed_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Padding as F.pad takes it: the last dimension first."""
    return [n for pair in reversed(list(zip(begin, end, strict=True))) for n in pair]
