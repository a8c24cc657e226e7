"""Linear layers and normalisation by running statistics."""

from __future__ import annotations

import torch

from optrelax.networks.batch_norms import BatchNorm, BatchNormInTraining
from optrelax.networks.calls import Call, Op, Refused, Value
from optrelax.networks.ops import Linear
from optrelax.networks.registry import rule
from optrelax.networks.rules.normalising import normalised_groups

aten = torch.ops.aten


@rule(aten.linear)
def linear(call: Call) -> Op:
    call.only(0)
    weight = call.constant(1)
    assert weight is not None
    return Linear(call.shape(), weight, call.constant(2))


@rule(aten.batch_norm)
def batch_norm(call: Call) -> Op:
    call.only(0)
    mean, variance = call.constant(3), call.constant(4)
    if mean is None or variance is None:
        raise Refused("without running statistics it mixes the batch; track_running_stats=True")
    if call["training"]:
        raise Refused("is in training mode; call .eval()")
    return BatchNorm(call.shape(), call["eps"], mean, variance, call.constant(1), call.constant(2))


def batch_norm_in_training(call: Call) -> Op:
    """A module of torch's own whose statistics are those of each batch."""
    return BatchNormInTraining(call.only(0).shape, call.module)


@rule(aten.instance_norm)
def instance_norm(call: Call) -> Op | Value:
    call.only(0)
    mean, variance = call.constant(3), call.constant(4)
    if call["use_input_stats"] or mean is None or variance is None:
        value = call.value(0)
        return normalised_groups(call, value, value.shape[0], float(call["eps"]), 1)
    return BatchNorm(call.shape(), call["eps"], mean, variance, call.constant(1), call.constant(2))


@rule(aten._native_batch_norm_legit_no_training)
def batch_norm_of_statistics(call: Call) -> tuple[Op, None, None]:
    call.only(0)
    mean, variance = call.constant(3), call.constant(4)
    assert mean is not None
    assert variance is not None
    return BatchNorm(call.shape(), call["eps"], mean, variance, call.constant(1), call.constant(2)), None, None
