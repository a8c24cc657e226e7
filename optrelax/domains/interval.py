"""Interval arithmetic in centre-radius form: one product with W and one with |W| an affine op."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.backsubstitution import magnitudes, substitute, substitute_both
from optrelax.domains.balls import Ball, affine_error, ball
from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.enclosures import Bounds
from optrelax.kernels import ball_products, native
from optrelax.kernels.ball_products import LinearBall, through, to_ball, to_weight
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear
from optrelax.networks.products import Multiply
from optrelax.regions import InputBox, Region
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
            if isinstance(node.op, Activation) and (node.name in self.changed or node.inputs[0] in self.balls)
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
        if targets is not None and loosen is None and isinstance(node.op, Linear) and _compiles(inputs[0]):
            ops, last = _chain(network, node, targets)
            if last is not None:
                balls[last] = _through_chain(ops, inputs[0])
                continue
        if isinstance(node.op, Activation):
            if loosen is None and _compiles(inputs[0]) and node.op.is_relu:
                balls[node.name] = Ball(*_Rectify.apply(inputs[0].center, inputs[0].radius))
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
    return network.exact_intervals if isinstance(region, InputBox) else network.affine_ends


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


_SIGNATURES = (
    "rectify(n, center[n], radius[n], c[n], r[n], int8 active[n])",
    "rectify_back(n, int8 active[n], to_c[n], to_r[n], to_center[n], to_radius[n])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled ReLU, or why there is none."""
    return native.build(Path(native.__file__).with_name("interval.c"), *_SIGNATURES)


def _compiles(x: Ball) -> bool:
    """Whether the compiled passes do what the rules would: rounded to nearest, on a CPU."""
    return not x.outward and all(k.supports(x.center, x.radius) for k in (kernels(), ball_products.kernels()))


def _chain(network: Network, node: Node, targets: Set[str]) -> tuple[list[Linear], str | None]:
    """Linear ops from here on that each go into a ReLU, and the last of these; nobody else reads what is between."""
    ops: list[Linear] = []
    last = None
    while isinstance(node.op, Linear):
        relu = _only_reader(network, node, targets)
        if relu is None or not isinstance(relu.op, Activation) or not relu.op.is_relu:
            break
        ops.append(node.op)
        last = relu.name
        after = _only_reader(network, relu, targets)
        if after is None:
            break
        node = after
    return ops, last


def _only_reader(network: Network, node: Node, targets: Set[str]) -> Node | None:
    """The one node that reads a value nobody asked for."""
    readers = network.readers.get(node.name, ())
    return readers[0] if len(readers) == 1 and node.name not in targets and node.name != network.output else None


def _through_chain(ops: list[Linear], x: Ball) -> Ball:
    weights = [op.weight(x.center) for op in ops]
    biases = [op.bias(x.center) for op in ops]
    lead = x.center.shape[:-1]
    center, radius = _LinearChain.apply(len(ops), x.center.flatten(0, -2), x.radius.flatten(0, -2), *weights, *biases)
    return Ball(*(t.reshape(*lead, t.shape[-1]) for t in (center, radius)))


def _through(op: Linear, x: Ball) -> Ball:
    flat = (x.center.flatten(0, -2), x.radius.flatten(0, -2), op.weight(x.center))
    found = LinearBall.apply(*native.laid_out(*flat), op.bias(x.center))
    return Ball(*(t.reshape(*x.center.shape[:-1], t.shape[-1]) for t in found))


class _Rectify(torch.autograd.Function):
    """Center and radius before a ReLU -> those behind it. Keeps a byte an entry."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = center.contiguous(), radius.contiguous()
        found = torch.empty_like(center), torch.empty_like(radius)
        active = torch.empty_like(center, dtype=torch.int8)
        kernels().call("rectify", center.dtype, center.numel(), center, radius, *found, active)
        ctx.save_for_backward(active)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (active,) = ctx.saved_tensors
        to_c, to_r = grads
        if torch.is_grad_enabled():  # to be differentiated again
            low, high = (active & 1) * (to_c - to_r) / 2, (active >> 1) * (to_c + to_r) / 2
            return high + low, high - low
        found = torch.empty_like(active, dtype=to_c.dtype), torch.empty_like(active, dtype=to_c.dtype)
        given = active, to_c.contiguous(), to_r.contiguous()
        kernels().call("rectify_back", to_c.dtype, active.numel(), *given, *found)
        return found


class _LinearChain(torch.autograd.Function):
    """Center and radius [n, in] through matrices, each followed by a ReLU: one node of the graph for all."""

    @staticmethod
    def forward(ctx: Any, count: int, center: Tensor, radius: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        # The matrices as they are used: the gradient's products want them so too.
        weights = [w.contiguous() for w in given[:count] if w is not None]
        x = center.contiguous(), radius.contiguous()
        kept: list[Tensor] = []
        for weight, bias in zip(weights, given[count:], strict=True):
            y = through(*x, weight, bias)
            active = torch.empty_like(y[0], dtype=torch.int8)
            kernels().call("rectify", y[0].dtype, y[0].numel(), *y, *y, active)
            kept += [*x, active]
            x = y
        ctx.count = count
        ctx.save_for_backward(center, radius, *given, *weights, *kept)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, need = ctx.count, ctx.needs_input_grad
        saved = ctx.saved_tensors
        inputs, weights, kept = saved[: 2 + 2 * count], saved[2 + 2 * count : 2 + 3 * count], saved[2 + 3 * count :]
        if torch.is_grad_enabled():  # to be differentiated again
            # Under other names: where one input depends on another, or comes twice, each wants its own share.
            apart: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
            wanted = [t for t, w in zip(apart, need[1:], strict=True) if w]
            found = iter(torch.autograd.grad(_eager_chain(count, *apart), wanted, grads, create_graph=True))
            return None, *(next(found) if w else None for w in need[1:])
        to_weights: list[Tensor | None] = [None] * count
        to_biases: list[Tensor | None] = [None] * count
        to_c, to_r = (t.contiguous() for t in grads)
        for i in reversed(range(count)):
            c, r, active = kept[3 * i : 3 * i + 3]
            back = torch.empty_like(to_c), torch.empty_like(to_r)
            kernels().call("rectify_back", to_c.dtype, active.numel(), active, to_c, to_r, *back)
            to_biases[i] = back[0].sum(0) if need[3 + count + i] else None
            to_weights[i] = to_weight(*back, c, r, weights[i]) if need[3 + i] else None
            if i > 0 or need[1] or need[2]:
                to_c, to_r = to_ball(*back, weights[i])
        ends = (to_c, to_r)
        return None, *(t if w else None for t, w in zip(ends, need[1:3], strict=True)), *to_weights, *to_biases


def _eager_chain(count: int, center: Tensor, radius: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `_LinearChain` computes, by operations that are differentiated one by one."""
    for weight, bias in zip(given[:count], given[count:], strict=True):
        assert weight is not None
        center, radius = F.linear(center, weight, bias), radius @ weight.abs().mT
        low, high = (center - radius).relu(), (center + radius).relu()
        center, radius = (low + high) / 2, (high - low) / 2
    return center, radius


@rule(Affine, domain=Ball)
def _affine(op: Affine, *xs: Ball) -> Ball:
    if isinstance(op, Linear) and _compiles(xs[0]):
        return _through(op, xs[0])
    center, radius = op.apply(*(x.center for x in xs)), op.absolute(*(x.radius for x in xs))
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
