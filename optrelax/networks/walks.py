"""The two ways through a network: values from the input on, and coefficients from a target back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from optrelax.networks.graph import Network, Node

__all__ = ["carried_back", "carried_on", "through_affine"]

A = TypeVar("A")


def carried_on(
    network: Network, x: Tensor, names: Container[str], activate: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Values of the named nodes, and of the input: affine ops as they are, `activate(node, *inputs)` for others."""
    values = {network.input: x}
    for node in network.nodes:
        if node.name not in names:
            continue
        inputs = [values[name] for name in node.inputs]
        values[node.name] = node.op.apply(*inputs) if node.affine else activate(node, *inputs)
    return values


def carried_back(
    network: Network,
    pending: Mapping[str, A],
    step: Callable[[Node, A], Iterable[tuple[str, A]] | None],
    add: Callable[[A, A], A] = operator.add,
) -> dict[str, A]:
    """Coefficients of nodes' values carried back; returns those where the walk has ended, the input among them.

    step: what a node's coefficients are for the values that it reads; None ends the walk there.  add: where paths meet.
    """
    waiting, ends = dict(pending), {}
    for node in reversed(network.nodes):
        if node.name not in waiting:
            continue
        a = waiting.pop(node.name)
        sent = step(node, a)
        if sent is None:
            ends[node.name] = a
            continue
        for name, part in sent:
            waiting[name] = add(waiting[name], part) if name in waiting else part
    return ends | waiting


def through_affine(node: Node, a: Any) -> Iterable[tuple[str, Tensor]] | None:
    """A step of `carried_back` that ends at activations."""
    return zip(node.inputs, node.affine.transpose(a), strict=True) if node.affine else None
