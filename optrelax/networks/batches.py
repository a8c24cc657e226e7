"""Two graphs of one module for two sizes of the batch, as one graph for any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from optrelax.networks.ops import Shape

_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


def two_sizes(net: nn.Module, shape: Shape) -> tuple[int, int]:
    """Two sizes of a batch that no dimension of the module's tensors or of its input has."""
    used = {n for t in (*net.parameters(), *net.buffers()) for n in t.shape} | set(shape)
    first, second, *_ = [p for p in _PRIMES if p not in used] + [101, 103]
    return first, second


def unify(graph: fx.Graph, other: fx.Graph, given: fx.Node, sizes: tuple[int, int]) -> bool:
    """Put the size of the batch in `graph` for each number that it decides; False where they differ in more."""
    nodes, others = list(graph.nodes), list(other.nodes)
    if len(nodes) != len(others):
        return False
    with graph.inserting_after(given):
        batch = graph.call_function(torch.ops.aten.sym_size.int, (given, 0))
    twins = dict(zip(nodes, others, strict=True))
    for node, twin in twins.items():
        if node.op != twin.op or (str(node.target) != str(twin.target) and node.op == "call_function"):
            return False
        if not _alike(node.meta.get("val"), twin.meta.get("val"), sizes):
            return False
        try:
            args = _merge((node.args, node.kwargs), (twin.args, twin.kwargs), sizes, twins, batch)
        except _Differ:
            return False
        node.args, node.kwargs = args
    return True


class _Differ(Exception):
    """The graphs differ in more than the size of the batch."""


def _merge(a: object, b: object, sizes: tuple[int, int], twins: dict[fx.Node, fx.Node], batch: fx.Node) -> Any:
    match a, b:
        case fx.Node(), _ if twins.get(a) is b:
            return a
        case dict(), dict() if a.keys() == b.keys():
            return {k: _merge(a[k], b[k], sizes, twins, batch) for k in a}
        case list() | tuple(), list() | tuple() if len(a) == len(b):
            return type(a)(_merge(x, y, sizes, twins, batch) for x, y in zip(a, b, strict=True))
        case fx.Node() | dict() | list() | tuple(), _:
            raise _Differ
    if type(a) is int and (a, b) == sizes:
        return batch
    if type(a) is not type(b) or not (a == b or a != a):
        raise _Differ
    return a


def _alike(a: object, b: object, sizes: tuple[int, int]) -> bool:
    """Whether two example values have one shape, but for the batch."""
    match a, b:
        case list() | tuple(), list() | tuple():
            return len(a) == len(b) and all(map(_alike, a, b, [sizes] * len(a)))
        case Tensor(), Tensor() if a.dim() == b.dim():
            # A dimension that is the first size by chance, and does not follow the batch, would be taken for it.
            pairs = zip(a.shape, b.shape, strict=True)
            return all((x, y) == sizes or (x == y and x != sizes[0]) for x, y in pairs)
        case list() | tuple() | Tensor(), _:
            return False
    return True
