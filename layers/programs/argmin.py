"""The argmin of a program, differentiated by the KKT system of its active constraints.

At a solution x of min c.x + x.Q x / 2 with the active constraints G x = h (rows z, fixed variables at their bounds) and
the free variables F, the adjoint of the KKT system for an incoming gradient g is

    Q_FF p_F + G_F^T q = g_F,   G_F p_F = 0,

and then dc = -p, dQ = -(p x^T + x p^T) / 2, dG = -z p^T - q x^T, dh = q; an active bound gets g - Q p - G^T q.
Source: Amos & Kolter 2017, eq. 8; the active set in place of the slacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.layers.first_order import first_order
from optrelax.layers.programs.lp_data import LPData, stack_rows, times, transposed_times
from optrelax.layers.programs.lp_gradients import outer_sum
from optrelax.layers.solutions import Status

_SINGULAR = 1e-10  # singular values of the scaled system below this part of the largest count as 0


@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """Which constraints hold with equality, one row a problem; equalities always do."""

    rows: Bool[Tensor, "B rows"]
    """Of [A; E]."""
    lower: Bool[Tensor, "B n"]
    upper: Bool[Tensor, "B n"]


@runtime_checkable
class PrimalGradient(Protocol):
    """A rule that makes `LPSolution.primal` differentiable."""

    def primal(
        self, data: LPData, point: Float[Tensor, "B n"], duals: Float[Tensor, "B rows"], status: Int8[Tensor, " B"]
    ) -> Float[Tensor, "B n"]:
        """The point with a gradient in data, 0 where there is no solution."""


@dataclass(frozen=True, slots=True)
class KKT:
    """`primal` of a quadratic program has the derivative of its KKT system.

    Gradient: exact where the KKT system is regular and no active constraint has multiplier 0; one of several one-sided
    derivatives where only the latter fails; the least-norm solution of the adjoint system where it is singular.
    0 for problems without a solution.  Under create_graph=True the backward pass raises RuntimeError.

    Example:
        >>> c, eye = torch.tensor([-1.0, -3.0], requires_grad=True), torch.eye(2)
        >>> layer = QuadraticProgram(primal_gradient=KKT())
        >>> point = layer(eye, c, lower=torch.zeros(2), upper=2 * torch.ones(2)).primal
        >>> point[1].backward()  # held by the box
        >>> c.grad + 0.0
        tensor([0., 0.])
    """

    def primal(self, data: LPData, point: Tensor, duals: Tensor, status: Tensor) -> Tensor:
        """The solver's point, with its gradient."""
        solvable = (status == Status.OPTIMAL) | (status == Status.ITERATION_LIMIT)
        plain = data.detach().double()
        assert plain.P is not None
        active = partial(active_set, plain, point.double(), duals.double())
        return differentiable(data, point, active, duals, solvable, plain.P)


@dataclass(frozen=True, slots=True, eq=False)
class Regularity:
    """Where the KKT system of the active constraints is regular, so that the derivative is the argmin's own."""

    data: LPData
    point: Float[Tensor, "B n"]
    duals: Float[Tensor, "B rows"]
    batch: torch.Size

    def __call__(self) -> Bool[Tensor, "*batch"]:
        """One rank a problem, evaluated anew."""
        plain = self.data.double()
        assert plain.P is not None
        system, used = _system(plain, active_set(plain, self.point.double(), self.duals.double()), plain.P)
        rank = torch.linalg.matrix_rank(system, hermitian=True, rtol=_SINGULAR)
        return (rank == used.sum(-1)).reshape(self.batch)


def active_set(data: LPData, x: Float[Tensor, "B n"], duals: Float[Tensor, "B rows"]) -> Active:
    """Constraints whose multiplier exceeds their slack, both in units of the data."""
    m = data.size[2]
    slack = data.b - times(data.A, x)
    scale_b = data.b.where(data.b.isfinite(), 0.0).abs().clamp(min=1)
    gradient = data.c if data.P is None else data.c + times(data.P, x)
    unit = gradient.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    size = data.A.abs().amax(-1) if data.A.shape[-1] else data.b
    rows = duals[:, :m] * size / unit > slack / scale_b
    equal = torch.ones_like(duals[:, m:], dtype=torch.bool)
    r = gradient + data.push(duals[:, :m], duals[:, m:])
    fixed = data.lower == data.upper
    at_lower = (r / unit > x - data.lower) | fixed
    at_upper = (-r / unit > data.upper - x) | fixed
    return Active(torch.cat([rows, equal], -1), at_lower, at_upper)


def differentiable(
    data: LPData,
    x: Tensor,
    active: Callable[[], Active],
    duals: Tensor,
    solvable: Tensor,
    Q: Float[Tensor, "... n n"],
) -> Tensor:
    """x with the module's derivative in the data, for the Hessian Q; `active` is asked in the backward pass."""
    tensors = (data.c, data.A, data.b, data.E, data.d, data.lower, data.upper, data.P)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return x
    result: Tensor = _Argmin.apply(x, duals, active, solvable, Q.detach(), *tensors)
    return result


def _system(data: LPData, active: Active, Q: Tensor) -> tuple[Tensor, Tensor]:
    """([Q_FF, G_F^T; G_F, 0] with rows and columns of the rest 0, which of them are used)."""
    size, _, m, p = data.size
    free = ~(active.lower | active.upper)
    G = stack_rows(data.A, data.E).expand(size, -1, -1) * active.rows.unsqueeze(-1) * free.unsqueeze(-2)
    length = G.norm(dim=-1, keepdim=True)
    G = G / torch.where(length > 0, length, 1.0)
    H = Q.expand(size, -1, -1) * free.unsqueeze(-1) * free.unsqueeze(-2)
    unit = H.abs().amax((-1, -2), keepdim=True)
    H = H / torch.where(unit > 0, unit, 1.0)
    system = torch.cat([torch.cat([H, G.mT], -1), torch.cat([G, G.new_zeros(size, m + p, m + p)], -1)], -2)
    return system, torch.cat([free, active.rows], -1)


class _Argmin(torch.autograd.Function):
    """Identity in x; its backward pass is the module's."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        duals: Tensor,
        active: Callable[[], Active],
        solvable: Tensor,
        Q: Tensor,
        *data: Tensor | None,
    ) -> Tensor:
        parts = [None if part is None else part.detach() for part in data]
        ctx.active, ctx.parts = active, parts
        ctx.save_for_backward(x, duals, solvable, Q)
        return x.clone()

    @staticmethod
    @first_order
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, duals, solvable, Q = ctx.saved_tensors
        data = LPData(*ctx.parts).double()
        active: Active = ctx.active()
        g = torch.where(solvable.unsqueeze(-1), grad, 0.0).double()
        p, q = _adjoint(data, active, Q, g)
        x, z = x.double(), duals.double() * active.rows
        m = data.size[2]
        left = g - times(Q.double(), p) - transposed_times(stack_rows(data.A, data.E), q)
        at_bound = left / (active.lower.double() + active.upper.double()).clamp(min=1)
        shapes = [torch.Size() if part is None else part.shape for part in ctx.parts]
        rules = (
            lambda: -p,
            lambda: -outer_sum(z[:, :m], p, shapes[1]) - outer_sum(q[:, :m], x, shapes[1]),
            lambda: q[:, :m],
            lambda: -outer_sum(z[:, m:], p, shapes[3]) - outer_sum(q[:, m:], x, shapes[3]),
            lambda: q[:, m:],
            lambda: torch.where(active.lower, at_bound, 0.0),
            lambda: torch.where(active.upper, at_bound, 0.0),
            lambda: -(outer_sum(p, x, shapes[7]) + outer_sum(x, p, shapes[7])) / 2,
        )
        needed = ctx.needs_input_grad[5:]
        grads = [rule().to(grad) if wanted else None for rule, wanted in zip(rules, needed, strict=True)]
        return (None,) * 5 + tuple(grads)


def _adjoint(data: LPData, active: Active, Q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of the module; least norm where the system is singular."""
    Q = Q.double()
    system, used = _system(data, active, Q)
    free = ~(active.lower | active.upper)
    n = g.shape[-1]
    G = stack_rows(data.A, data.E).expand(len(g), -1, -1) * free.unsqueeze(-2)
    length = G.norm(dim=-1)
    unit = (Q.expand(len(g), -1, -1) * free.unsqueeze(-1) * free.unsqueeze(-2)).abs().amax((-1, -2)).unsqueeze(-1)
    unit = torch.where(unit > 0, unit, 1.0)
    right = torch.cat([g * free, g.new_zeros(len(g), used.shape[-1] - n)], -1)
    # Rows and columns out of use are those of the identity, which keeps the rest's solution.
    eye = torch.diag_embed((~used).double())
    found, info = torch.linalg.solve_ex((system + eye), right.unsqueeze(-1))
    found = found.squeeze(-1)
    miss = (times(system, found) - right).abs().amax(-1)
    size = right.abs().amax(-1)
    bad = (info != 0) | ~(miss <= 1e-9 * size) | ~(found.abs().amax(-1) <= size / _SINGULAR)
    if bool(bad.any()):
        inverse = torch.linalg.pinv(system[bad], rtol=_SINGULAR, hermitian=True)
        found = found.clone()
        found[bad] = times(inverse, right[bad])
    # The scaled system has H / unit and unit rows of G: undo both.
    p = torch.where(free, found[:, :n] / unit, 0.0)
    q = torch.where(active.rows & (length > 0), found[:, n:] / torch.where(length > 0, length, 1.0), 0.0)
    return p, q
