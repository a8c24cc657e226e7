"""Whether what a file would give back is what was saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Op
from optrelax.networks.ops import Shape
from optrelax.networks.rebuilding import rebuilt


def require_same(network: Network, graph: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """ValueError where the graph would be read back as another network."""
    try:
        again = rebuilt(graph, tensors)
    except ValueError as error:
        raise ValueError(f"save: the network would not be read back: {error}") from error
    parameter = next(network.module.parameters(), torch.empty((), device="cpu"))
    with torch.no_grad():
        for node, other in zip(network, again, strict=True):
            shapes = [network.shape_of(name) for name in node.inputs]
            if not (_same_facts(node.op, other.op) and _same_values(node.op, other.op, shapes, parameter)):
                raise ValueError(
                    f"save: {node.path}: {type(node.op).__name__} would come back as another function; its describe() "
                    "and tensors() must say all that it reads, and an activation's pieces give its very values"
                )


def _same_facts(op: Op, other: Op) -> bool:
    mine, others = op.tensors(), other.tensors()
    return (
        type(op) is type(other)
        and json.dumps(op.describe(), allow_nan=False) == json.dumps(other.describe(), allow_nan=False)
        and mine.keys() == others.keys()
        and all(_equal(mine[name](), others[name]()) for name in mine)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN being one."""
    none = a.isnan()
    same = a.dtype == b.dtype and torch.equal(none, b.isnan())
    return same and torch.equal(a.masked_fill(none, 0), b.masked_fill(none, 0))


def _close(a: Tensor, b: Tensor) -> bool:
    size = float(a.nan_to_num(0.0, 0.0, 0.0).abs().sum()) / max(a.numel(), 1)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def _same_values(op: Op, other: Op, shapes: Iterable[Shape], like: Tensor) -> bool:
    """Whether two ops agree on probes: to the bit where they work elementwise.

    Sums are forgiven their order, which follows the layout of a weight in memory; what is looked for there is a setting
    that an op does not say.
    """
    generator = torch.Generator().manual_seed(0)
    if not isinstance(op, Activation):
        probes = [torch.randn(2, *shape, generator=generator, device="cpu").to(like) for shape in shapes]
        return _close(op(*probes), other(*probes))
    x = (
        torch.randn(4096, generator=generator, dtype=torch.float64, device="cpu")
        * torch.logspace(-4, 4, 4096, device="cpu").double()
    )
    probes = [
        torch.cat([x, torch.tensor([*op.breaks, 0.0, torch.inf, -torch.inf], dtype=torch.float64, device="cpu")]).to(
            like
        )
    ]
    return _equal(op(*probes), other(*probes))
