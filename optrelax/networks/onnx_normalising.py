"""Rules of ONNX ops that normalise: by stored statistics, or by those of an example itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.onnx_nodes import Function, OnnxNode, rule


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


@rule("LayerNormalization", "RMSNormalization")
def layer_normalization(node: OnnxNode) -> Function:
    if node.outputs > 1:
        raise ValueError("gives its mean or deviation too, which have no rule")
    shape, eps = node.value(0).shape, float(node.get("epsilon", 1e-5))
    axis = node.axis(int(node.get("axis", -1)), len(shape))
    kept = shape[axis:]
    for place in range(1, len(node.inputs)):
        if node.has(place) and node.constant(place).numel() != node.constant(place).broadcast_to(kept).numel():
            raise ValueError(f"input {place} {list(node.value(place).shape)} must be {list(kept)}")

    def function(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        if node.op == "RMSNormalization":
            return F.rms_norm(x, kept, scale, eps)
        return F.layer_norm(x, kept, scale, bias, eps)

    return function


@rule("InstanceNormalization", "GroupNormalization")
def group_normalization(node: OnnxNode) -> Function:
    channels, eps = node.value(0).shape[1], float(node.get("epsilon", 1e-5))
    groups = int(node.get("num_groups", channels))
    if node.op == "GroupNormalization" and node.opset < 21:
        raise ValueError("numbers a group are of opset 18 to 20; export with opset 21 or later, or below 18")
    for place in (1, 2):
        if node.constant(place).shape != (channels,):
            raise ValueError(f"input {place} {list(node.value(place).shape)} must be [{channels}]")
    return lambda x, scale, bias: F.group_norm(x, groups, scale, bias, eps)
