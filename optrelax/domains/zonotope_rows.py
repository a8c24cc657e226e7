"""Rows of the output over zonotopes: folded into the affine end of the network, behind its last activations."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from optrelax.domains.backsubstitution import pull
from optrelax.domains.balls import absolute_terms
from optrelax.domains.noise_terms import Zonotope, median
from optrelax.domains.row_walks import dot
from optrelax.networks.graph import Network
from optrelax.networks.ops import flatten_from
from optrelax.rounding import SLACK, gamma, underflow


def frontier(network: Network) -> frozenset[str]:
    """The nodes at which the affine end of the network begins: activations, poolings or the input."""
    found: set[str] = set()
    stack = [network.output]
    while stack:
        name = stack.pop()
        if name == network.input or not network[name].affine:
            found.add(name)
        else:
            stack.extend(network[name].inputs)
    return frozenset(found)


def project(network: Network, zonotopes: dict[str, Zonotope], rows: Tensor, outward: bool) -> tuple[Tensor, Tensor]:
    """Centre and half width of rows of the output, folded into the last affine ops (elision).

    rows [batch or 1, k, *output_shape] -> [batch, k] each.
    """
    batch = next(iter(zonotopes.values())).center.shape[0]
    magnitude = _magnitudes(network, zonotopes) if outward else None
    walk = pull(network, network.output, rows, batch, {}, magnitude, stop=frozenset(zonotopes))
    if network.input in walk.pending:
        walk.stops[network.input] = walk.pending.pop(network.input)
    center, radius = walk.constant, torch.zeros_like(walk.constant)
    noise: dict[str, tuple[Tensor, Tensor]] = {}
    projected = None
    size = torch.zeros_like(center)
    for name, a in walk.stops.items():
        z = zonotopes[name]
        center = center + dot(a, z.center)
        flat = flatten_from(a, 2)
        for origin, block in z.blocks.items():
            g = flatten_from(block.generators, 2)
            part = flat @ g.mT  # [batch, k, e]
            noise[origin] = (noise[origin][0] + part if origin in noise else part, block.scale)
        if z.beta is not None:
            radius = radius + dot(a.abs(), z.beta)
        if z.projected is not None:
            part = torch.einsum("bkn,ben->bek", flat.expand(batch, -1, -1), flatten_from(z.projected, 2))
            projected = part if projected is None else projected + part
        if outward:
            size = size + dot(a.abs(), z.center.abs() + z.radius)
    for part, scale in noise.values():
        radius = radius + dot(part.abs(), scale)
    if projected is not None:
        radius = radius + median(projected.abs())
    if outward:
        terms = (
            sum(math.prod(a.shape[2:]) for a in walk.stops.values()) + sum(s.shape[1] for _, s in noise.values()) + 16
        )
        reach = 1 + sum((scale.sum(1, keepdim=True) for _, scale in noise.values()), torch.zeros_like(size[:, :1]))
        error = 4 * gamma(terms, size.dtype) * (size + walk.constant.abs()) + underflow(4 * terms, size.dtype) * reach
        if walk.allowance is not None:
            error = error + walk.allowance
        if walk.terms is not None:
            error = error + gamma(4 * len(network.nodes) + 8, size.dtype) * walk.terms
        radius = radius + SLACK * error
    return center, radius


def _magnitudes(network: Network, zonotopes: Mapping[str, Zonotope]) -> dict[str, Tensor]:
    """Magnitudes of the nodes behind the frontier, by intervals from the frontier's own."""
    found = {name: (z.center.abs() + z.radius) * SLACK for name, z in zonotopes.items()}
    for node in network:
        if node.name not in found and node.affine and all(i in found for i in node.inputs):
            size, lost = absolute_terms(node.affine, [found[i] for i in node.inputs])
            found[node.name] = SLACK * (size + lost)
    return found
