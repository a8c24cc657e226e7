"""The same numbers in another shape, and ops that change nothing."""

from __future__ import annotations

import torch

from optrelax.networks.calls import Call, Op, Refused, Value
from optrelax.networks.ops import Reshape
from optrelax.networks.registry import rule

aten = torch.ops.aten


@rule(
    aten.flatten,
    aten.unflatten,
    aten.view.default,
    aten._unsafe_view,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.view_as,
    aten.reshape_as,
)
def reshape(call: Call) -> Op | Value:
    # Row by row an example keeps its place, and the batch stays in front: that is checked of every output.
    return call.value() if call.shape() == call.output else Reshape(call.shape(), call.output)


# Of another type they are refused like any op: every value of a network has the type of its input.
@rule(aten.clone, aten.contiguous, aten.positive, aten.alias, aten.to, aten._to_copy, aten.lift_fresh_copy, hidden=True)
def same(call: Call) -> Value:
    return call.value()


@rule(aten.detach)
def detach(call: Call) -> Value:
    # Else the weights before it are detached in its place, which they cannot be where the value goes on undetached too.
    if call.value().name != "input":
        raise Refused("stops a gradient that reaches the same values another way; detach the weights instead")
    return call.value()
