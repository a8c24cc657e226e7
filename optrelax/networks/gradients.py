"""What stops a gradient in a graph: `detach`, and the end of a block under `torch.no_grad`.

The bound of a network with a part that no gradient enters is the bound of the network with the weights of that part as
constants: so the part's weights are detached, where they are read, and its values are what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from optrelax.networks.exported_nodes import tensor_of
from optrelax.networks.functional_graphs import detached

aten = torch.ops.aten
_DETACH = aten.detach.default


def stopped_at_weights(graph: fx.Graph, given: fx.Node) -> None:
    """Detach the weights before each detached value of the network, instead of the value.

    A value that is read undetached too stays: its rule refuses it, as bounds would have to keep both apart.
    """
    depends = _depending(graph, given)
    ends = {node for node in depends if node.target is _DETACH}
    if not ends:
        return
    before = {node for end in ends for node in _before(end.args[0], depends)} - {given}  # type: ignore[arg-type]
    if any(user in depends and user not in before and user not in ends for node in before for user in node.users):
        return
    if any("optrelax.leaf" in str(node.target) for node in before):  # reads its weights itself
        return
    constants: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n in before or n in ends]:
        for argument in node.all_input_nodes:
            if argument not in depends and tensor_of(argument) is not None:
                if argument not in constants:
                    with graph.inserting_after(argument):
                        constants[argument] = detached(graph, argument)
                node.replace_input_with(argument, constants[argument])
    for end in ends:
        end.target = aten.alias.default


def _depending(graph: fx.Graph, given: fx.Node) -> set[fx.Node]:
    """The nodes whose values depend on the network's input, in more than its shape."""
    found = {given}
    for node in graph.nodes:
        reads = node.op == "call_function" and any(n in found for n in node.all_input_nodes)
        if reads and isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            found.add(node)
    return found


def _before(end: fx.Node, depends: set[fx.Node]) -> set[fx.Node]:
    """A node, and those that it depends on, among the network's values."""
    found: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in depends and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found
