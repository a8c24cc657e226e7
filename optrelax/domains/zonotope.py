"""Zonotopes and hybrid zonotopes: centre, shared noise terms, and an interval part for errors that are not shared.

The one implementation behind DeepZ and its kin (new errors are generators), hBox and its kin (new errors join the
interval part beta, Mirman et al. 2018) and random projection (new errors join k Cauchy projections, Wong et al. 2018).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from optrelax.domains.balls import affine_error
from optrelax.domains.interval import narrow_sources
from optrelax.domains.interval import propagate as propagate_intervals
from optrelax.domains.lines import Lines
from optrelax.domains.noise_terms import Block, Zonotope
from optrelax.domains.row_rules import choose_entries
from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.enclosures import Bounds
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, flatten_from
from optrelax.networks.products import Multiply
from optrelax.regions import InputBox
from optrelax.rounding import SLACK, Rounding, underflow, unit_roundoff, up

Errors = Literal["generators", "interval", "projection"]
LineRule = Callable[[Activation, Tensor, Tensor], Lines]


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk needs besides the network: lines of an activation, where new errors go, and how to round."""

    lines: LineRule
    errors: Errors = "generators"
    projections: int = 50
    seed: int = 0
    outward: bool = False
    narrow: Mapping[str, Bounds] = field(default_factory=dict)
    """Intervals of what activations read that are not defined everywhere, by the node read."""

    def cauchy(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The Cauchy projection of the errors born at node `name`: [k, *shape], the same for every batch."""
        # A checksum of the node's name, not Python's salted hash: equal in every process.
        digest = zlib.crc32(f"{self.seed} {name}".encode())
        generator = torch.Generator().manual_seed(digest)
        uniform = torch.rand(self.projections, *shape, generator=generator, dtype=torch.float64, device="cpu")
        return torch.tan(math.pi * (uniform - 0.5)).to(like)


@dataclass(frozen=True, slots=True)
class Zonotopes:
    """Result of a walk: pre-activation bounds of each activation, zonotopes of the nodes asked for."""

    preactivation: dict[str, Bounds]
    kept: dict[str, Zonotope]


def propagate(network: Network, region: InputBox, walk: Walk, keep: frozenset[str]) -> Zonotopes:
    """Carry a zonotope through the network; values that nobody reads any more are dropped on the way.

    Sound: yes, unless errors are projected.  Gradient: exact almost everywhere.
    """
    require_rules(network, Zonotope)
    readers = {
        name: sum(node.inputs.count(name) for node in network) for name in (network.input, *(n.name for n in network))
    }
    if sources := narrow_sources(network):
        rounding: Rounding = "outward" if walk.outward else "nearest"
        balls = propagate_intervals(network, region, rounding=rounding, targets=sources).balls
        walk = replace(walk, narrow={name: balls[name].bounds for name in sources})
    state = {network.input: _start(network, region, walk)}
    preactivation: dict[str, Bounds] = {}
    for node in network:
        inputs = [state[name] for name in node.inputs]
        if node.activation:
            preactivation[node.name] = _before(inputs[0], node, walk)
        step = find_rule(node.op, Zonotope)
        assert step is not None
        state[node.name] = step(node.op, node, walk, *inputs)
        for name in node.inputs:
            readers[name] -= 1
            if readers[name] == 0 and name not in keep:
                del state[name]
    return Zonotopes(preactivation, {name: state[name] for name in keep})


def _start(network: Network, region: InputBox, walk: Walk) -> Zonotope:
    shape = network.input_shape
    center, radius = region.center, region.radius
    if walk.outward:
        radius = up(torch.maximum(region.upper - center, center - region.lower))
    if walk.errors == "projection":
        projected = walk.cauchy(network.input, shape, center) * radius[:, None]
        return Zonotope(center, projected=projected)
    # Only pixels that can move need a noise term; where the widths want a gradient, those that cannot need one too.
    every = torch.full_like(radius[:1], radius.requires_grad, dtype=torch.bool)
    moving = torch.cat([radius.detach() > 0, every]).any(0).flatten().nonzero()[:, 0]
    eye = torch.zeros(len(moving), math.prod(shape), dtype=center.dtype, device=center.device)
    eye[torch.arange(len(moving), device=center.device), moving] = 1
    scale = flatten_from(radius, 1)[:, moving]
    block = Block(eye.reshape(1, -1, *shape), scale)
    return Zonotope(center, {network.input: block}, outward=walk.outward)


@rule(Affine, domain=Zonotope)
def _affine(op: Affine, node: Node, walk: Walk, *zs: Zonotope) -> Zonotope:
    center = op.apply(*(z.center for z in zs))
    blocks: dict[str, Block] = {}
    for name in dict.fromkeys(name for z in zs for name in z.blocks):
        held = [z.blocks.get(name) for z in zs]
        some = next(b for b in held if b is not None)
        parts = [
            b.generators if b is not None else some.generators.new_zeros(1, some.generators.shape[1], *shape)
            for b, shape in zip(held, op.input_shapes, strict=True)
        ]
        blocks[name] = Block(op.linear(*parts), some.scale)
    beta = None
    if any(z.beta is not None for z in zs):
        beta = op.apply_abs(*(torch.zeros_like(z.center) if z.beta is None else z.beta for z in zs))
    projected = None
    if zs[0].projected is not None:
        projected = op.linear(*(z.projected for z in zs if z.projected is not None))
    if walk.outward:
        error = affine_error(op, [z.center.abs() + z.radius for z in zs])
        if op.cost() > 0:
            lost = underflow(4 * op.fan_in * len(zs), center.dtype)
            error = error + SLACK * lost * sum(z.reach.reshape(-1, *[1] * len(op.shape)) for z in zs)
        beta = error if beta is None else beta + error
    return Zonotope(center, blocks, beta, projected, walk.outward)


def _before(z: Zonotope, node: Node, walk: Walk) -> Bounds:
    """Bounds of what an activation reads."""
    found = walk.narrow.get(node.inputs[0])
    return z.bounds if found is None else z.bounds.intersect(found)


@rule(Activation, domain=Zonotope)
def _activation(op: Activation, node: Node, walk: Walk, z: Zonotope) -> Zonotope:
    before = _before(z, node, walk)
    lines = walk.lines(op, before.lower, before.upper)
    lam = lines.lower_slope
    shift = (lines.lower_intercept + lines.upper_intercept) / 2
    mu = (lines.upper_intercept - lines.lower_intercept) / 2
    center = lam * z.center + shift
    blocks = {name: Block(b.generators * lam[:, None], b.scale) for name, b in z.blocks.items()}
    beta = None if z.beta is None else lam.abs() * z.beta
    if walk.outward:
        # Products, sums and halvings above: at most 8 units of every magnitude they touch.
        size = lam.abs() * (z.center.abs() + z.radius) + shift.abs() + mu
        error = SLACK * (8 * unit_roundoff(size.dtype) * size + underflow(8, size.dtype) * z.reach)
        beta = error if beta is None else beta + error
        exact = (lam == 1) & (shift == 0) & (mu == 0) | (lam == 0) & (shift == 0) & (mu == 0)
        beta = torch.where(exact, lam.abs() * (0 if z.beta is None else z.beta), beta)
    return _with_errors(replace(z, center=center, blocks=blocks, beta=beta, projected=None), z, lam, mu, node, walk)


def _with_errors(moved: Zonotope, before: Zonotope, lam: Tensor | None, mu: Tensor, node: Node, walk: Walk) -> Zonotope:
    """Add the new errors mu [batch, *shape] of `node` where the walk keeps them."""
    if walk.errors == "interval":
        return replace(moved, beta=mu if moved.beta is None else moved.beta + mu)
    if walk.errors == "projection":
        assert before.projected is not None
        assert lam is not None
        fresh = walk.cauchy(node.name, node.shape, mu) * mu[:, None]
        return replace(moved, projected=before.projected * lam[:, None] + fresh)
    block = _fresh_block(mu)
    if block is None:
        return moved
    return replace(moved, blocks=moved.blocks | {node.name: block})


def _fresh_block(mu: Tensor) -> Block | None:
    """One noise term for each neuron with an error, padded with zeros to the longest list of the batch."""
    flat = flatten_from(mu, 1)
    live = flat.detach() != 0
    count = int(live.sum(1).max()) if live.numel() else 0
    if count == 0:
        return None
    index = live.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
    generators = torch.zeros(*index.shape, flat.shape[1], dtype=mu.dtype, device=mu.device)
    generators.scatter_(2, index[..., None], 1.0)
    return Block(generators.reshape(*index.shape, *mu.shape[1:]), flat.gather(1, index))


@rule(Multiply, domain=Zonotope)
def _multiply(op: Multiply, node: Node, walk: Walk, x: Zonotope, y: Zonotope) -> Zonotope:
    """(c + p)(d + q) = c d + d p + c q + p q, and |p q| is at most both radii's product: a new error."""
    if walk.errors == "projection":
        raise UnsupportedOpError([Problem(node.path, type(op).__name__, "has no rule for random projection (cauchy)")])
    c, d, r, s = x.center, y.center, x.radius, y.radius
    mu = r * s
    center = c * d
    if x is y:  # p q is a square: from 0 on
        mu = mu / 2
        center = center + mu
    blocks = {}
    for name in dict.fromkeys((*x.blocks, *y.blocks)):
        parts = [(z.blocks[name], k) for z, k in ((x, d), (y, c)) if name in z.blocks]
        generators = parts[0][0].generators * parts[0][1][:, None]
        for block, k in parts[1:]:
            generators = generators + block.generators * k[:, None]
        blocks[name] = Block(generators, parts[0][0].scale)
    beta = None
    for z, k in ((x, d), (y, c)):
        if z.beta is not None:
            beta = k.abs() * z.beta if beta is None else beta + k.abs() * z.beta
    if walk.outward:
        # Products and sums above: at most 8 units of every magnitude they touch.
        size = (c.abs() + r) * (d.abs() + s)
        lost = underflow(8, size.dtype) * (x.reach + y.reach)
        error = SLACK * (8 * unit_roundoff(size.dtype) * size + lost)
        beta = error if beta is None else beta + error
    return _with_errors(Zonotope(center, blocks, beta, None, walk.outward), x, None, mu, node, walk)


@rule(Greatest, domain=Zonotope)
def _max_pool(op: Greatest, node: Node, walk: Walk, z: Zonotope) -> Zonotope:
    """A dominating entry passes through; any other window becomes its interval, a new error of its own."""
    if walk.errors == "projection":
        raise UnsupportedOpError([Problem(node.path, type(op).__name__, "has no rule for random projection (cauchy)")])
    before = z.bounds
    chosen, dominates, top = choose_entries(op, before, op.windows(z.center.device))
    low = op(before.lower)
    index = flatten_from(chosen, 1)

    def pick(
        x: Tensor,
    ) -> Tensor:  # [batch, *input] -> [batch, *output], zero where the window is an interval
        return torch.where(dominates, flatten_from(x, 1).gather(1, index).reshape(dominates.shape), 0.0)

    def pick_rows(g: Tensor) -> Tensor:
        g = g.expand(index.shape[0], *g.shape[1:])
        rows = flatten_from(g, 2).gather(2, index[:, None].expand(-1, g.shape[1], -1))
        return torch.where(dominates[:, None], rows.reshape(*g.shape[:2], *op.shape), 0.0)

    middle, mu = (low + top) / 2, (top - low) / 2
    if walk.outward:
        mu = up(torch.maximum(top - middle, middle - low))
    center = torch.where(dominates, pick(z.center), middle)
    mu = torch.where(dominates, 0.0, mu)
    blocks = {name: Block(pick_rows(b.generators), b.scale) for name, b in z.blocks.items()}
    beta = None if z.beta is None else pick(z.beta)
    return _with_errors(replace(z, center=center, blocks=blocks, beta=beta), z, None, mu, node, walk)
