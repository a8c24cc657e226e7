"""Gradient rules of network LPs: what `.backward()` through an optimal value returns. Apart from the solvers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.layers.evaluation import Evaluation
from optrelax.layers.first_order import first_order
from optrelax.layers.hulls import HullLines
from optrelax.layers.problems import DualPoint, Problems, Weights
from optrelax.layers.sweeps import backward_sweep, dot_each, primal_sweep
from optrelax.networks.graph import Node
from optrelax.networks.ops import flatten_from
from optrelax.networks.walks import carried_on


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Multipliers >= 0 of one activation's or product's constraints, [R, *shape]: hull and pre-activation bounds."""

    below0: Tensor
    below1: Tensor
    above0: Tensor
    above1: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SaddlePoint:
    """A primal and dual pair of R problems, as the Lagrangian takes it; all constants."""

    x: Tensor
    """Input, [R, *input shape]."""
    after: Weights
    """Values of the activations and products."""
    input: Tensor
    """Reduced costs of the input."""
    multipliers: Mapping[str, Multipliers]


def saddle_point(problems: Problems, found: Evaluation) -> SaddlePoint:
    """The pair behind a solve: coefficients become multipliers of the mixed lines."""
    with torch.no_grad():
        back = found.back or backward_sweep(problems, found.dual)
        feasible = found.feasible or primal_sweep(problems, found.primal)
        multipliers = {
            name: _multipliers(a, found.dual, name, problems.hulls[name]) for name, a in back.coefficients.items()
        }
        return SaddlePoint(found.primal.x, feasible.after, back.input, multipliers)


def _multipliers(a: Tensor, dual: DualPoint, name: str, h: HullLines) -> Multipliers:
    up, down = a.clamp_min(0), (-a).clamp_min(0)
    alpha, beta, ends = dual.alpha[name], dual.beta.get(name), dual.ends.get(name)
    above0, above1 = (down, None) if h.above1 is None or beta is None else (down * (1 - beta), down * beta)
    low, high = (None, None) if ends is None else ((-ends).clamp_min(0), ends.clamp_min(0))
    return Multipliers(up * (1 - alpha), up * alpha, above0, above1, low, high)


@dataclass(frozen=True, slots=True)
class Envelope:
    """The gradient of the Lagrangian at the current primal and dual pair, both held fixed (Danskin, envelope theorem).

    Exact: at an optimal pair, dV/dW_i = nu_i z_{i-1}^T, dV/db_i = nu_i, dV/dc = z, and through box and chords.
    Gradient: at an unfinished pair it is the Lagrangian's there, whose error shrinks with the gap. No KKT system.

    Example:
        >>> net, eps = ox.models.fc(4, 8, 8, 2, seed=0), torch.tensor(0.2, requires_grad=True)
        >>> found = Triangle(gradient=Envelope()).solve(net, ox.LinfBall(torch.zeros(1, 4), eps), torch.eye(2))
        >>> found.lower.sum().backward()
        >>> bool(eps.grad < 0)  # a larger region, a lower bound
        True
    """

    def value(self, problems: Problems, found: Evaluation) -> Tensor:
        """A scalar function a problem, [R], whose gradient is the rule's; its value is not used."""
        return lagrangian(problems, saddle_point(problems.detach(), found))


@dataclass(frozen=True, slots=True)
class FixedSlopes:
    """The gradient of the reported bound with the slopes held fixed: back-substitution differentiated.

    Gradient: not of the optimal value: at an optimum coefficients are exactly 0 and inputs lie inside the box, where
    this function has a kink. Kept for comparison.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> Triangle(gradient=FixedSlopes()).solve(net, region, torch.eye(2)).lower.requires_grad
        True
    """

    def value(self, problems: Problems, found: Evaluation) -> Tensor:
        """The bound itself at the dual point found, [R]."""
        return backward_sweep(problems, found.dual).value


def lagrangian(problems: Problems, pair: SaddlePoint) -> Tensor:
    """The Lagrangian of R problems at a fixed pair, as a function of weights, rows, region and hull lines: [R]."""
    # The constraint that x lies in the region, at its multiplier: a . x is at least the region's support function at a.
    total = problems.region.support(pair.input[:, None])[:, 0] - dot_each(pair.input, pair.x)

    def activate(node: Node, *inputs: Tensor) -> Tensor:
        nonlocal total
        y, h, m = pair.after[node.name], problems.hulls[node.name], pair.multipliers[node.name]
        # Affine in what it reads: the sum of multiplier times face has one slope a value and one intercept.
        face = [
            m.below0 * first + m.below1 * second - m.above0 * third
            for first, second, third in zip(h.below0, h.below1, h.above0, strict=True)
        ]
        weight = m.below0 + m.below1 - m.above0
        if h.above1 is not None and m.above1 is not None:
            face = [t - m.above1 * fourth for t, fourth in zip(face, h.above1, strict=True)]
            weight = weight - m.above1
        *slopes, intercept = face
        for slope, z in zip(slopes, inputs, strict=True):
            total = total + dot_each(slope, z)
        total = total + flatten_from(intercept, 1).sum(1) - dot_each(weight, y)
        if m.low is not None and m.high is not None:
            total = total + dot_each(m.low, h.before[0] - inputs[0]) + dot_each(m.high, inputs[0] - h.before[1])
        return y

    values = carried_on(problems.network, pair.x, problems.wanted, activate)
    return total + dot_each(problems.rows, values[problems.target])


class _NetworkValue(torch.autograd.Function):
    """The solver's bound with the gradient of another function; once."""

    @staticmethod
    def forward(ctx: Context, rule: Tensor, value: Tensor, usable: Tensor) -> Tensor:
        ctx.save_for_backward(usable)
        return value.clone()

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        (usable,) = ctx.saved_tensors
        return torch.where(usable, grad, 0.0), None, None


def attach(value: Tensor, rule: Tensor) -> Tensor:
    """`value` [R] with the gradient of `rule` [R]; problems without a finite value get the gradient 0.

    Under create_graph=True the backward pass raises RuntimeError: the rule's own derivative is not the Hessian of an
    optimal value.
    """
    usable = value.isfinite() & rule.detach().isfinite()
    return _NetworkValue.apply(torch.where(usable, rule, 0.0), value, usable)
