"""Rules of ONNX ops that calculate: arithmetic, products, convolutions, pooling, activations, reductions.

Each says in torch what the operator's specification says (onnx.ai/onnx/operators), in every opset from 7 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.onnx_nodes import Function, OnnxNode, require_small, rule

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _elementwise(function: Any) -> Callable[[OnnxNode], Function]:
    return lambda node: function


for _name, _function in {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Reciprocal": torch.reciprocal,
    "Sign": torch.sign,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
}.items():
    rule(_name)(_elementwise(_function))


@rule("Identity")
def identity(node: OnnxNode) -> Function:
    return lambda x: x


@rule("Dropout")
def dropout(node: OnnxNode) -> Function:
    if len(node.inputs) > 2 and node.has(2) and any(node.numbers(2)):
        raise ValueError("is in training mode; export the network in eval mode")
    if node.has(1):
        node.numbers(1)
    if node.outputs > 1:
        raise ValueError("gives its mask, which has no rule")
    return lambda x, *_: x


@rule("Add", "Sub", "Mul", "Div", "Pow")
def arithmetic(node: OnnxNode) -> Function:
    functions: dict[str, Function] = {
        "Add": torch.add,
        "Sub": torch.sub,
        "Mul": torch.mul,
        "Div": torch.div,
        "Pow": torch.pow,
    }
    if node.op == "Div" and node.is_constant and not node.value(0).dtype.is_floating_point:
        return lambda a, b: torch.div(a, b, rounding_mode="trunc")
    if node.op == "Pow" and not node.is_constant:
        (exponent,) = node.numbers(1)
        return lambda x, _: x**exponent
    _require_aligned(node)
    return functions[node.op]


def _require_aligned(node: OnnxNode) -> None:
    """Operands broadcast from the right: one of lower rank must not meet the batch, nor a constant vary with it."""
    rank = max(len(v.shape) for v in node.inputs if v is not None)
    for value in node.inputs:
        if value is None or node.is_constant:
            continue
        if value.constant is None and len(value.shape) < rank:
            raise ValueError(f"{value.name} {list(value.shape)} is broadcast to {rank} dimensions across its batch")
        if value.constant is not None and len(value.shape) == rank and value.shape[0] != 1:
            raise ValueError(f"{value.name} {list(value.shape)} differs along the batch dimension")


@rule("Max", "Min", "Sum", "Mean")
def variadic(node: OnnxNode) -> Function:
    _require_aligned(node)
    pair: Callable[[Tensor, Tensor], Tensor] = {"Max": torch.maximum, "Min": torch.minimum}.get(node.op, torch.add)
    count = len(node.inputs)

    def fold(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = pair(first, other)
        return first / count if node.op == "Mean" and count > 1 else first

    return fold


@rule("LeakyRelu")
def leaky_relu(node: OnnxNode) -> Function:
    slope = float(node.get("alpha", 0.01))
    return lambda x: F.leaky_relu(x, slope)


@rule("Elu", "Celu")
def elu(node: OnnxNode) -> Function:
    alpha = float(node.get("alpha", 1.0))
    return lambda x: (F.elu if node.op == "Elu" else F.celu)(x, alpha)


@rule("Selu")
def selu(node: OnnxNode) -> Function:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return lambda x: gamma * F.elu(x, alpha)


@rule("HardSigmoid")
def hard_sigmoid(node: OnnxNode) -> Function:
    alpha, beta = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


@rule("Gelu")
def gelu(node: OnnxNode) -> Function:
    approximate = _text(node.get("approximate", "none"))
    return lambda x: F.gelu(x, approximate=approximate)


@rule("ThresholdedRelu")
def thresholded(node: OnnxNode) -> Function:
    alpha = float(node.get("alpha", 1.0))
    return lambda x: F.threshold(x, alpha, 0.0)


@rule("PRelu")
def prelu(node: OnnxNode) -> Function:
    slope, rank = node.constant(1), len(node.value(0).shape)
    if slope.numel() == 1:
        (number,) = node.numbers(1)
        return lambda x, _: F.leaky_relu(x, number)
    # A slope a channel is [channels, 1, ...], counted from the right.
    full = (1,) * (rank - slope.dim()) + tuple(slope.shape)
    if rank < 2 or len(full) != rank or full[0] != 1 or any(n != 1 for n in full[2:]):
        raise ValueError(f"slope {list(slope.shape)} must be one number or one a channel")
    return lambda x, a: F.prelu(x, a.reshape(-1))


@rule("Clip")
def clip(node: OnnxNode) -> Function:
    low, high = node.get("min", None), node.get("max", None)
    if node.has(1):
        (low,) = node.numbers(1)
    if node.has(2):
        (high,) = node.numbers(2)
    if low is None and high is None:
        return lambda x, *_: x
    return lambda x, *_: torch.clamp(x, low, high)


@rule("Softmax", "LogSoftmax")
def softmax(node: OnnxNode) -> Function:
    rank = len(node.value(0).shape)
    axis = node.axis(int(node.get("axis", -1 if node.opset >= 13 else 1)), rank)
    if node.opset < 13 and axis != rank - 1:
        raise ValueError(f"axis {axis} of {rank} dimensions means a flattened softmax in opset {node.opset}")
    function = F.softmax if node.op == "Softmax" else F.log_softmax
    return lambda x: function(x, dim=axis)


@rule("Gemm")
def gemm(node: OnnxNode) -> Function:
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    turned_a, turned_b = bool(node.get("transA", 0)), bool(node.get("transB", 0))
    constant_a, constant_b = (node.value(i).constant is not None for i in (0, 1))
    if not node.is_constant and (turned_a or constant_a):
        raise ValueError("its first operand must be the network's value, not transposed: rows are examples")
    if not node.is_constant and not constant_b:
        raise ValueError("both operands depend on the network's input; products have no rule")
    bias = node.has(2) and beta != 0.0
    if bias and not node.is_constant:
        c = node.constant(2)
        if c.dim() > 1 and c.shape[0] != 1:
            raise ValueError(f"C {list(c.shape)} differs along the batch dimension")
    outputs = node.value(1).shape[0 if turned_b else -1]
    # F.linear takes one number an output.
    plain = alpha == 1.0 and beta == 1.0 and bias and math.prod(node.value(2).shape) == outputs

    def function(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.mT if turned_a else a
        weight = b if turned_b else b.mT
        if plain and c is not None:
            return F.linear(a, weight, c.reshape(-1))
        y = F.linear(a, weight)
        y = y if alpha == 1.0 else y * alpha
        if not bias or c is None:
            return y
        return y + (c if beta == 1.0 else c * beta)

    return function


@rule("MatMul")
def matmul(node: OnnxNode) -> Function:
    a, b = node.value(0), node.value(1)
    if node.is_constant:
        return torch.matmul
    if a.constant is None and b.constant is None:
        raise ValueError("both operands depend on the network's input; products have no rule")
    left = a.constant is None
    if left and b.constant is not None and b.constant.dim() == 2 and len(a.shape) >= 2:
        return lambda x, w: F.linear(x, w.mT)
    dynamic, constant = (a, b) if left else (b, a)
    matrix = 3 if not left else 2
    if len(dynamic.shape) < matrix or (len(constant.shape) == len(dynamic.shape) and constant.shape[0] != 1):
        raise ValueError(
            f"{a.name} {list(a.shape)} times {b.name} {list(b.shape)} mixes examples: the batch must stay first"
        )
    return torch.matmul


@rule("BatchNormalization")
def batch_normalization(node: OnnxNode) -> Function:
    if node.get("training_mode", 0) or node.outputs > 1:
        raise ValueError("is in training mode; export the network in eval mode")
    if not node.get("spatial", 1):
        raise ValueError("spatial=0 has no rule")
    eps = float(node.get("epsilon", 1e-5))
    for place in range(1, 5):
        node.constant(place)
    node.statistics.update((3, 4))
    return lambda x, scale, bias, mean, var: F.batch_norm(x, mean, var, scale, bias, False, 0.0, eps)


@rule("Conv")
def conv(node: OnnxNode) -> Function:
    weight = node.constant(1)
    spatial = _spatial(node)
    kernel = [int(n) for n in weight.shape[2:]]
    _require_attribute(node, "kernel_shape", kernel)
    stride, dilation, begin, end = _window(node, kernel, spatial)
    groups, function = int(node.get("group", 1)), _CONV[len(spatial)]
    if begin == end:
        return lambda x, w, b=None: function(x, w, b, stride, begin, dilation, groups)
    pads = _reversed_pads(begin, end)
    return lambda x, w, b=None: function(F.pad(x, pads), w, b, stride, 0, dilation, groups)


@rule("ConvTranspose")
def conv_transpose(node: OnnxNode) -> Function:
    weight = node.constant(1)
    spatial = _spatial(node)
    rank, kernel = len(spatial), [int(n) for n in weight.shape[2:]]
    _require_attribute(node, "kernel_shape", kernel)
    stride, dilation = _each(node, "strides", rank), _each(node, "dilations", rank)
    extra = _each(node, "output_padding", rank, 0)
    groups, function = int(node.get("group", 1)), _TRANSPOSED[rank]
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
    rank, auto = len(spatial), _text(node.get("auto_pad", "NOTSET"))
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
    function, ceil = _MAX_POOL[len(spatial)], bool(node.get("ceil_mode", 0))
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
    pads = _reversed_pads(begin, end)
    if counted:
        return lambda x: function(F.pad(x, pads), kernel, stride)
    inside = function(F.pad(torch.ones(1, 1, *spatial, dtype=torch.float64), pads), kernel, stride)

    def uncounted(x: Tensor) -> Tensor:
        return function(F.pad(x, pads), kernel, stride) / inside.to(x)

    return uncounted


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: OnnxNode) -> Function:
    dims = tuple(range(2, 2 + len(_spatial(node))))
    if node.op == "GlobalAveragePool":
        return lambda x: x.mean(dims, keepdim=True)
    return lambda x: x.amax(dims, keepdim=True)


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def reduction(node: OnnxNode) -> Function:
    rank = len(node.value(0).shape)
    axes = node.axes(1)
    keep = bool(node.get("keepdims", 1))
    if not axes:
        if node.get("noop_with_empty_axes", 0):
            return lambda x, *_: x
        axes = list(range(rank))
    dims = tuple(node.axis(a, rank) for a in axes)
    named: dict[str, Any] = {
        "ReduceMean": torch.mean,
        "ReduceSum": torch.sum,
        "ReduceMax": torch.amax,
        "ReduceMin": torch.amin,
    }
    function: Callable[..., Tensor] = named[node.op]
    return lambda x, *_: function(x, dim=dims, keepdim=keep)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


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
    auto = _text(node.get("auto_pad", "NOTSET"))
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


def _reversed_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Padding as F.pad takes it: the last dimension first."""
    return [n for pair in reversed(list(zip(begin, end, strict=True))) for n in pair]
