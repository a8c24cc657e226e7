"""Several nodes that exporters write for one function, found before rules see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import onnx

__all__ = ["whole_nodes"]


def whole_nodes(
    graph: onnx.GraphProto, constants: Mapping[str, Tensor]
) -> Iterator[tuple[onnx.NodeProto, dict[str, float]]]:
    """The nodes to build, each with attributes beyond its own.

    PyTorch writes softplus as `Where(Greater(x, threshold), x, Softplus(x))`: that is one Softplus, to the bit.
    """
    nodes = list(graph.node)
    made = {output: node for node in nodes for output in node.output}
    found: dict[str, tuple[onnx.NodeProto, float]] = {}  # by the output of the Where
    for node in nodes:
        if (softplus := _softplus(node, made, constants)) is not None:
            found[node.output[0]] = softplus
    gone = {node.input[0] for node in nodes if found.keys() & set(node.output)}
    gone -= {name for node in nodes for name in node.input if not found.keys() & set(node.output)}
    for node in nodes:
        if len(node.output) == 1 and node.output[0] in found:
            softplus, threshold = found[node.output[0]]
            whole = type(node)(op_type="Softplus", name=node.name, input=softplus.input, output=node.output)
            yield whole, {"threshold": threshold}
        elif not (node.op_type == "Greater" and gone.issuperset(node.output)):
            yield node, {}


def _softplus(
    where: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], constants: Mapping[str, Tensor]
) -> tuple[onnx.NodeProto, float] | None:
    """The Softplus of such a Where, and its threshold."""
    if where.op_type != "Where" or len(where.input) != 3 or len(where.output) != 1:
        return None
    condition, x, other = where.input
    greater, softplus = made.get(condition), made.get(other)
    if greater is None or softplus is None or (greater.op_type, softplus.op_type) != ("Greater", "Softplus"):
        return None
    if len(greater.input) != 2 or greater.input[0] != x or list(softplus.input) != [x]:
        return None
    threshold = constants.get(greater.input[1])
    if threshold is None or threshold.numel() != 1 or not threshold.is_floating_point():
        return None
    return softplus, float(threshold)
