"""Interval arithmetic in centre-radius form: one product with W and one with |W| an affine op."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.domains.backsubstitution import magnitudes, substitute, substitute_both
from optrelax.domains.balls import Ball, affine_error, ball
from optrelax.domains.interval_chains import Rectify, chain_from, compiles, through_chain, through_matrix
from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.enclosures import Bounds
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear
from optrelax.networks.products import Multiply
from optrelax.regions import Region
from optrelax.rounding import Rounding, down, up

Loosen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Intervals:
    """Result of a walk: a ball for each node's value, the pre-activation bounds that differ from their ball's.

    A walk with targets has no ball inside a chain that was passed through at once.
    """

    network: Network
    balls: dict[str, Ball]
    changed: dict[str, Bounds]

    @functools.cached_property
    def preactivation(self) -> dict[str, Bounds]:
        """Bounds of the input of each activation, loosened where that was asked; made when first read."""
        return {
            node.name: self.changed.get(node.name) or self.balls[node.inputs[0]].bounds
            for node in self.network
            if node.activation and (node.name in self.changed or node.inputs[0] in self.balls)
        }


def propagate(
    network: Network,
    region: Region,
    *,
    loosen: Loosen | None = None,
    rounding: Rounding = "nearest",
    targets: Set[str] | None = None,
) -> Intervals:
    """Interval bounds of every node; given `targets`, of these and of what was needed on the way.

    Over a region that is no box, affine functions of the input get their range over it, others that of the box around.
    Sound: yes.  Exact: for the nodes of `exact_nodes`.  Gradient: of both ends in weights and region.
    loosen: applied to the pre-activation bounds of each activation (must widen).
    """
    require_rules(network, Ball)
    outward = rounding == "outward"
    box = region.box(outward)
    balls = {network.input: ball(box.lower, box.upper, outward)}
    changed: dict[str, Bounds] = {}
    ranges = frozenset[str]() if box is region else network.affine_ends
    for node in network:
        if targets is not None and targets <= balls.keys():
            break
        if node.name in balls or any(name not in balls for name in node.inputs):  # inside of a chain
            continue
        if node.name in ranges:
            balls[node.name] = _range(network, node, region, balls if outward else None)
            continue
        inputs = [balls[name] for name in node.inputs]
        if targets is not None and loosen is None and node.of(Linear) is not None and compiles(inputs[0]):
            ops, last = chain_from(network, node, targets)
            if last is not None:
                balls[last] = through_chain(ops, inputs[0])
                continue
        if node.activation:
            if loosen is None and compiles(inputs[0]) and node.activation.is_relu:
                balls[node.name] = Ball(*Rectify.apply(inputs[0].center, inputs[0].radius))
                continue
            before = inputs[0].bounds
            if loosen is not None:
                before = Bounds(*loosen(before.lower, before.upper))
            changed[node.name] = before
            inputs = [Ball(before.lower, before.upper, inputs[0].outward)]
        step = find_rule(node.op, Ball)
        assert step is not None
        balls[node.name] = step(node.op, *inputs)
    return Intervals(network, balls, changed)


def exact_nodes(network: Network, region: Region) -> frozenset[str]:
    """Nodes whose bounds by intervals are exact over the region."""
    return network.affine_ends if region.as_box is None else network.exact_intervals


_ENTRIES = 2**24  # of rows pulled back together


def _range(network: Network, node: Node, region: Region, balls: dict[str, Ball] | None) -> Ball:
    """What an affine function of the input takes on over a region: its rows pulled back, outward where balls are given.

    Exact to rounding: the support function, which for a norm's ball is its dual norm.
    """
    n = math.prod(node.shape)
    size = max(1, _ENTRIES // max(1, n + math.prod(network.input_shape)))
    parts = []
    for first in range(0, n, size):
        rows = torch.zeros(1, min(size, n - first), n, dtype=region.dtype, device=region.device)
        rows[0].diagonal(first).fill_(1)
        rows = rows.reshape(1, -1, *node.shape)
        if balls is None:
            parts.append(substitute_both(network, node.name, rows, region, {}))
            continue
        sizes = magnitudes(network, balls)
        low, high = (substitute(network, node.name, r, region, {}, magnitude=sizes) for r in (rows, -rows))
        parts.append((low, -high))
    low, high = (torch.cat(of, 1).reshape(-1, *node.shape) for of in zip(*parts, strict=True))
    return ball(low, high, balls is not None)


def narrow_sources(network: Network) -> frozenset[str]:
    """What activations read that are not defined everywhere: intervals keep to a domain where lines may leave it."""
    return frozenset(n.inputs[0] for n in network.activations if not n.op.everywhere)


@rule(Affine, domain=Ball)
def _affine(op: Affine, *xs: Ball) -> Ball:
    if isinstance(op, Linear) and compiles(xs[0]):
        return through_matrix(op, xs[0])
    center, radius = op.apply(*(x.center for x in xs)), op.apply_abs(*(x.radius for x in xs))
    if not xs[0].outward:
        return Ball(center, radius)
    return Ball(center, radius + affine_error(op, [x.magnitude for x in xs]), outward=True)


@rule(Activation, domain=Ball)
def _activation(op: Activation, x: Ball) -> Ball:
    # The walk hands over the ends themselves here, so that no rounding is spent on the way.
    l, u = x.center, x.radius
    low, high = op.outward_image(l, u) if x.outward else op.image(l, u)
    return ball(low, high, x.outward)


@rule(Multiply, domain=Ball)
def _multiply(op: Multiply, x: Ball, y: Ball) -> Ball:
    """The extremes are at corners; of a value with itself, at its ends and at 0."""
    a, b = x.bounds, y.bounds
    if x is y:
        low, high = a.lower * a.lower, a.upper * a.upper
        least = torch.where((a.lower < 0) & (a.upper > 0), 0.0, torch.minimum(low, high))
        greatest = torch.maximum(low, high)
    else:
        corners = [p * q for p in (a.lower, a.upper) for q in (b.lower, b.upper)]
        least = torch.minimum(torch.minimum(corners[0], corners[1]), torch.minimum(corners[2], corners[3]))
        greatest = torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
    if x.outward:
        # A product rounds by half a step; a square is none below 0.
        least, greatest = down(least), up(greatest)
        least = least.clamp_min(0) if x is y else least
    return ball(least, greatest, x.outward)


@rule(Greatest, domain=Ball)
def _max_pool(op: Greatest, x: Ball) -> Ball:
    before = x.bounds
    return ball(op(before.lower), op(before.upper), x.outward)
