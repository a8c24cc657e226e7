"""Rules of ONNX ops that calculate: arithmetic, products, activations.

Each says in torch what the operator's specification says (onnx.ai/onnx/operators), in every opset from 7 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.onnx_nodes import Function, OnnxNode, rule, text_of


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
    "Sinh": torch.sinh,
    "Atan": torch.atan,
    "Erf": torch.erf,
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


@rule("Softplus")
def softplus(node: OnnxNode) -> Function:
    threshold = float(node.get("threshold", 20.0))
    return lambda x: F.softplus(x, threshold=threshold)


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
    approximate = text_of(node.get("approximate", "none"))
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
        if len(a.shape) != len(b.shape) or len(a.shape) < 3:
            raise ValueError(f"{a.name} {list(a.shape)} times {b.name} {list(b.shape)} mixes examples")
        return torch.matmul
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
