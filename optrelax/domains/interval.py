"""Interval arithmetic in centre-radius form: one product with W and one with |W| an affine op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optrelax import native
from optrelax.activations import Activation
from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.enclosures import Bounds
from optrelax.graph import Network
from optrelax.ops import Affine, MaxPool2d
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
        return Bounds(down(l), up(u)) if self.outward else Bounds(l, u)

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


@dataclass(frozen=True, slots=True)
class Intervals:
    """Result of a walk: a ball for each node's value, the loosened pre-activation bounds for each activation."""

    balls: dict[str, Ball]
    preactivation: dict[str, Bounds]


def propagate(
    network: Network, region: InputBox, *, loosen: Loosen | None = None, rounding: Rounding = "nearest"
) -> Intervals:
    """Interval bounds of every node.

    Sound: yes.  Exact: for the nodes of `network.exact_intervals`.  Gradient: of both ends in weights and region.
    loosen: applied to the pre-activation bounds of each activation (must widen).
    """
    require_rules(network, Ball)
    balls = {network.input: ball(region.lower, region.upper, rounding == "outward")}
    preactivation: dict[str, Bounds] = {}
    for node in network:
        inputs = [balls[name] for name in node.inputs]
        if isinstance(node.op, Activation):
            if loosen is None and _rectifies(node.op, inputs[0]):
                l, u, center, radius = _Rectify.apply(inputs[0].center, inputs[0].radius)
                preactivation[node.name], balls[node.name] = Bounds.known(l, u), Ball(center, radius)
                continue
            before = inputs[0].bounds
            if loosen is not None:
                before = Bounds(*loosen(before.lower, before.upper))
            preactivation[node.name] = before
            inputs = [Ball(before.lower, before.upper, inputs[0].outward)]
        step = find_rule(node.op, Ball)
        assert step is not None
        balls[node.name] = step(node.op, *inputs)
    return Intervals(balls, preactivation)


@functools.cache
def kernels() -> native.Build:
    """The compiled ReLU, or why there is none."""
    return native.build(Path(__file__).with_name("interval.c"))


def _rectifies(op: Activation, x: Ball) -> bool:
    """Whether the compiled pass does what the rule would: a ReLU, rounded to nearest, on a CPU."""
    relu = op.kinks == (0.0,) and op.slopes == (0.0, 1.0) and not any(op.intercepts)
    return relu and not x.outward and kernels().supports(x.center, x.radius)


class _Rectify(torch.autograd.Function):
    """Center and radius before a ReLU -> ends before it, center and radius after it; one pass, and one back."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, ...]:
        found = [torch.empty_like(center, memory_format=torch.contiguous_format) for _ in range(4)]
        kernels().call("rectify", center.dtype, center.numel(), center.contiguous(), radius.contiguous(), *found)
        ctx.save_for_backward(*found[:2])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor]:
        l, u = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            to_l, to_u, to_c, to_r = (torch.zeros_like(l) if g is None else g for g in grads)
            low = (l > 0) * (to_c - to_r) / 2 + to_l
            high = (u > 0) * (to_c + to_r) / 2 + to_u
            return high + low, high - low
        given = [None if g is None else g.contiguous() for g in grads]
        to_center, to_radius = torch.empty_like(l), torch.empty_like(l)
        kernels().call("rectify_back", l.dtype, l.numel(), l, u, *given, to_center, to_radius)
        return to_center, to_radius


@rule(Affine, domain=Ball)
def _affine(op: Affine, *xs: Ball) -> Ball:
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
