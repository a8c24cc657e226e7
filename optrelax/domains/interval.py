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


@functools.cache
def kernels() -> native.Build:
    """The compiled ReLU, or why there is none."""
    return native.build(Path(__file__).with_name("interval.c"))


def _compiles(x: Ball) -> bool:
    """Whether the compiled passes do what the rules would: rounded to nearest, on a CPU."""
    return not x.outward and kernels().supports(x.center, x.radius)


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
    given = (op.weight(x.center), op.bias(x.center))
    if x.center.dim() == 2:
        return Ball(*_LinearBall.apply(x.center, x.radius, *given))
    found = _LinearBall.apply(x.center.flatten(0, -2), x.radius.flatten(0, -2), *given)
    return Ball(*(t.reshape(*x.center.shape[:-1], t.shape[-1]) for t in found))


class _Rectify(torch.autograd.Function):
    """Center and radius before a ReLU -> those behind it. Keeps a byte an entry."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = center.contiguous(), radius.contiguous()
        found = torch.empty_like(center), torch.empty_like(radius)
        active = torch.empty_like(center, dtype=torch.int8)
        kernels().call("rectify", center.dtype, 1, center.numel(), None, center, radius, *found, active)
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


class _LinearBall(torch.autograd.Function):
    """Center and radius [n, in] through a matrix W [out, in]: c W^T + b, r |W|^T.

    |W| is made anew in the backward pass, in a buffer that stays in the processor's cache, instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        size = torch.abs(weight, out=_scratch(weight))
        return F.linear(center, weight, bias), radius @ size.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        center, radius, weight = ctx.saved_tensors
        to_c, to_r = grads
        need = ctx.needs_input_grad
        again = torch.is_grad_enabled()
        to_weight = None
        if need[2] and again:
            to_weight = to_c.mT @ center + weight.sign() * (to_r.mT @ radius)
        elif need[2]:
            part = torch.mm(to_r.mT, radius, out=_scratch(weight))
            to_weight = to_c.mT @ center
            kernels().call("fold", weight.dtype, weight.numel(), weight.contiguous(), to_weight, part, to_weight)
        to_radius = None
        if need[1]:
            to_radius = to_r @ (weight.abs() if again else torch.abs(weight, out=_scratch(weight)))
        return to_c @ weight if need[0] else None, to_radius, to_weight, to_c.sum(0) if need[3] else None


class _LinearChain(torch.autograd.Function):
    """Center and radius [n, in] through matrices, each followed by a ReLU: one node of the graph for all.

    Center and radius lie one behind the other, W and |W| too: a batched product of two, one a thread.
    """

    @staticmethod
    def forward(ctx: Any, count: int, center: Tensor, radius: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        x = torch.stack((center, radius))
        kept: list[Tensor] = []
        for weight, bias in zip(given[:count], given[count:], strict=True):
            assert weight is not None
            y = torch.bmm(x, _both(weight).mT)
            active = torch.empty(y.shape[1:], dtype=torch.int8, device=y.device)
            bias = None if bias is None else bias.contiguous()
            kernels().call("rectify", y.dtype, *y.shape[1:], bias, y[0], y[1], y[0], y[1], active)
            kept += [x, active]
            x = y
        ctx.count = count
        ctx.save_for_backward(center, radius, *given, *kept)
        return x[0].clone(), x[1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, need = ctx.count, ctx.needs_input_grad
        saved = ctx.saved_tensors
        inputs, kept = saved[: 2 + 2 * count], saved[2 + 2 * count :]
        if torch.is_grad_enabled():  # to be differentiated again
            # Under other names: where one input depends on another, or comes twice, each wants its own share.
            apart: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
            wanted = [t for t, w in zip(apart, need[1:], strict=True) if w]
            found = iter(torch.autograd.grad(_eager_chain(count, *apart), wanted, grads, create_graph=True))
            return None, *(next(found) if w else None for w in need[1:])
        to_weights: list[Tensor | None] = [None] * count
        to_biases: list[Tensor | None] = [None] * count
        g: Tensor | None = torch.stack(grads)
        for i in reversed(range(count)):
            assert g is not None
            weight, x, active = inputs[2 + i], kept[2 * i], kept[2 * i + 1]
            kernels().call("rectify_back", g.dtype, active.numel(), active, g[0], g[1], g[0], g[1])
            to_biases[i] = g[0].sum(0) if need[3 + count + i] else None
            if need[3 + i]:
                parts = torch.bmm(g.mT, x, out=_scratch(weight, 2))
                to_weights[i] = torch.empty_like(weight, memory_format=torch.contiguous_format)
                kernels().call("fold", g.dtype, weight.numel(), weight.contiguous(), *parts, to_weights[i])
            g = torch.bmm(g, _both(weight)) if i > 0 or need[1] or need[2] else None
        ends = (None, None) if g is None else (g[0], g[1])
        return None, *(t if w else None for t, w in zip(ends, need[1:3], strict=True)), *to_weights, *to_biases


def _eager_chain(count: int, center: Tensor, radius: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `_LinearChain` computes, by operations that are differentiated one by one."""
    for weight, bias in zip(given[:count], given[count:], strict=True):
        assert weight is not None
        center, radius = F.linear(center, weight, bias), radius @ weight.abs().mT
        low, high = (center - radius).relu(), (center + radius).relu()
        center, radius = (low + high) / 2, (high - low) / 2
    return center, radius


def _both(weight: Tensor) -> Tensor:
    """W and |W| in a buffer: [2, out, in]."""
    found = _scratch(weight, 2)
    found[0].copy_(weight)
    torch.abs(weight, out=found[1])
    return found


_LARGEST = 2**24  # bytes; a matrix beyond the caches gains nothing from a buffer that is kept
_buffers = threading.local()


def _scratch(like: Tensor, count: int = 1) -> Tensor:
    """A buffer of this thread for one matrix, or [count, *shape], good until the next call.

    Fresh memory costs more than the sums that go into it.
    """
    shape = like.shape if count == 1 else (count, *like.shape)
    size = count * like.numel() * like.element_size()
    if size > _LARGEST:
        return like.new_empty(shape)
    views = _buffers.__dict__.setdefault("views", {})
    found = views.get((shape, like.dtype))
    if found is None:
        with torch.inference_mode(False):  # whose tensors nothing outside it may write to
            held = _buffers.__dict__.get("held")
            if held is None or held.numel() < size:
                views.clear()
                held = _buffers.held = torch.empty(size, dtype=torch.uint8, device="cpu")
            found = views[shape, like.dtype] = held[:size].view(like.dtype).view(shape)
    return found


@rule(Affine, domain=Ball)
def _affine(op: Affine, *xs: Ball) -> Ball:
    if isinstance(op, Linear) and _compiles(xs[0]):
        return _through(op, xs[0])
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
