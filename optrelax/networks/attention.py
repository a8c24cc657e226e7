"""Multi-head attention with the batch in front all the way, in place of torch's own, which puts it elsewhere."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optrelax.networks.replicas import Replica


def keep_batch_in_front(replica: Replica) -> None:
    """Attention layers of a replica compute the same by ops that leave the batch in front."""
    for module in replica.module.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused form, of weights that take no gradient, is one op
        own = "forward" in vars(module) or type(module).forward is not nn.MultiheadAttention.forward
        if isinstance(module, nn.MultiheadAttention) and not own:
            module.forward = functools.partial(_attend, module)  # type: ignore[method-assign]


def _attend(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """What `nn.MultiheadAttention.forward` gives: outputs, and weights or None."""
    unusual = layer.bias_k is not None or layer.add_zero_attn
    if unusual or query.dim() != 3 or key_padding_mask is not None or (is_causal and attn_mask is None):
        return nn.MultiheadAttention.forward(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    given = (query, key, value) if layer.batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
    heads = [
        F.linear(x, weight, bias).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        for x, (weight, bias) in zip(given, _projections(layer), strict=True)
    ]
    q, k, v = heads
    scores = (q / math.sqrt(layer.head_dim)) @ k.transpose(-2, -1)
    if attn_mask is not None:
        mask = attn_mask.unflatten(0, (-1, layer.num_heads)) if attn_mask.dim() == 3 else attn_mask
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(-1), layer.dropout, layer.training)
    found = (weights @ v).transpose(1, 2).flatten(2)
    output = F.linear(found, layer.out_proj.weight, layer.out_proj.bias)
    output = output if layer.batch_first else output.transpose(0, 1)
    return output, (weights.mean(1) if average_attn_weights else weights) if need_weights else None


def _projections(layer: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries, keys and values."""
    if layer._qkv_same_embed_dim:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return list(zip(weights, biases, strict=True))
