"""Captured networks as ONNX files: one small function an op, from the graph's own op to ONNX nodes.

Values equal the network's to the rounding of its type. Batch norm and quotients are written as what they are computed
from, not as computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks import batch_norms, convolutions, images, linear_maps, maxima, ops, products, views
from optrelax.networks.activations import PiecewiseLinear, Smooth
from optrelax.networks.graph import Network, Node
from optrelax.networks.onnx_graphs import OPSET, OnnxGraph
from optrelax.output.files import write_whole

__all__ = ["OPSET", "write_onnx"]

_Writer = Callable[["OnnxGraph", Node, Any, list[str]], str]
_WRITERS: dict[type, _Writer] = {}
_W = TypeVar("_W", bound=_Writer)


def write_onnx(network: Network, path: str | os.PathLike[str]) -> None:
    """Store a network as an ONNX file of opset 17 with an open batch dimension, whole or not at all.

    Raises UnsupportedOpError that lists every op without a writer; RuntimeError without the onnx package.
    """
    from optrelax.networks.onnx_files import _package

    _package()
    file = OnnxGraph(network)
    problems = []
    names = {network.input: "input"}
    for node in network:
        try:
            writer = _WRITERS.get(type(node.op))
            if writer is None:
                raise ValueError("has no ONNX form here")
            names[node.name] = writer(file, node, node.op, [names.get(name, "") for name in node.inputs])
        except ValueError as error:
            problems.append(Problem(node.path, type(node.op).__name__, str(error)))
    if problems:
        raise UnsupportedOpError(problems)
    write_whole(path, file.model(names[network.output]).SerializeToString())


def _writer(*kinds: type) -> Callable[[_W], _W]:
    def register(function: _W) -> _W:
        for kind in kinds:
            _WRITERS[kind] = function
        return function

    return register


def _parameters(file: OnnxGraph, node: Node, op: Any, *names: str) -> list[str]:
    """The op's tensors of these names, as far as it has them."""
    held = op.tensors()
    return [file.tensor(f"{node.path}.{name}", held[name]()) for name in names if name in held]


@_writer(ops.Linear)
def _linear(file: OnnxGraph, node: Node, op: ops.Linear, xs: list[str]) -> str:
    if len(op.shape) == 1:
        return file.node("Gemm", [*xs, *_parameters(file, node, op, "weight", "bias")], transB=1)
    held = op.tensors()
    y = file.node("MatMul", [*xs, file.tensor(f"{node.path}.weight", held["weight"]().mT)])
    return file.node("Add", [y, *_parameters(file, node, op, "bias")]) if "bias" in held else y


@_writer(images.Conv2d, convolutions.Convolution)
def _convolution(file: OnnxGraph, node: Node, op: Any, xs: list[str]) -> str:
    g = op.geometry
    return file.node(
        "Conv",
        [*xs, *_parameters(file, node, op, "weight", "bias")],
        strides=list(g.stride),
        pads=[*g.padding, *g.padding],
        dilations=list(g.dilation),
        group=g.groups,
    )


@_writer(ops.Scale)
def _scale(file: OnnxGraph, node: Node, op: ops.Scale, xs: list[str]) -> str:
    (y,) = xs
    for name, kind in (("scale", "Mul"), ("shift", "Add")):
        for tensor in _parameters(file, node, op, name):
            y = file.node(kind, [y, tensor])
    return y if y != xs[0] else file.node("Identity", xs)


@_writer(ops.Divide)
def _divide(file: OnnxGraph, node: Node, op: ops.Divide, xs: list[str]) -> str:
    return file.node("Div", [*xs, *_parameters(file, node, op, "divisor")])


@_writer(batch_norms.BatchNorm)
def _batch_norm(file: OnnxGraph, node: Node, op: batch_norms.BatchNorm, xs: list[str]) -> str:
    held = op.tensors()
    like = held["running_mean"]()
    scale = held["weight"]() if "weight" in held else torch.ones_like(like)
    shift = held["bias"]() if "bias" in held else torch.zeros_like(like)
    # The file's epsilon is in single precision; what that rounds off goes to the variance.
    variance = held["running_var"]().double() + (op.eps - float(np.float32(op.eps)))
    named = {"weight": scale, "bias": shift, "running_mean": like, "running_var": variance}
    tensors = [file.tensor(f"{node.path}.{name}", value) for name, value in named.items()]
    return file.node("BatchNormalization", [*xs, *tensors], epsilon=op.eps)


@_writer(images.AveragePool2d)
def _average_pool(file: OnnxGraph, node: Node, op: images.AveragePool2d, xs: list[str]) -> str:
    kernel, g = op.kernel, op.geometry
    y = file.node(
        "AveragePool",
        xs,
        kernel_shape=list(kernel),
        strides=list(g.stride),
        pads=[*g.padding, *g.padding],
        count_include_pad=int(op.divisor is not None),
    )
    if op.divisor in (None, kernel[0] * kernel[1]):
        return y
    return file.node(
        "Mul", [y, file.tensor("divisor", torch.tensor(kernel[0] * kernel[1] / float(op.divisor or 1), device="cpu"))]
    )


@_writer(views.Expand)
def _expand(file: OnnxGraph, node: Node, op: views.Expand, xs: list[str]) -> str:
    shape = op.input_shapes[0]
    y = file.reshape(xs[0], [*[1] * (len(op.shape) - len(shape)), *shape])
    return file.node("Expand", [y, file.integers("shape", [1, *op.shape])])


@_writer(products.Multiply)
def _multiply(file: OnnxGraph, node: Node, op: products.Multiply, xs: list[str]) -> str:
    return file.node("Mul", xs)


@_writer(maxima.Greatest)
def _greatest(file: OnnxGraph, node: Node, op: maxima.Greatest, xs: list[str]) -> str:
    windows = op.windows(torch.device("cpu"))
    # An entry that is none becomes one of the window's own: twice the same changes no maximum.
    filled = torch.where(windows < 0, windows.amax(-1, keepdim=True), windows)
    flat = file.reshape(xs[0], [int(np.prod(op.input_shapes[0]))])
    y = file.node("Gather", [flat, file.integers("windows", filled.reshape(-1).tolist())], axis=1)
    y = file.reshape(y, [int(np.prod(op.shape)), windows.shape[-1]])
    return file.reshape(file.node("ReduceMax", [y], axes=[2], keepdims=0), op.shape)


@_writer(maxima.MaxPool)
def _max_pool(file: OnnxGraph, node: Node, op: maxima.MaxPool, xs: list[str]) -> str:
    if op.ceil_mode:  # how many windows there are is not the same in every opset
        return _greatest(file, node, op, xs)
    return file.node(
        "MaxPool",
        xs,
        kernel_shape=list(op.kernel),
        strides=list(op.stride),
        pads=[*op.padding, *op.padding],
        dilations=list(op.dilation),
    )


@_writer(ops.Reshape)
def _reshape(file: OnnxGraph, node: Node, op: ops.Reshape, xs: list[str]) -> str:
    return file.reshape(xs[0], op.shape)


@_writer(ops.Add)
def _add(file: OnnxGraph, node: Node, op: ops.Add, xs: list[str]) -> str:
    y = xs[0] if op.signs[0] == 1 else file.node("Neg", xs[:1])
    for sign, x in zip(op.signs[1:], xs[1:], strict=True):
        y = file.node("Add" if sign == 1 else "Sub", [y, x])
    return y if len(xs) > 1 or op.signs[0] != 1 else file.node("Identity", xs)


@_writer(linear_maps.Sum)
def _sum(file: OnnxGraph, node: Node, op: linear_maps.Sum, xs: list[str]) -> str:
    if not op.dims:
        raise ValueError("sums no dimension")
    axes = file.integers("axes", [d + 1 for d in op.dims])
    y = file.node("ReduceSum", [*xs, axes], keepdims=int(op.keepdim))
    return (
        y if op.divisor == 1 else file.node("Div", [y, file.tensor("divisor", torch.tensor(op.divisor, device="cpu"))])
    )


@_writer(views.Permute)
def _permute(file: OnnxGraph, node: Node, op: views.Permute, xs: list[str]) -> str:
    return file.node("Transpose", xs, perm=[0, *(d + 1 for d in op.dims)])


@_writer(views.Pad)
def _pad(file: OnnxGraph, node: Node, op: views.Pad, xs: list[str]) -> str:
    (y,) = xs
    sizes = op.input_shapes[0]
    cut = [(d, -min(0, a), n + min(0, b)) for d, (n, (a, b)) in enumerate(zip(sizes, op.amounts, strict=True))]
    cut = [(d, start, stop) for d, start, stop in cut if (start, stop) != (0, sizes[d])]
    if cut:
        numbers = ([start for _, start, _ in cut], [stop for *_, stop in cut], [d + 1 for d, *_ in cut])
        y = file.node("Slice", [y, *(file.integers("slice", n) for n in numbers)])
    begin, end = ([max(0, pair[side]) for pair in op.amounts] for side in (0, 1))
    if any(begin + end):
        y = file.node("Pad", [y, file.integers("pads", [0, *begin, 0, *end])])
    return y if y != xs[0] else file.node("Identity", xs)


@_writer(views.Concatenate)
def _concatenate(file: OnnxGraph, node: Node, op: views.Concatenate, xs: list[str]) -> str:
    return file.node("Concat", xs, axis=op.dim + 1)


@_writer(views.Gather)
def _gather(file: OnnxGraph, node: Node, op: views.Gather, xs: list[str]) -> str:
    index = op.index.tolist()
    if min(index, default=-1) < 0:
        raise ValueError("leaves entries empty")
    count = int(np.prod(op.input_shapes[0]))
    y = file.node("Gather", [file.reshape(xs[0], [count]), file.integers("index", index)], axis=1)
    return file.reshape(y, op.shape)


_PLAIN = ("sigmoid", "tanh", "softplus", "softsign", "erf", "exp", "log", "sqrt", "sin", "cos", "sinh", "atan")
_SMOOTH = {**{name: name.capitalize() for name in _PLAIN}, "hardswish": "HardSwish"}
"""Operators that mean the same; what opset 17 lacks is written out."""


@_writer(Smooth)
def _smooth(file: OnnxGraph, node: Node, op: Smooth, xs: list[str]) -> str:
    def number(value: float) -> str:
        return file.tensor("number", torch.tensor(value, dtype=torch.float64, device="cpu"))

    if op.name in _SMOOTH and op.parameters in ((), (1.0, 20.0)):
        return file.node(_SMOOTH[op.name], xs)
    if op.name == "silu":
        return file.node("Mul", [*xs, file.node("Sigmoid", xs)])
    if op.name == "mish":
        return file.node("Mul", [*xs, file.node("Tanh", [file.node("Softplus", xs)])])
    if op.name == "gelu":
        normal = file.node("Erf", [file.node("Mul", [*xs, number(math.sqrt(0.5))])])
        return file.node("Mul", [file.node("Mul", [*xs, number(0.5)]), file.node("Add", [normal, number(1.0)])])
    if op.name == "rsqrt":
        return file.node("Reciprocal", [file.node("Sqrt", xs)])
    if op.name == "power":
        return file.node("Pow", [*xs, number(op.parameters[0])])
    if op.name == "elu" and op.parameters[1:] == (1.0, 1.0) and float(np.float32(op.parameters[0])) == op.parameters[0]:
        return file.node("Elu", xs, alpha=op.parameters[0])
    raise ValueError(f"{op.name} with {op.parameters} has no ONNX form here")


@_writer(PiecewiseLinear)
def _piecewise_linear(file: OnnxGraph, node: Node, op: PiecewiseLinear, xs: list[str]) -> str:
    if op.kinks == (0.0,) and op.slopes == (0.0, 1.0) and op.intercepts == (0.0, 0.0):
        return file.node("Relu", xs)
    if op.kinks == (0.0,) and op.slopes[1] == 1.0 and op.intercepts == (0.0, 0.0):
        slope = float(np.float32(op.slopes[0]))
        if slope != op.slopes[0]:
            slopes = file.tensor("slope", torch.tensor([op.slopes[0]], dtype=torch.float64, device="cpu"))
            return file.node("PRelu", [*xs, slopes])
        return file.node("LeakyRelu", xs, alpha=slope)
    if len(op.kinks) == 2 and op.slopes == (0.0, 1.0, 0.0) and op.intercepts[1] == 0.0:
        ends = [file.tensor("end", torch.tensor(kink, dtype=torch.float64, device="cpu")) for kink in op.kinks]
        return file.node("Clip", [*xs, *ends])
    raise ValueError(f"{op.name} has no ONNX form here")
