"""Interval arithmetic in centre-radius form: one product with W and one with |W| an affine op."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax import native
from optrelax.activations import Activation
from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.enclosures import Bounds
from optrelax.graph import Network, Node
from optrelax.ops import Affine, Linear, MaxPool2d
from optrelax.regions import InputBox
from optrelax.rounding import SLACK, Rounding, down, gamma, underflow, unit_roundoff, up

Loosen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Ball:
    """Values within `radius` of `center`, elementwise; [batch, *shape] each."""

    center: Tensor
    radius: Tensor
    outward: bool = False

    @property
    def bounds(self) -> Bounds:
        """[center - radius, center + radius]."""
        l, u = self.center - self.radius, self.center + self.radius
        return Bounds(down(l), up(u)) if self.outward else Bounds.known(l, u)

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
    """Result of a walk: a ball for each node's value, the pre-activation bounds that differ from their ball's."""

    network: Network
    balls: dict[str, Ball]
    changed: dict[str, Bounds]

    @functools.cached_property
    def preactivation(self) -> dict[str, Bounds]:
        """Bounds of the input of each activation, loosened where that was asked; made when first read."""
        return {
            node.name: self.changed.get(node.name) or self.balls[node.inputs[0]].bounds
            for node in self.network
            if node.name in self.balls and isinstance(node.op, Activation)
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
        if node.name in balls:  # with what it reads
            continue
        inputs = [balls[name] for name in node.inputs]
        if targets is not None and loosen is None and type(node.op) is Linear and _compiles(inputs[0]):
            relu = _alone_before(network, node, targets)
            if relu is not None:
                balls[relu.name] = _through(node.op, inputs[0], relu=True)
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


@functools.cache
def kernels() -> native.Build:
    """The compiled ReLU, or why there is none."""
    return native.build(Path(__file__).with_name("interval.c"))


def _compiles(x: Ball) -> bool:
    """Whether the compiled passes do what the rules would: rounded to nearest, on a CPU."""
    return not x.outward and kernels().supports(x.center, x.radius)


def _alone_before(network: Network, node: Node, targets: Set[str]) -> Node | None:
    """The ReLU that alone reads a node nobody asked for: the node's value need not outlive it."""
    readers = network.readers.get(node.name, ())
    if len(readers) != 1 or node.name in targets or node.name == network.output:
        return None
    op = readers[0].op
    return readers[0] if isinstance(op, Activation) and op.is_relu else None


def _through(op: Linear, x: Ball, relu: bool) -> Ball:
    given = (x.center.flatten(0, -2), x.radius.flatten(0, -2), op.weight(x.center), op.bias(x.center))
    found = _LinearBall.apply(*given, relu)
    return Ball(*(t.reshape(*x.center.shape[:-1], -1) for t in found)) if x.center.dim() != 2 else Ball(*found)


def _rectify(center: Tensor, radius: Tensor, into: tuple[Tensor, Tensor]) -> Tensor:
    """Writes center and radius behind a ReLU; returns which ends were active, a byte an entry."""
    active = torch.empty_like(center, dtype=torch.int8)
    kernels().call("rectify", center.dtype, center.numel(), center, radius, *into, active)
    return active


def _rectify_back(active: Tensor, to_c: Tensor, to_r: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients before the ReLU from those behind it."""
    if torch.is_grad_enabled():  # to be differentiated again
        low, high = (active & 1) * (to_c - to_r) / 2, (active >> 1) * (to_c + to_r) / 2
        return high + low, high - low
    found = torch.empty_like(active, dtype=to_c.dtype), torch.empty_like(active, dtype=to_c.dtype)
    given = active, to_c.contiguous(), to_r.contiguous()
    kernels().call("rectify_back", to_c.dtype, active.numel(), *given, *found)
    return found


class _Rectify(torch.autograd.Function):
    """Center and radius before a ReLU -> those behind it."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = center.contiguous(), radius.contiguous()
        found = torch.empty_like(center), torch.empty_like(radius)
        ctx.save_for_backward(_rectify(center, radius, found))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _rectify_back(*ctx.saved_tensors, *grads)


class _LinearBall(torch.autograd.Function):
    """Center and radius [n, in] through a matrix W [out, in], c W^T + b and r |W|^T, and, if asked, a ReLU.

    |W| is made anew in the backward pass, in a buffer that stays in the processor's cache, instead of being kept.
    """

    @staticmethod
    def forward(
        ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> tuple[Tensor, Tensor]:
        size = torch.abs(weight, out=_scratch(weight))
        found = F.linear(center, weight, bias), radius @ size.mT
        active = (_rectify(*found, found),) if relu else ()
        ctx.save_for_backward(center, radius, weight, *active)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight, *active = ctx.saved_tensors
        to_c, to_r = _rectify_back(*active, *grads) if active else grads
        need = ctx.needs_input_grad
        again = torch.is_grad_enabled()
        to_weight = None
        if need[2]:
            to_weight = to_c.mT @ center
            if again:
                to_weight = to_weight + weight.sign() * (to_r.mT @ radius)
            else:
                part = torch.mm(to_r.mT, radius, out=_scratch(weight))
                weight = weight.contiguous()
                kernels().call("add_signed", weight.dtype, weight.numel(), weight, part, to_weight)
        to_radius = None
        if need[1]:
            to_radius = to_r @ (weight.abs() if again else torch.abs(weight, out=_scratch(weight)))
        to_bias = to_c.sum(0) if need[3] else None
        return to_c @ weight if need[0] else None, to_radius, to_weight, to_bias, None


_LARGEST = 2**24  # bytes; a matrix beyond the caches gains nothing from a buffer that is kept
_buffers = threading.local()


def _scratch(like: Tensor) -> Tensor:
    """A buffer of this thread in the shape of a matrix, good until the next call: fresh memory costs more than sums."""
    size = like.numel() * like.element_size()
    if size > _LARGEST:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    held = getattr(_buffers, "held", None)
    if held is None or held.numel() < size:
        held = _buffers.held = torch.empty(size, dtype=torch.uint8)
    return held[:size].view(like.dtype).view(like.shape)


@rule(Affine, domain=Ball)
def _affine(op: Affine, *xs: Ball) -> Ball:
    if type(op) is Linear and _compiles(xs[0]):
        return _through(op, xs[0], relu=False)
    center, radius = op.apply(*(x.center for x in xs)), op.absolute(*(x.radius for x in xs))
    if not xs[0].outward:
        return Ball(center, radius)
    return Ball(center, radius + affine_error(op, center, [x.magnitude for x in xs]), outward=True)


def affine_error(op: Affine, value: Tensor, magnitudes: list[Tensor]) -> Tensor:
    """Allowance for an affine op on values of these magnitudes, image and |image| both: [batch, *shape].

    Each of the two products errs by at most gamma(fan_in + roundings) times the sum of absolute terms, which is
    |W| magnitude + |b|; their common sum is at most twice that. A product and a sum each may underflow.
    """
    terms = op.fan_in * len(magnitudes) + op.roundings
    total = op.absolute(*magnitudes)
    size = op.bias_size(total)
    if size is None and op.cost() == 0:  # the same numbers in another shape
        return torch.zeros_like(value)
    if size is not None:
        total = total + size
    return SLACK * (2 * gamma(terms, value.dtype) * total + underflow(4 * terms, value.dtype))


@rule(Activation, domain=Ball)
def _activation(op: Activation, x: Ball) -> Ball:
    # The walk hands over the ends themselves here, so that no rounding is spent on the way.
    low, high = op.image(x.center, x.radius)
    if x.outward and not op.exact:
        error, least = 4 * unit_roundoff(low.dtype), underflow(1, low.dtype)
        low, high = down(low - error * low.abs() - least), up(high + error * high.abs() + least)
    return ball(low, high, x.outward)


@rule(MaxPool2d, domain=Ball)
def _max_pool(op: MaxPool2d, x: Ball) -> Ball:
    before = x.bounds
    return ball(op(before.lower), op(before.upper), x.outward)
