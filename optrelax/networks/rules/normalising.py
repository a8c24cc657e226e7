"""Softmax, attention and normalisation by the value's own deviation: products, exponentials and roots of values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from optrelax.networks import activations
from optrelax.networks.calls import Call, Refused, Value, is_value
from optrelax.networks.linear_maps import Sum
from optrelax.networks.ops import Add, Reshape, Scale, Shape, Source, constant
from optrelax.networks.registry import rule
from optrelax.networks.rules.masks import shifted, shows
from optrelax.networks.rules.moves import move, numbers
from optrelax.networks.rules.products import multiplied, times
from optrelax.networks.rules.reductions import log_sum
from optrelax.networks.views import Expand, Permute

aten = torch.ops.aten


@rule(aten.softmax.int, aten._softmax, aten._safe_softmax, hidden=True)
def softmax(call: Call) -> Value:
    """1 / (1 + sum over the others of exp(x_j - x_i)), which multiplies nothing."""
    value = call.only(0)
    (dim,) = call.dims(call["dim"])
    return _shares(call, value, dim)


@rule(aten.log_softmax.int, aten._log_softmax)
def log_softmax(call: Call) -> Value:
    """-log(1 + sum over the others of exp(x_j - x_i)), by pairs: log(e^a + e^b) = a + softplus(b - a)."""
    value = call.only(0)
    (dim,) = call.dims(call["dim"])
    if value.shape[dim] == 1:
        return call.scaled(value, 0.0)
    total = log_sum(call, _differences(call, value, dim), 0)
    return call.scaled(call.add(activations.softplus(), call.add(Reshape(total.shape, value.shape), total)), -1.0)


def _shares(call: Call, value: Value, dim: int) -> Value:
    """The shares of a softmax along a dimension; of entries that are hidden 0, and they count in no other's."""
    shown = value.shown
    if shown is not None and not bool(shown().any(dim).all()):
        raise Refused("a mask that leaves a query without any score has no rule: its shares are no numbers")
    found = call.add(activations.reciprocal(), _total(call, value, dim))
    return found if shown is None else call.add(Scale(value.shape, lambda: shown().double(), None), found)


def _total(call: Call, value: Value, dim: int) -> Value:
    """1 + sum over the others of exp(x_j - x_i): an entry less itself is 0, which its bounds would not know."""
    shape, n = value.shape, value.shape[dim]
    if n == 1:
        return call.add(Scale(shape, constant(0.0), constant(1.0)), value)
    wide = (n - 1, *shape)
    shown = None if value.shown is None else partial(_of_others, value.shown, shape, dim)
    left = _differences(call, value, dim)
    if shown is not None:  # the exponential of a hidden one might overflow, and 0 times infinity is no number
        left = call.add(Scale(wide, shown, None), left)
    exponentials = call.add(activations.exp(), left)
    if shown is not None:
        exponentials = call.add(Scale(wide, shown, None), exponentials)
    return call.add(Scale(shape, None, constant(1.0)), call.add(Sum(wide, [0]), exponentials))


def _of_others(read: Source, shape: Shape, dim: int) -> torch.Tensor:
    """Of every entry the numbers of the others along a dimension, in the order of `_differences`."""
    every = read().double().expand(shape)
    return torch.stack([every.roll(-step, dim) for step in range(1, shape[dim])])


def _differences(call: Call, value: Value, dim: int) -> Value:
    """x_j - x_i of every entry and the others along a dimension: [others, *shape]."""
    shape, n = value.shape, value.shape[dim]
    own = numbers(shape).long() - 1
    others = move(call, value, torch.stack([own.roll(-step, dim) for step in range(1, n)]))
    wide = (n - 1, *shape)
    same = call.add(Expand((1, *shape), wide), call.add(Reshape(shape, (1, *shape)), value))
    return call.add(Add(wide, (1.0, -1.0)), others, same)


@rule(aten.scaled_dot_product_attention)
def attention(call: Call) -> Value:
    """softmax(q k^T / sqrt(d) + mask) v: q [*heads, n, d], k and v [*heads, m, d].

    A score that is hidden (by False, minus infinity, or as the future) has the share 0 and counts in no other's.
    """
    query, key, value = call.args[:3]
    if call["dropout_p"] or call["enable_gqa"]:
        raise Refused("attention that drops or shares heads has no rule; write it out")
    if not (is_value(query) and is_value(key) and is_value(value)):
        raise Refused("attention wants queries, keys and values of the network; write it out with constants")
    rank = len(key.shape)
    turned = call.add(Permute(key.shape, [*range(rank - 2), rank - 1, rank - 2]), key)
    scale = call["scale"]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    scores = multiplied(call, call.scaled(query, factor), turned)
    return multiplied(call, _shares(call, _masked(call, scores), len(scores.shape) - 1), value)


def _masked(call: Call, scores: Value) -> Value:
    """The scores that an attention looks at, and what its mask adds to them."""
    shape = scores.shape
    if call["is_causal"]:
        return shows(partial(_past, shape[-2], shape[-1]), scores)
    mask = call.constant(3)
    if mask is None:
        return scores
    read = mask()
    if torch.broadcast_shapes(read.shape, shape) != torch.Size(shape):
        raise Refused(f"a mask of shape {tuple(read.shape)} does not broadcast to scores of shape {shape}")
    if read.dtype != torch.bool:
        return shifted(call, scores, None, mask)
    call.keep(mask, read.detach().clone())
    return shows(mask, scores)


def _past(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device="cpu").tril()


def _last_dims(call: Call, value: Value) -> list[int]:
    """The dimensions of an example that a norm's `normalized_shape` speaks of."""
    rank = len(value.shape)
    dims = [*range(rank - len(call["normalized_shape"]), rank)]
    if not dims or dims[0] < 0:
        raise Refused("mixes the batch: it normalises over dimension 0")
    return dims


@rule(aten.layer_norm)
def layer_norm(call: Call) -> Value:
    value = call.only(0)
    dims = _last_dims(call, value)
    return _affine(call, _normalised(call, value, dims, float(call["eps"])), 2)


@rule(aten.rms_norm)
def rms_norm(call: Call) -> Value:
    value = call.only(0)
    dims = _last_dims(call, value)
    if call["eps"] is None:
        raise Refused("without an eps its smallest divisor depends on the type; give one")
    limit = math.sqrt(math.prod(value.shape[d] for d in dims))
    found, scale = _divided(call, value, dims, float(call["eps"]), limit), call.constant(2)
    return found if scale is None else call.add(Scale(value.shape, scale, None), found)


@rule(aten.group_norm)
def group_norm(call: Call) -> Value:
    return normalised_groups(call, call.only(0), int(call["num_groups"]), float(call["eps"]), 2)


def normalised_groups(call: Call, value: Value, groups: int, eps: float, weight: int) -> Value:
    """Channels [c, *spatial] normalised by groups of them; weight: position of the scale, the shift is the next."""
    channels, *spatial = value.shape
    parts = (groups, channels // groups * math.prod(spatial))
    found = _normalised(call, call.add(Reshape(value.shape, parts), value), [1], eps)
    return _affine(call, call.add(Reshape(parts, value.shape), found), weight, channels=True)


def _normalised(call: Call, value: Value, dims: Sequence[int], eps: float) -> Value:
    """(x - mean) / sqrt(variance + eps) over dimensions."""
    shape = value.shape
    mean = call.add(Sum(shape, dims, True, math.prod(shape[d] for d in dims)), value)
    wide = call.add(Expand(mean.shape, shape), mean)
    # Numbers of sum 0: n of the greatest square is at most n - 1 of their sum.
    count = math.prod(shape[d] for d in dims)
    centred = call.add(Add(shape, (1.0, -1.0)), value, wide)
    return _divided(call, centred, dims, eps, math.sqrt(max(count - 1, 1)))


def _divided(call: Call, value: Value, dims: Sequence[int], eps: float, limit: float) -> Value:
    """x / sqrt(mean of squares + eps), which is at most `limit`: a bound that its factors do not know."""
    shape = value.shape
    square = call.add(activations.square(), value)
    mean = call.add(Sum(shape, dims, True, math.prod(shape[d] for d in dims)), square)
    root = call.add(activations.rsqrt(), call.add(Scale(mean.shape, None, constant(eps)), mean))
    found = times(call, value, call.add(Expand(mean.shape, shape), root))
    # In real arithmetic this changes nothing; a float of the module's may lie beyond the limit by its rounding.
    return call.add(activations.clamp(-limit * (1 + 1e-6), limit * (1 + 1e-6), "clamp"), found)


def _affine(call: Call, value: Value, position: int, channels: bool = False) -> Value:
    """Times a constant, plus the next one; of each channel where these come first."""
    scale, shift = (call.constant(i) if len(call.args) > i else None for i in (position, position + 1))
    if scale is None and shift is None:
        return value
    rank = len(value.shape) - 1

    def shaped(read: Source | None) -> Source | None:
        if read is None or not channels:
            return read
        return lambda: read().reshape(-1, *[1] * rank)

    return call.add(Scale(value.shape, shaped(scale), shaped(shift)), value)
