"""What the nodes of an exported graph say of themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# Read a value's shape, type and device alone.
SHAPES_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
SIZES = {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int}
# An op that may draw numbers draws none where one of these says so.
_SWITCHED_OFF = {"train": False, "training": False, "dropout": 0.0, "dropout_p": 0.0}


def with_ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    given = arguments_by_name(node)
    return not any(name in given and given[name] == value for name, value in _SWITCHED_OFF.items())


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by the names of its schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return defaults | dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)


def is_symbol(size: object) -> TypeGuard[torch.SymInt]:
    """Whether a size is a symbol, and no number."""
    return isinstance(size, torch.SymInt)


def tensor_of(node: fx.Node) -> Tensor | None:
    """The example value of a node, where that is a tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def size_at(size: Any, batch: Any, value: int) -> int:
    """A size where the batch has that many examples."""
    if is_symbol(size):
        return int(size.node.expr.subs({batch.node.expr: value}))
    return value if is_batch(size, batch) else int(size)


def is_batch(size: object, batch: object) -> bool:
    """Whether a size is that of the batch: a symbol, or, in a graph made of two, a number that no other size is."""
    if is_symbol(size):
        return is_symbol(batch) and bool(size.node.expr == batch.node.expr)
    return type(batch) is int and size == batch
