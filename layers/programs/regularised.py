"""The argmin of a linear program, made differentiable by a stated regularisation.

An LP's argmin is a vertex: locally constant in c, and not unique in places. `Regularised(strength)` replaces it by

    x(c, A, b, E, d, lower, upper) = argmin c.x + strength / 2 |x|^2  over the same constraints,

the Euclidean projection of -c / strength on the polyhedron: unique, and continuous in the data. It is solved
by an interior-point method in float64, finished by a projection on its active constraints, and differentiated by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optrelax.layers.first_order import first_order
from optrelax.layers.programs.lp_data import LPData, stack_rows, transposed_times
from optrelax.layers.programs.lp_gradients import outer_sum
from optrelax.layers.programs.quadratic import project


@dataclass(frozen=True, slots=True)
class Regularised:
    """`LPSolution.primal` is the argmin of c.x + strength / 2 |x|^2, with its derivative in all the data.

    Exact: to about 1e-9 where the solution is not degenerate.  Gradient: the projection's derivative with the active
    constraints held fixed; exact where no active constraint has multiplier 0 (elsewhere one of several one-sided
    derivatives); dependent active rows are handled by the pseudo-inverse. 0 for infeasible problems, where `primal`
    stays the solver's point. `lower`, `gap` and the multipliers stay those of the LP itself.

    For a small enough strength x is the solution of the LP with the least norm (Mangasarian 1979) and its derivative
    in c is 0; a larger one gives a smoother map farther from the LP.  One conic solve a problem, on the CPU.
    """

    strength: float

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"Regularised: strength must be > 0, got {self.strength}")

    def primal(
        self, data: LPData, start: Float[Tensor, "B n"], solvable: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B n"], Bool[Tensor, " B"]]:
        """(argmin with its gradient; `start` where there is none, which problems have one)."""
        if data.size[0] == 0:
            return start, solvable
        plain = data.detach().double()
        with torch.no_grad():
            found = project(plain, -plain.c / self.strength)
        solved = found.solved & solvable
        x = torch.where(solved.unsqueeze(-1), found.x, start.double()).to(start)
        tensors = (data.c, data.A, data.b, data.E, data.d, data.lower, data.upper)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            at_rows, at_lower, at_upper = found.at_rows, found.at_lower, found.at_upper
            x = _Argmin.apply(x, self.strength, solved, at_rows, at_lower, at_upper, *tensors)
        return x, solved


class _Argmin(torch.autograd.Function):
    """Identity in x; its backward pass is that of the projection on the active constraints G x = h.

    With F the free variables (no active bound) and s the strength, the optimum satisfies s x_F + c_F + G_F^T z = 0,
    G x = h. The adjoint of this system for a gradient g is G_F^T q + s p_F = g_F, G_F p_F = 0, solved by least squares;
    then dc = -p, dh = q, dG = -z p^T - q x^T, and an active bound gets g - G^T q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        strength: float,
        solved: Tensor,
        at_rows: Tensor,
        at_lower: Tensor,
        at_upper: Tensor,
        *data: Tensor,
    ) -> Tensor:
        ctx.strength = strength
        ctx.save_for_backward(x, solved, at_rows, at_lower, at_upper, data[0], data[1], data[3])
        ctx.shapes = [tensor.shape for tensor in data]
        return x.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, solved, at_rows, at_lower, at_upper, c, A, E = ctx.saved_tensors
        m, s = A.shape[-2], ctx.strength
        g = torch.where(solved.unsqueeze(-1), grad, 0.0).double()
        x, c = x.double(), c.double()
        free = ~(at_lower | at_upper)
        G = stack_rows(A, E).double().expand(len(x), -1, -1) * at_rows.unsqueeze(-1)
        inverse = torch.linalg.pinv(G * free.unsqueeze(-2), rtol=1e-10)
        g_free = g * free
        q = transposed_times(inverse, g_free)
        pushed = transposed_times(G, q)
        p = torch.where(free, g_free - pushed, 0.0) / s
        z = -transposed_times(inverse, (s * x + c) * free)
        at_bound = (g - pushed) / (at_lower.double() + at_upper.double()).clamp(min=1)
        grads = (
            -p,
            -outer_sum(z[:, :m], p, ctx.shapes[1]) - outer_sum(q[:, :m], x, ctx.shapes[1]),
            q[:, :m],
            -outer_sum(z[:, m:], p, ctx.shapes[3]) - outer_sum(q[:, m:], x, ctx.shapes[3]),
            q[:, m:],
            torch.where(at_lower, at_bound, 0.0),
            torch.where(at_upper, at_bound, 0.0),
        )
        live = zip(grads, ctx.needs_input_grad[6:], strict=True)
        return (None,) * 6 + tuple(part.to(grad) if needed else None for part, needed in live)
