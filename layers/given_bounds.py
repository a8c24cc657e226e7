"""Pre-activation bounds that the user gives in place of a relaxation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from optrelax.enclosures import Bounds
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Preactivation


def given_bounds(network: Network, region: Region, given: Mapping[str, Bounds]) -> Preactivation:
    """Pre-activation bounds from the user, by path or node name, checked and flattened to the batch."""
    found: Preactivation = {}
    by_path = {node.path: node.path for node in network.activations}
    by_name = {node.name: node.path for node in network.activations}
    # A name may be another's path: keys are all of one kind.
    if given.keys() == by_name.keys() and given.keys() != by_path.keys():
        given = {by_name[name]: bounds for name, bounds in given.items()}
    unknown = sorted(set(given) - set(by_path))
    if unknown:
        paths = [node.path for node in network.activations]
        raise ValueError(f"preactivation: no activation named {unknown[0]!r}; the network has {paths}")
    for node in network.activations:
        bounds = given.get(node.path)
        if bounds is None:
            raise ValueError(f"preactivation: bounds of activation {node.path!r} are missing")
        shape = (region.shape[0], *node.shape)
        for end in (bounds.lower, bounds.upper):
            if end.numel() != region.shape[0] * math.prod(node.shape):
                raise ValueError(f"preactivation: {node.path!r} wants {shape}, got {tuple(end.shape)}")
            if not bool(end.detach().isfinite().all()):
                raise ValueError(f"preactivation: bounds of {node.path!r} must be finite")
        found[node.name] = Bounds(
            bounds.lower.to(region.like).reshape(shape), bounds.upper.to(region.like).reshape(shape)
        )
    return found


def same_options(mine: object, other: object) -> bool:
    """Equality of options, given bounds entry by entry."""
    match mine, other:
        case Mapping(), Mapping() if mine.keys() == other.keys():
            pairs = [(b, other[name]) for name, b in mine.items()]
            return all(torch.equal(b.lower, c.lower) and torch.equal(b.upper, c.upper) for b, c in pairs)
        case Mapping(), Mapping():
            return False
    return bool(mine == other)
