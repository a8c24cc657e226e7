"""Gradient rules of a linear program's optimal value: how `LPSolution.lower` is differentiated.

A rule is an object of its own, apart from the solver that found the point. Both rules here hold multipliers and a point
fixed and differentiate the Lagrangian L = c.x + y.(A x - b) + v.(E x - d), with the box's multipliers in
r = c + A^T y + E^T v:

    dc = x,  dA = y x^T,  db = -y,  dE = v x^T,  dd = -v,  dlower = max(r, 0),  dupper = min(r, 0),  dP = x x^T / 2.

They differ in x. No KKT system is solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.layers.first_order import first_order
from optrelax.layers.programs.sparse_matrices import is_sparse, outer_entries


@dataclass(frozen=True, slots=True, eq=False)
class LagrangianPoint:
    """The point at which a Lagrangian is differentiated, one a problem."""

    primal: Float[Tensor, "*batch n"]
    inequality: Float[Tensor, "*batch m"]
    equality: Float[Tensor, "*batch p"]
    reduced: Float[Tensor, "*batch n"]
    """c + A^T y + E^T v."""
    lower: Float[Tensor, "*batch n"]
    upper: Float[Tensor, "*batch n"]
    live: Bool[Tensor, "*batch"]
    """False where there is no value to differentiate: the gradient is 0 there."""


@runtime_checkable
class ValueGradient(Protocol):
    """A rule that chooses the x of the module's formula."""

    def point(self, saddle: LagrangianPoint) -> Float[Tensor, "*batch n"]:
        """The x at which the Lagrangian is differentiated."""


@dataclass(frozen=True, slots=True)
class EnvelopeGradient:
    """Gradient of the optimal value: the Lagrangian's, at the primal and dual solution.

    Gradient: exact where both solutions are unique (envelope theorem); a subgradient in the primal data where only the
    primal one is not, and one of the directional derivatives' extremes otherwise.  Of an unfinished solve it is the
    Lagrangian's gradient at the present pair.  Infinite bounds have gradient 0.  Source: Gal 1995, Danskin 1967.

    Example:
        >>> c, A, b = torch.tensor([-1.0, -2.0]), torch.ones(1, 2), torch.tensor([0.5], requires_grad=True)
        >>> layer = LinearProgram(Highs(), value_gradient=EnvelopeGradient())
        >>> layer(c, A, b, lower=torch.zeros(2), upper=torch.ones(2)).lower.backward()
        >>> b.grad  # what one more unit of b is worth
        tensor([-2.])
    """

    def point(self, saddle: LagrangianPoint) -> Tensor:
        """The solver's primal point."""
        return saddle.primal


@dataclass(frozen=True, slots=True)
class FixedDualGradient:
    """Gradient of the reported bound with the multipliers held fixed.

    Gradient: exact for the number reported, at any iteration count; at an optimum it is that of the optimal value only
    where every reduced cost is non-zero (x at a corner of the box), which is rare.  Needs no primal point.

    Example:
        >>> c, A, b = torch.tensor([-1.0, -2.0]), torch.ones(1, 2), torch.tensor([0.5], requires_grad=True)
        >>> layer = LinearProgram(Highs(), value_gradient=FixedDualGradient())
        >>> layer(c, A, b, lower=torch.zeros(2), upper=torch.ones(2)).lower.backward()
        >>> b.grad
        tensor([-2.])
    """

    def point(self, saddle: LagrangianPoint) -> Tensor:
        """The box's minimiser of the Lagrangian; 0 or the nearest bound where the reduced cost is 0."""
        middle = torch.zeros_like(saddle.reduced).clamp(saddle.lower, saddle.upper)
        at_bound = torch.where(saddle.reduced > 0, saddle.lower, saddle.upper)
        return torch.where((saddle.reduced == 0) | at_bound.isinf(), middle, at_bound)


def attach_value(
    value: Float[Tensor, "*batch"], rule: ValueGradient, saddle: LagrangianPoint, data: Sequence[Tensor]
) -> Float[Tensor, "*batch"]:
    """`value` with the rule's gradient in c, A, b, E, d, lower, upper and P (`data`, each of its own leading shape).

    A tensor shared by problems gets the sum of their gradients. Matrices are summed as one product, so the gradient of
    a shared A takes the memory of A.
    """
    if not wants_gradient(data):
        return value
    x, r = rule.point(saddle), saddle.reduced
    result: Tensor = _ProgramValue.apply(value, x, saddle.inequality, saddle.equality, r, saddle.live, *data)
    return result


def wants_gradient(data: Sequence[Tensor]) -> bool:
    """Whether anything of what is made of these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in data)


class _ProgramValue(torch.autograd.Function):
    """Identity in `value`; its backward pass is the module's formula. Keeps vectors only, and no solver state."""

    @staticmethod
    def forward(
        ctx: Context, value: Tensor, x: Tensor, y: Tensor, v: Tensor, r: Tensor, live: Tensor, *data: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, y, v, r, live, data[5], data[6])
        ctx.shapes = [tensor.shape for tensor in data]
        ctx.sparse = {i: tensor.detach() for i, tensor in enumerate(data) if is_sparse(tensor)}
        return value.clone()

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, v, r, live, lower, upper = ctx.saved_tensors
        # A problem without a value may receive inf or NaN from the loss; it must not reach data others share.
        g = torch.where(live, grad, 0.0).unsqueeze(-1)
        needed, shapes = ctx.needs_input_grad[6:], ctx.shapes

        def matrix(left: Tensor, i: int) -> Tensor:
            if i in ctx.sparse:
                return outer_entries(left, x, ctx.sparse[i])
            return outer_sum(left, x, shapes[i])

        rules = (
            lambda: (g * x).sum_to_size(shapes[0]),
            lambda: matrix(g * y, 1),
            lambda: (-g * y).sum_to_size(shapes[2]),
            lambda: matrix(g * v, 3),
            lambda: (-g * v).sum_to_size(shapes[4]),
            lambda: torch.where(lower.isinf(), 0.0, g * r.clamp(min=0)).sum_to_size(shapes[5]),
            lambda: torch.where(upper.isinf(), 0.0, g * r.clamp(max=0)).sum_to_size(shapes[6]),
            lambda: matrix(g * x / 2, 7),
        )
        grads = [rule() if wanted else None for rule, wanted in zip(rules, needed, strict=False)]
        return (None, None, None, None, None, None, *grads)


class NoRule(torch.autograd.Function):
    """Identity in a point; differentiating it is an error that names the cure."""

    @staticmethod
    def forward(ctx: Context, primal: Tensor, owner: str, *data: Tensor) -> Tensor:
        ctx.owner = owner
        return primal.clone()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> NoReturn:
        cure = "KKT()" if ctx.owner == "QuadraticProgram" else "Regularised(strength)"
        raise RuntimeError(
            f"{ctx.owner}: primal has no gradient rule; give primal_gradient={cure}, or use primal.detach()"
        )


def outer_sum(left: Float[Tensor, "*batch m"], right: Float[Tensor, "*batch n"], shape: torch.Size) -> Tensor:
    """sum of left right^T over the batch dimensions that `shape` [..., m, n] lacks or has at size 1."""
    batch = left.shape[:-1]
    if shape[:-2] == batch:
        return left.unsqueeze(-1) * right.unsqueeze(-2)
    kept = torch.Size([1] * (len(batch) + 2 - len(shape)) + list(shape[:-2]))
    summed = [i for i, (size, keep) in enumerate(zip(batch, kept, strict=True)) if keep == 1 and size != 1]
    order = [i for i in range(len(batch)) if i not in summed] + summed

    def arrange(tensor: Tensor) -> Tensor:
        moved = tensor.permute(*order, len(batch))
        rest = [batch[i] for i in order if i not in summed]
        return moved.reshape(*rest, torch.Size([batch[i] for i in summed]).numel(), tensor.shape[-1])

    return (arrange(left).mT @ arrange(right)).reshape(shape)
