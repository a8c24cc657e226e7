"""Interval arithmetic in centre-radius form: one product with W and one with |W| an affine op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.enclosures import Bounds, ordered
from optrelax.kernels import ball_products, native
from optrelax.kernels.ball_products import LinearBall, through, to_ball, to_weight
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear
from optrelax.regions import InputBox
from optrelax.rounding import SLACK, Rounding, down, gamma, peak, underflow, up

Loosen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Ball:
    """Values within `radius` of `center`, elementwise; [batch, *shape] each."""

    center: Tensor
    radius: Tensor
    outward: bool = False

    @property
    def bounds(self) -> Bounds:
        """[center - radius, center + radius]; a center or radius that overflowed bounds nothing."""
        l, u = self.center - self.radius, self.center + self.radius
        return ordered(down(l), up(u)) if self.outward else ordered(l, u)

    @property
    def magnitude(self) -> Tensor:
        """Greatest absolute value, [batch, *shape]."""
        return self.center.abs() + self.radius


def ball(l: Tensor, u: Tensor, outward: bool = False) -> Ball:
    """The smallest ball around [l, u]; outward, one that holds it in real arithmetic."""
    center, radius = (l + u) * 0.5, (u - l) * 0.5  # a division takes five times as long
    if outward:
        # u - c and c - l each round by half an ulp; the next float up covers it.
        radius = up(torch.maximum(u - center, center - l).clamp_min(0))
        radius = torch.where(l == u, 0.0, radius)
        center = torch.where(l == u, l, center)
    return Ball(center, radius, outward)


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
    region: InputBox,
    *,
    loosen: Loosen | None = None,
    rounding: Rounding = "nearest",
    targets: Set[str] | None = None,
) -> Intervals:
    """Interval bounds of every node; given `targets`, of these and of what was needed on the way.

    Sound: yes.  Exact: for the nodes of `network.exact_intervals`.  Gradient: of both ends in weights and region.
    loosen: applied to the pre-activation bounds of each activation (must widen).
    """
    require_rules(network, Ball)
    balls = {network.input: ball(region.lower, region.upper, rounding == "outward")}
    changed: dict[str, Bounds] = {}
    for node in network:
        if targets is not None and targets <= balls.keys():
            break
        if node.name in balls or any(name not in balls for name in node.inputs):  # inside of a chain
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


def affine_error(op: Affine, magnitudes: list[Tensor]) -> Tensor:
    """Allowance for an affine op on values of these magnitudes, image and |image| both: [batch, *shape].

    Each of the two products errs by at most gamma(fan_in + roundings) times the sum of absolute terms, which is
    |W| magnitude + |b|; their common sum is at most twice that. Products, sums and constants may underflow: see
    `optrelax.rounding`.
    """
    total, lost = absolute_terms(op, magnitudes)
    if op.cost() == 0:  # the same numbers in another shape
        return torch.zeros_like(total)
    return SLACK * (2 * gamma(_products(op), total.dtype) * total + lost)


def absolute_terms(op: Affine, magnitudes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """|W| magnitude + |b|, and what may be lost below the normal range: [batch, *shape], [batch, 1...]."""
    total = op.absolute(*magnitudes)
    size = op.bias_size(total)
    greatest = torch.stack([peak(m).reshape(-1, *[1] * len(op.shape)) for m in magnitudes]).amax(0)
    return total if size is None else total + size, underflow(4 * _products(op), total.dtype) * (1 + greatest)


def _products(op: Affine) -> int:
    """Roundings of one output, those of its constants included."""
    return op.fan_in * len(op.input_shapes) + op.roundings


@rule(Activation, domain=Ball)
def _activation(op: Activation, x: Ball) -> Ball:
    # The walk hands over the ends themselves here, so that no rounding is spent on the way.
    l, u = x.center, x.radius
    low, high = op.outward_image(l, u) if x.outward else op.image(l, u)
    return ball(low, high, x.outward)


@rule(Greatest, domain=Ball)
def _max_pool(op: Greatest, x: Ball) -> Ball:
    before = x.bounds
    return ball(op(before.lower), op(before.upper), x.outward)
