"""Rules of ONNX ops that reduce dimensions, running sums among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optrelax.networks.onnx_nodes import Function, OnnxNode, rule

_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, **kept: x.abs().sum(**kept),
    "ReduceL2": lambda x, **kept: torch.linalg.vector_norm(x, **kept),
    "ReduceSumSquare": lambda x, **kept: x.square().sum(**kept),
    "ReduceLogSum": lambda x, **kept: x.sum(**kept).log(),
    "ReduceLogSumExp": lambda x, **kept: torch.logsumexp(x, **kept),
}


@rule(*_REDUCTIONS)
def reduction(node: OnnxNode) -> Function:
    rank = len(node.value(0).shape)
    axes = node.axes(1)
    keep = bool(node.get("keepdims", 1))
    if not axes:
        if node.get("noop_with_empty_axes", 0):
            return lambda x, *_: x
        axes = list(range(rank))
    dims = tuple(node.axis(a, rank) for a in axes)
    function: Any = _REDUCTIONS[node.op]
    return lambda x, *_: function(x, dim=dims, keepdim=keep)


@rule("CumSum")
def running_sum(node: OnnxNode) -> Function:
    (axis,) = node.integers(1)
    dim = node.axis(axis, len(node.value(0).shape))
    exclusive, reverse = bool(node.get("exclusive", 0)), bool(node.get("reverse", 0))

    def function(x: Tensor, *_: Any) -> Tensor:
        found = torch.cumsum(x.flip(dim) if reverse else x, dim)
        found = found.flip(dim) if reverse else found
        return found - x if exclusive else found

    return function
