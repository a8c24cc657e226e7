"""The lines of a ReLU in one compiled pass: the same as `optrelax.domains.lines` makes of any activation's hull."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.kernels import native
from optrelax.networks.activations import Activation, least_width

Below = Literal[0, 1, "adaptive", "chord"]
_NAMES: dict[Below, str] = {0: "FLAT", 1: "STEEP", "adaptive": "NEARER", "chord": "CHORD"}


_SIGNATURES = (
    "lines(n, below, l[n], u[n], lower[n], upper[n], intercept[n])",
    "lines_back(n, double least, l[n], u[n], to_slope?[n], to_intercept?[n], to_l[n], to_u[n])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled pass, or why there is none."""
    return native.build(Path(__file__).with_name("relu_lines.c"), *_SIGNATURES)


@functools.cache
def _code(below: Below) -> int:
    """How the pass calls a line."""
    return kernels().constant(_NAMES[below])


def compiles(activation: Activation, l: Tensor, u: Tensor) -> bool:
    """Whether there is a pass for this: a ReLU, on a CPU."""
    return activation.is_relu and kernels().supports(l, u)


def relu_lines(l: Tensor, u: Tensor, below: Below) -> tuple[Tensor, Tensor, Tensor]:
    """Lower slope, upper slope and upper intercept over [l, u], each like l; the lower intercept is 0.

    Gradient: of the upper line in l and u, to any order; "chord": the lower slope is the upper slope itself.
    """
    found: tuple[Tensor, Tensor, Tensor] = _ReluLines.apply(*native.laid_out(*torch.broadcast_tensors(l, u)), below)
    lower, upper, intercept = found
    return (upper if below == "chord" else lower), upper, intercept


class _ReluLines(torch.autograd.Function):
    """Keeps both ends."""

    @staticmethod
    def forward(ctx: Context, l: Tensor, u: Tensor, below: Below) -> tuple[Tensor, ...]:
        l, u = l.contiguous(), u.contiguous()
        found = tuple(torch.empty_like(l) for _ in range(3))
        kernels().call("lines", l.dtype, l.numel(), _code(below), l, u, *found)
        ctx.save_for_backward(l, u)
        ctx.mark_non_differentiable(found[0])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(
        ctx: Context, _: Tensor | None, to_slope: Tensor | None, to_intercept: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        l, u = ctx.saved_tensors
        if to_slope is None and to_intercept is None:
            return None, None, None
        least = least_width(l.dtype)
        if torch.is_grad_enabled():  # to be differentiated again
            crosses = (l < 0) & (u > 0)
            run = torch.where(crosses, u - l, 1.0)
            steady = run > least
            safe = torch.where(steady, run, 1.0)
            slope = torch.where(steady, u / safe, (u / run).detach())
            a, b = (torch.zeros_like(l) if t is None else t for t in (to_slope, to_intercept))
            through = torch.where(steady, (a - b * l) / safe, 0.0)
            to_l, to_u = through * slope - b * slope, through * -l / safe
            return torch.where(crosses, to_l, 0.0), torch.where(crosses, to_u, 0.0), None
        given = (None if t is None else t.contiguous() for t in (to_slope, to_intercept))
        to_l, to_u = torch.empty_like(l), torch.empty_like(l)
        kernels().call("lines_back", l.dtype, l.numel(), least, l, u, *given, to_l, to_u)
        return to_l, to_u, None
