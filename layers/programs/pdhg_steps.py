"""The parts of the batched PDHG solver: equilibrated data, the iteration, and the best points seen."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from optrelax.layers.programs.equilibration import equilibration, scaled_matrix
from optrelax.layers.programs.implied_bounds import implied_box
from optrelax.layers.programs.lp_data import Answer, LPData, binding, stack_rows, times, transposed_times

_SUFFICIENT, _NECESSARY, _ARTIFICIAL = 0.2, 0.8, 0.36  # decay of the fixed-point error that triggers a restart
# How far a restart moves the logarithm of the primal weight to where both sides travel alike. All the way diverges on
# some problems: once x sits at its vertex, a larger weight makes it move even less.
_SMOOTHING = 0.5
_POWER_ROUNDS = 40

Record = TypeVar("Record", "Scaled", "Iterate", "Best")


def take(record: Record, index: Tensor) -> Record:
    """Some of the problems of a record; a matrix shared by the batch stays shared."""
    changes: dict[str, Any] = {}
    for entry in fields(record):
        value = getattr(record, entry.name)
        if isinstance(value, Tensor) and not (entry.name in ("K", "turned") and value.dim() == 2):
            changes[entry.name] = value[index]
    return replace(record, **changes)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """min c.x, (K x - q) in {<= 0}^m x {0}^p, l <= x <= u, after scaling rows and columns of K = [A; E]."""

    K: Tensor  # [rows, n] shared, or [B, rows, n]
    turned: Tensor | None  # the transpose of a sparse K
    c: Tensor  # [B, n]
    q: Tensor  # [B, rows]
    l: Tensor  # [B, n]
    u: Tensor  # [B, n]
    implied_l: Tensor  # [B, n]: with infinite ends replaced by what the rows imply
    implied_u: Tensor
    rows: Tensor  # [B, rows]: s_original = rows * s_scaled
    columns: Tensor  # [B, n]: x_original = columns * x_scaled
    side: Tensor  # [B, rows]: max(1, |q|) before scaling, the unit of feasibility
    cost: Tensor  # [B]: max(1, |c|) before scaling, the unit of reduced costs
    m: int

    @classmethod
    def of(cls, data: LPData) -> Scaled:
        """Ruiz's equilibration, then Pock and Chambolle's, which makes the norm of K at most 1."""
        size, m = data.size[0], data.size[2]
        K = stack_rows(data.A, data.E)
        rows, columns = equilibration(K)
        K, turned = scaled_matrix(K, rows, columns)
        rows, columns = rows.expand(size, -1), columns.expand(size, -1)
        q = torch.cat([binding(data), data.d], -1)
        low, high = (end.to(data.c) for end in implied_box(data.double()))
        return cls(
            K=K,
            turned=turned,
            c=data.c * columns,
            q=q * rows,
            l=data.lower / columns,
            u=data.upper / columns,
            implied_l=low / columns,
            implied_u=high / columns,
            rows=rows,
            columns=columns,
            side=q.abs().clamp(min=1),
            cost=data.c.abs().amax(-1).clamp(min=1),
            m=m,
        )

    def push(self, s: Tensor) -> Tensor:
        """K^T s."""
        return transposed_times(self.K, s) if self.turned is None else times(self.turned, s)

    def cone(self, s: Tensor) -> Tensor:
        """Project multipliers: those of A x <= b are >= 0."""
        if self.m == s.shape[-1]:
            return s.clamp(min=0)
        return torch.cat([s[:, : self.m].clamp(min=0), s[:, self.m :]], -1)

    def repaired(self, s: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
        """Multipliers s and push = K^T s, shrunk where that gives reduced costs the right sign at infinite bounds."""
        open_below, open_above = self.implied_l.isinf(), self.implied_u.isinf()
        if not bool((open_below | open_above).any()):
            return s, push
        r = self.c + push
        wrong = (r < 0) & open_above | (r > 0) & open_below
        # Without a push (0 or -0) no factor changes a reduced cost.
        ratio = torch.where(wrong & (push != 0), -self.c / torch.where(push != 0, push, 1.0), 1.0)
        factor = ratio.amin(-1, keepdim=True)
        # Where c itself has the wrong sign no factor helps; then the multipliers stay.
        factor = torch.where(factor > 0, factor, 1.0)
        return s * factor, push * factor

    def dual_value(self, s: Tensor, push: Tensor, c: Tensor | float) -> tuple[Tensor, Tensor]:
        """(bound of multipliers s with K^T s = push and costs c, largest wrong reduced cost at infinite bounds)."""
        r = c + push
        end = torch.where(r > 0, self.implied_l, self.implied_u)
        loose = end.isinf()
        value = torch.where(loose | (r == 0), 0.0, r * end).sum(-1) - torch.where(s == 0, 0.0, s * self.q).sum(-1)
        wrong = torch.where(loose, r.abs() / self.columns, 0.0).amax(-1)
        return value, wrong

    def violation(self, Kx: Tensor) -> Tensor:
        """What K x - q exceeds, in the scaled units, [B, rows]."""
        excess = Kx - self.q
        return torch.cat([excess[:, : self.m].clamp(min=0), excess[:, self.m :].abs()], -1)


def _sizes(q: Tensor) -> Tensor:
    """Norms of the sides that are not far beyond the others, [B, 1]: only those can be limits that bind."""
    size = torch.where(q.isfinite(), q.abs(), 0.0)
    usual = 1e4 * size.median(-1, keepdim=True).values.clamp(min=1)
    return torch.where(size <= usual, size, 0.0).norm(dim=-1, keepdim=True)


def _norm(scaled: Scaled) -> Tensor:
    """Slightly more than the spectral norm of K by power iteration, at most 1, [size, 1]; 1 for a zero matrix."""
    K, size = scaled.K, len(scaled.c)
    batch = 1 if K.dim() == 2 else K.shape[0]
    # A fixed start without the symmetry of a constant vector, which can be orthogonal to the leading one.
    x = torch.cos(torch.arange(1, K.shape[-1] + 1, device=K.device, dtype=K.dtype) ** 2).expand(batch, -1)
    for _ in range(_POWER_ROUNDS):
        x = scaled.push(times(K, x))
        length = x.norm(dim=-1, keepdim=True)
        x = x / torch.where(length > 0, length, 1.0)
    norm = (1.02 * length.sqrt()).clamp(max=1)
    return torch.where(norm > 0, norm, 1.0).expand(size, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Iterate:
    """The iteration's state: present point, anchor, last plain step, and their images under K."""

    x: Tensor
    s: Tensor
    Kx: Tensor
    anchor_x: Tensor
    anchor_s: Tensor
    anchor_Kx: Tensor
    step_x: Tensor  # the plain PDHG step from (x, s): inside the box and the cone
    step_s: Tensor
    step_Kx: Tensor
    error: Tensor  # [B]: fixed-point error of the last step
    first_error: Tensor  # [B]: of the first step since the anchor
    k: Tensor  # [B, 1]: steps since the anchor
    eta: Tensor  # [B, 1]: tau * sigma = eta^2
    weight: Tensor  # [B, 1]: tau = eta / weight, sigma = eta * weight

    @classmethod
    def begin(cls, scaled: Scaled, start: Answer | None) -> Iterate:
        """At `start` (in original units), or at the point of the box nearest 0 with zero multipliers."""
        if start is None:
            x, s = torch.zeros_like(scaled.c), torch.zeros_like(scaled.q)
        else:
            x = start.primal.to(scaled.c) / scaled.columns
            s = torch.cat([start.inequality, start.equality], -1).to(scaled.c) / scaled.rows
        x, s = x.clamp(scaled.l, scaled.u), scaled.cone(s)
        Kx = times(scaled.K, x)
        eta = 0.998 / _norm(scaled)
        costs, sides = scaled.c.norm(dim=-1, keepdim=True), _sizes(scaled.q)
        known = (costs > 0) & (sides > 0)
        weight = torch.where(known, costs / torch.where(known, sides, 1.0), 1.0)
        error, zero = torch.full_like(x[:, 0], torch.inf), torch.zeros_like(weight)
        return cls(x, s, Kx, x, s, Kx, x, s, Kx, error, error, zero, eta, weight)

    def advance(self, scaled: Scaled, count: int) -> Iterate:
        """`count` >= 1 reflected Halpern steps; the fixed-point errors of the first and the last are measured."""
        x, s, Kx, k = self.x, self.s, self.Kx, self.k
        tau, sigma = self.eta / self.weight, self.eta * self.weight
        push, sides = tau * scaled.c, sigma * scaled.q
        first_error = self.first_error
        for i in range(count):
            step_x = torch.addcmul(x - push, tau, scaled.push(s), value=-1)
            step_x = torch.clamp(step_x, scaled.l, scaled.u)
            step_Kx = times(scaled.K, step_x)
            step_s = scaled.cone(torch.addcmul(s - sides, sigma, torch.sub(2 * step_Kx, Kx)))
            if i == 0 or i == count - 1:
                error = _fixed_point_error(step_x - x, step_s - s, step_Kx - Kx, tau, sigma)
                first_error = torch.where(k.squeeze(-1) == 0, error, first_error)
            share = (k + 1) / (k + 2)
            x = torch.lerp(self.anchor_x, torch.sub(2 * step_x, x), share)
            s = torch.lerp(self.anchor_s, torch.sub(2 * step_s, s), share)
            Kx = torch.lerp(self.anchor_Kx, torch.sub(2 * step_Kx, Kx), share)
            k = k + 1
        return replace(
            self,
            x=x,
            s=s,
            Kx=Kx,
            step_x=step_x,
            step_s=step_s,
            step_Kx=step_Kx,
            error=error,
            first_error=first_error,
            k=k,
        )

    def restarted(self, done: int, previous_error: Tensor) -> Iterate:
        """Move the anchor to the last plain step where the error has fallen enough or the epoch is long."""
        ratio = self.error / self.first_error
        due = (ratio <= _SUFFICIENT) | (ratio <= _NECESSARY) & (self.error > previous_error)
        due |= self.k.squeeze(-1) >= _ARTIFICIAL * done
        due = due.unsqueeze(-1)
        moved_x = (self.step_x - self.anchor_x).norm(dim=-1, keepdim=True)
        moved_s = (self.step_s - self.anchor_s).norm(dim=-1, keepdim=True)
        target = moved_s / moved_x
        usable = due & (target > 0) & target.isfinite()
        weight = self.weight ** (1 - _SMOOTHING) * torch.where(usable, target, self.weight) ** _SMOOTHING

        def moved(plain: Tensor, present: Tensor) -> Tensor:
            return torch.where(due, plain, present)

        return replace(
            self,
            x=moved(self.step_x, self.x),
            s=moved(self.step_s, self.s),
            Kx=moved(self.step_Kx, self.Kx),
            anchor_x=moved(self.step_x, self.anchor_x),
            anchor_s=moved(self.step_s, self.anchor_s),
            anchor_Kx=moved(self.step_Kx, self.anchor_Kx),
            k=torch.where(due, 0.0, self.k),
            weight=weight,
        )

    def finite(self) -> Tensor:
        """Which problems have finite iterates, [B]."""
        return self.step_x.isfinite().all(-1) & self.step_s.isfinite().all(-1)


def _fixed_point_error(dx: Tensor, ds: Tensor, dKx: Tensor, tau: Tensor, sigma: Tensor) -> Tensor:
    """Length of one plain step in the norm in which the method is a contraction, [B]."""
    squares = (dx * dx / tau).sum(-1) + (ds * ds / sigma).sum(-1) - 2 * (ds * dKx).sum(-1)
    return squares.clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The multipliers with the best safe bound seen, and the best point seen, in scaled units."""

    s: Tensor
    bound: Tensor  # [B]
    wrong: Tensor  # [B]: wrong reduced costs at infinite bounds, in units of the costs
    x: Tensor
    value: Tensor  # [B]: objective, violations charged
    violation: Tensor  # [B]: in units of max(1, |side|)

    @classmethod
    def begin(cls, scaled: Scaled, state: Iterate) -> Best:
        """Nothing seen yet."""
        inf = torch.full_like(scaled.cost, torch.inf)
        return cls(state.step_s, -inf, inf, state.step_x, inf, inf)

    def improved(self, scaled: Scaled, state: Iterate, tol: float) -> Best:
        """With the last plain step taken into account."""
        x, s = state.step_x, state.step_s
        s, push = scaled.repaired(s, scaled.push(s))
        bound, wrong = scaled.dual_value(s, push, scaled.c)
        # Reduced costs within tol at infinite bounds are repaired by the layer, so among these the bound decides.
        wrong = (wrong / scaled.cost).clamp(min=tol)
        better = (wrong < self.wrong) | (wrong == self.wrong) & (bound > self.bound)
        excess = scaled.violation(state.step_Kx)
        # In the original units a row's excess is excess / rows.
        violation = (
            torch.where(excess > 0, excess / scaled.rows / scaled.side, 0.0).amax(-1)
            if excess.shape[-1]
            else torch.zeros_like(bound)
        )
        violation = violation.clamp(min=tol)
        value = (scaled.c * x).sum(-1) + torch.where(s == 0, 0.0, s.abs() * excess).sum(-1)
        closer = (violation < self.violation) | (violation == self.violation) & (value < self.value)
        row, point = better.unsqueeze(-1), closer.unsqueeze(-1)
        return Best(
            torch.where(row, s, self.s),
            torch.where(better, bound, self.bound),
            torch.where(better, wrong, self.wrong),
            torch.where(point, x, self.x),
            torch.where(closer, value, self.value),
            torch.where(closer, violation, self.violation),
        )

    def converged(self, tol: float) -> Tensor:
        """Which problems have a gap, a violation and wrong reduced costs within tol, [B]."""
        small = self.value - self.bound <= tol * self.bound.abs().clamp(min=1)
        return small & (self.violation <= tol) & (self.wrong <= tol)
