"""Values whose batch stands second, as recurrent layers give and take them: what is read of them has it in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_MOVES = (aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy)
_FILLED = {aten.zeros.default, aten.ones.default, aten.full.default}


def read_in_front(graph: fx.Graph) -> None:
    """One entry of the first dimension of such a value is made without the value; so is the value with both swapped."""
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
            continue
        rank, found = source.meta["val"].dim(), None
        if node.target is aten.select.int and node.args[1] % rank == 0:
            found = _entry(graph, source, node.args[2], node)
        elif node.target is aten.squeeze.dim and node.args[1] % rank == 0 and source.meta["val"].shape[0] == 1:
            found = _entry(graph, source, 0, node)
        elif _swaps(node):
            found = _swapped(graph, source, node)
        if found is not None:
            node.replace_all_uses_with(found)


def _entry(graph: fx.Graph, value: fx.Node, index: int, like: fx.Node) -> fx.Node | None:
    """value[index]; None where it is not known to be a node of its own."""
    target, first = value.target, value.args[0] if value.args else None
    if target is aten.stack.default and (len(value.args) < 2 or value.args[1] == 0):
        return first[index]  # type: ignore[index, return-value]
    if target is aten.unsqueeze.default and value.args[1] == 0:
        return first  # type: ignore[return-value]
    if target in _FILLED:
        return _made(graph, like, target, (first[1:], *value.args[1:]), value.kwargs)  # type: ignore[index]
    if _swaps(value):
        return _made(graph, like, aten.select.int, (first, 1, index), {})
    if getattr(target, "overloadpacket", None) in _MOVES:
        inner = _entry(graph, first, index, like)  # type: ignore[arg-type]
        return None if inner is None else _made(graph, like, target, (inner, *value.args[1:]), value.kwargs)
    return None


def _swapped(graph: fx.Graph, value: fx.Node, like: fx.Node) -> fx.Node | None:
    """A value with its first two dimensions swapped; None where it is not known to be a node of its own."""
    if _swaps(value):
        return value.args[0]  # type: ignore[return-value]
    if value.target is aten.stack.default and (len(value.args) < 2 or value.args[1] == 0):
        return _made(graph, like, aten.stack.default, (value.args[0], 1), {})
    if getattr(value.target, "overloadpacket", None) in _MOVES:
        inner = _swapped(graph, value.args[0], like)  # type: ignore[arg-type]
        return None if inner is None else _made(graph, like, value.target, (inner, *value.args[1:]), value.kwargs)
    return None


def _swaps(node: fx.Node) -> bool:
    """Whether a call swaps the first two dimensions, and no others."""
    if node.target not in (aten.transpose.int, aten.permute.default):
        return False
    rank = node.meta["val"].dim()
    dims: Any = node.args[1] if node.target is aten.permute.default else node.args[1:]
    order = [int(d) % rank for d in dims]
    return order == [1, 0, *range(2, rank)] or (node.target is aten.transpose.int and sorted(order) == [0, 1])


def _made(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any) -> fx.Node:
    """A call with the value and the place of `like`, in front of it."""
    with graph.inserting_before(like):
        found = graph.call_function(target, args, dict(kwargs))
    found.meta = dict(like.meta)
    return found
