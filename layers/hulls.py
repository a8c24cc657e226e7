"""The hulls of neurons as faces: two below and two above each, of an activation lines, of a product planes.

The hull of a product is McCormick's: two planes over its factors in place of two lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.domains.planes import product_planes
from optrelax.enclosures import Bounds
from optrelax.layers.batched import Batched
from optrelax.networks.activations import Activation, Hull, Line
from optrelax.networks.graph import Network, Node

Face = tuple[Tensor, ...]  # a slope for each value that is read, and the intercept: a line, or the plane of a product


@dataclass(frozen=True, slots=True)
class HullLines(Batched):
    """Two faces below and two above every neuron, [R or examples, *shape]; `above1` is None where there is one."""

    below0: Face
    below1: Face
    above0: Face
    above1: Face | None
    before: tuple[Tensor, ...]
    """The pre-activation bounds that the hull was taken at; of a product none: its operands have them."""
    free: Tensor
    """Where the neuron crosses, so that its weights matter."""
    origin: bool = False
    """Whether both lines below pass through the origin, as a ReLU's do: their intercepts need no work."""


def hull_lines(activation: Activation, before: Bounds) -> HullLines:
    """The hull of one activation at its pre-activation bounds; differentiable in them.

    Of bounds that are no numbers, so that nothing is known, the lines are none either: whatever is made of them is NaN.
    """
    hull = activation.hull(before.lower, before.upper)
    unknown = before.lower.detach().isnan() | before.upper.detach().isnan()
    if bool(unknown.any()):
        hull = Hull(*(tuple(_unknown_at(unknown, line) for line in side) for side in (hull.below, hull.above)))  # type: ignore[arg-type]
    free = activation.crossing(before.lower.detach(), before.upper.detach())
    above1 = None if activation.chord_above else hull.above[1]
    ends = (before.lower, before.upper)
    return HullLines(hull.below[0], hull.below[1], hull.above[0], above1, ends, free, activation.origin_below)


def _unknown_at(unknown: Tensor, line: Line) -> Line:
    slope, intercept = (torch.where(unknown, torch.nan, t) for t in line)
    return slope, intercept


def product_hull(x: Bounds, y: Bounds) -> HullLines:
    """McCormick's planes of the product of two bounded values: of each side those of its shares 0 and 1.

    Exact: the convex hull of the product over the box.  Gradient: exact.  Source: McCormick 1976.
    """
    first, second = (product_planes(x, y, below=share, above=share) for share in (0.0, 1.0))
    free = (x.lower < x.upper).detach() & (y.lower < y.upper).detach()
    return HullLines(first.below, second.below, first.above, second.above, (), free)


def hulls_at(network: Network, bounds: Mapping[str, Bounds]) -> dict[str, HullLines]:
    """Hulls of the activations whose pre-activation bounds are given, and of the products of such."""
    hulls: dict[str, HullLines] = {}
    for node in network.relaxed:
        if not all(name in bounds for name in bounded_by(node)):
            continue
        given = [bounds[name] for name in bounded_by(node)]
        hulls[node.name] = hull_lines(node.op, *given) if node.activation else product_hull(*given)
    return hulls


def bounded_by(node: Node) -> tuple[str, ...]:
    """The activations whose pre-activation bounds a node's hull is taken at."""
    return (node.name,) if node.activation else node.inputs


def mix(first: Face, second: Face | None, weight: Tensor | None, origin: bool = False) -> Face:
    """The face between two: weight 0 the first, 1 the second; origin: both pass through it."""
    if second is None or weight is None:
        return first
    *slopes, intercept = first
    mixed = [torch.lerp(slope, other, weight) for slope, other in zip(slopes, second, strict=False)]
    return (*mixed, intercept if origin else torch.lerp(intercept, second[-1], weight))


def height(face: Face, values: Sequence[Tensor], origin: bool = False) -> Tensor:
    """The face at values of what it reads."""
    total = face[0] * values[0] if origin else torch.addcmul(face[-1], face[0], values[0])
    for slope, z in zip(face[1:-1], values[1:], strict=True):
        total = torch.addcmul(total, slope, z)
    return total


def floor_and_ceiling(h: HullLines, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the hull at a pre-activation, or at both factors."""
    low = torch.maximum(height(h.below0, inputs), height(h.below1, inputs))
    high = height(h.above0, inputs)
    if h.above1 is not None:
        high = torch.minimum(high, height(h.above1, inputs))
    return low, high
