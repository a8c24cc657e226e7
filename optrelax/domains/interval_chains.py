"""Balls through matrices and ReLUs compiled: one of either, or a chain of both as one node of the graph."""

from __future__ import annotations

import functools
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.domains.balls import Ball
from optrelax.kernels import ball_products, native
from optrelax.kernels.ball_products import LinearBall, through, to_ball, to_weight
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import Linear

_SIGNATURES = (
    "rectify(n, center[n], radius[n], c[n], r[n], int8 active[n])",
    "rectify_back(n, int8 active[n], to_c[n], to_r[n], to_center[n], to_radius[n])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled ReLU, or why there is none."""
    return native.build(Path(native.__file__).with_name("interval.c"), *_SIGNATURES)


def compiles(x: Ball) -> bool:
    """Whether the compiled passes do what the rules would: rounded to nearest, on a CPU."""
    return not x.outward and all(k.supports(x.center, x.radius) for k in (kernels(), ball_products.kernels()))


def chain_from(network: Network, node: Node, targets: Set[str]) -> tuple[list[Linear], str | None]:
    """Linear ops from here on that each go into a ReLU, and the last of these; nobody else reads what is between."""
    ops: list[Linear] = []
    last = None
    while op := node.of(Linear):
        relu = _only_reader(network, node, targets)
        if relu is None or not relu.activation or not relu.activation.is_relu:
            break
        ops.append(op)
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


def through_chain(ops: list[Linear], x: Ball) -> Ball:
    weights = [op.weight(x.center) for op in ops]
    biases = [op.bias(x.center) for op in ops]
    lead = x.center.shape[:-1]
    center, radius = LinearChain.apply(len(ops), x.center.flatten(0, -2), x.radius.flatten(0, -2), *weights, *biases)
    return Ball(*(t.reshape(*lead, t.shape[-1]) for t in (center, radius)))


def through_matrix(op: Linear, x: Ball) -> Ball:
    flat = (x.center.flatten(0, -2), x.radius.flatten(0, -2), op.weight(x.center))
    found = LinearBall.apply(*native.laid_out(*flat), op.bias(x.center))
    return Ball(*(t.reshape(*x.center.shape[:-1], t.shape[-1]) for t in found))


class Rectify(torch.autograd.Function):
    """Center and radius before a ReLU -> those behind it. Keeps a byte an entry."""

    @staticmethod
    def forward(ctx: Context, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = center.contiguous(), radius.contiguous()
        found = torch.empty_like(center), torch.empty_like(radius)
        active = torch.empty_like(center, dtype=torch.int8)
        kernels().call("rectify", center.dtype, center.numel(), center, radius, *found, active)
        ctx.save_for_backward(active)
        return found

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (active,) = ctx.saved_tensors
        to_c, to_r = grads
        if torch.is_grad_enabled():  # to be differentiated again
            low, high = (active & 1) * (to_c - to_r) / 2, (active >> 1) * (to_c + to_r) / 2
            return high + low, high - low
        found = torch.empty_like(active, dtype=to_c.dtype), torch.empty_like(active, dtype=to_c.dtype)
        given = active, to_c.contiguous(), to_r.contiguous()
        kernels().call("rectify_back", to_c.dtype, active.numel(), *given, *found)
        return found


class LinearChain(torch.autograd.Function):
    """Center and radius [n, in] through matrices, each followed by a ReLU: one node of the graph for all."""

    @staticmethod
    def forward(ctx: Context, count: int, center: Tensor, radius: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
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
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, need = ctx.count, ctx.needs_input_grad
        saved = ctx.saved_tensors
        inputs, weights, kept = saved[: 2 + 2 * count], saved[2 + 2 * count : 2 + 3 * count], saved[2 + 3 * count :]
        if torch.is_grad_enabled():  # to be differentiated again
            # Under other names: where one input depends on another, or comes twice, each wants its own share.
            apart: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
            wanted = [t for t, w in zip(apart, need[1:], strict=True) if w]
            found = iter(torch.autograd.grad(eager_chain(count, *apart), wanted, grads, create_graph=True))
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


def eager_chain(count: int, center: Tensor, radius: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `LinearChain` computes, by operations that are differentiated one by one."""
    for weight, bias in zip(given[:count], given[count:], strict=True):
        assert weight is not None
        center, radius = F.linear(center, weight, bias), radius @ weight.abs().mT
        low, high = (center - radius).relu(), (center + radius).relu()
        center, radius = (low + high) / 2, (high - low) / 2
    return center, radius
