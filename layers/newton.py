"""Mehrotra's method for the reduced problems of network LPs: its Newton system, and the steps along its solutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.layers.reduction import Reduced
from optrelax.networks.ops import flatten_from


class Newton:
    """Mehrotra's predictor-corrector on R reduced problems; finished or broken-down ones stand still.

    Constraints c of neuron i: g_p[c] p + g_y[c] y >= h[c], slack w[c], multiplier lam[c].
    """

    def __init__(self, problem: Reduced, tol: float, max_iterations: int) -> None:
        self.problem, self.tol, self.max_iterations = problem, tol, max_iterations
        count, _, d = problem.M.shape
        new = problem.M.new_zeros
        self.v = new(count, d)
        self.p = problem.middle
        self.y = problem.inside
        self.g_p, self.g_y, h = problem.constraints
        self.w = self.g_p * self.p + self.g_y * self.y - h
        self.w_low, self.w_high = torch.ones_like(self.v), torch.ones_like(self.v)
        size = problem.c_v.abs().mean(1, keepdim=True).clamp_min(1e-6)
        self.z_low = size.expand(count, d).clone()
        self.z_high = self.z_low.clone()
        size = problem.c_y.abs().mean(1, keepdim=True).clamp_min(1e-6)
        self.lam = size.expand_as(self.p).expand_as(self.w).clone()
        self.nu = torch.zeros_like(self.p)
        self.live = torch.ones(count, dtype=torch.bool, device=self.v.device)
        self.steps = torch.zeros(count, dtype=torch.int64, device=self.v.device)
        self.merit = torch.full_like(self.v[:, 0], torch.inf)
        self.kept: tuple[Tensor, ...] = (self.v, self.y, self.nu)
        self.entries = 2 * d + int(self.w.shape[0]) * self.p.shape[1]

    def run(self) -> None:
        """Steps until each problem is solved, broken down or at the limit; `v`, `y`, `nu` are the best points seen."""
        for _ in range(self.max_iterations):
            complementarity = (
                (self.z_low * self.w_low).sum(1) + (self.z_high * self.w_high).sum(1) + (self.lam * self.w).sum((0, 2))
            )
            value = (self.problem.c_v * self.v).sum(1) + (self.problem.c_y * self.y).sum(1) + self.problem.offset
            self._remember(complementarity)
            self.live &= complementarity > self.tol * value.abs().clamp_min(1)
            if not bool(self.live.any()) or not self._step(complementarity / self.entries):
                break
        self.v, self.y, self.nu = self.kept

    def _remember(self, complementarity: Tensor) -> None:
        """Keep each problem's best point; one that has lost three digits again is at the end of its precision."""
        residuals = torch.stack([r.abs().amax(1) for r in self._residuals()]).amax(0)
        merit = (complementarity + residuals).nan_to_num(torch.inf)
        better = (merit < self.merit)[:, None]
        self.kept = tuple(
            torch.where(better, new, old) for new, old in zip((self.v, self.y, self.nu), self.kept, strict=True)
        )
        self.live &= merit < 1e3 * self.merit
        self.merit = torch.minimum(merit, self.merit)

    def _step(self, mu: Tensor) -> bool:
        """One Newton step of the live problems; False once all have broken down."""
        residual = self._residuals()
        d_v = self.z_low / self.w_low + self.z_high / self.w_high
        e = self.lam / self.w
        newton = _Direction.factor(self, residual, d_v, e)
        self.live &= newton.usable
        if not bool(self.live.any()):
            return False
        first = newton.solve(-self.z_low * self.w_low, -self.z_high * self.w_high, -self.lam * self.w)
        primal, dual = self._lengths(first)
        after = self._complementarity(first, primal, dual) / self.entries
        target = ((after / mu).clamp(0, 1) ** 3 * mu)[:, None]
        second = newton.solve(
            target - self.z_low * self.w_low - first.z_low * first.v,
            target - self.z_high * self.w_high + first.z_high * first.v,
            target - self.lam * self.w - first.lam * first.w,
        )
        primal, dual = self._lengths(second)
        self._move(second, 0.995 * primal, 0.995 * dual)
        self.steps += self.live
        return True

    def _residuals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = self.problem
        nu = self.nu[..., None]
        r_v = -(q.c_v + (q.M.mT @ nu)[..., 0] - self.z_low + self.z_high)
        r_p = self.nu + (self.lam * self.g_p).sum(0)
        r_y = -(q.c_y + (q.N.mT @ nu)[..., 0] - (self.lam * self.g_y).sum(0))
        r_e = (q.M @ self.v[..., None])[..., 0] + (q.N @ self.y[..., None])[..., 0] + q.m - self.p
        return r_v, r_p, r_y, r_e

    def _lengths(self, step: _NewtonStep) -> tuple[Tensor, Tensor]:
        """Longest steps that keep slacks and multipliers positive."""
        primal = torch.minimum(
            torch.minimum(_longest(self.w_low, step.v, 1), _longest(self.w_high, -step.v, 1)),
            _longest(self.w, step.w, (0, 2)),
        )
        dual = torch.minimum(
            torch.minimum(_longest(self.z_low, step.z_low, 1), _longest(self.z_high, step.z_high, 1)),
            _longest(self.lam, step.lam, (0, 2)),
        )
        return primal, dual

    def _complementarity(self, step: _NewtonStep, primal: Tensor, dual: Tensor) -> Tensor:
        a, b = primal[:, None], dual[:, None]
        return (
            ((self.z_low + b * step.z_low) * (self.w_low + a * step.v)).sum(1)
            + ((self.z_high + b * step.z_high) * (self.w_high - a * step.v)).sum(1)
            + ((self.lam + b * step.lam) * (self.w + a * step.w)).sum((0, 2))
        )

    def _move(self, step: _NewtonStep, primal: Tensor, dual: Tensor) -> None:
        # A problem at rest has a step of 0 and no NaN from 0 * inf.
        a, b = primal[:, None], dual[:, None]
        live = self.live[:, None]

        def move(x: Tensor, length: Tensor, direction: Tensor) -> Tensor:
            return torch.where(live, x + length * direction, x)

        self.v, self.p, self.y = move(self.v, a, step.v), move(self.p, a, step.p), move(self.y, a, step.y)
        self.w_low, self.w_high = move(self.w_low, a, step.v), move(self.w_high, a, -step.v)
        self.w = move(self.w, a, step.w)
        self.nu = move(self.nu, b, step.nu)
        self.z_low, self.z_high = move(self.z_low, b, step.z_low), move(self.z_high, b, step.z_high)
        self.lam = move(self.lam, b, step.lam)


def _longest(x: Tensor, dx: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    shrinking = dx < 0
    ratio = torch.where(shrinking, -x / torch.where(shrinking, dx, -1.0), torch.inf)
    return ratio.amin(dims).clamp_max(1)


@dataclass(frozen=True, slots=True)
class _NewtonStep:
    nu: Tensor
    v: Tensor
    p: Tensor
    y: Tensor
    w: Tensor
    z_low: Tensor
    z_high: Tensor
    lam: Tensor


def factor(systems: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LU factors, pivots and status of each matrix [R, n, n].

    On a CPU one at a time: the batched routine of torch 2.13 with two threads returned factors whose residual was 1e15
    for n >= 200, with MKL complaining of DLASWP's arguments; single ones are right and take as long.
    """
    if systems.device.type != "cpu":
        return torch.linalg.lu_factor_ex(systems)
    parts = [torch.linalg.lu_factor_ex(system) for system in systems]
    return (
        torch.stack([part.LU for part in parts]),
        torch.stack([part.pivots for part in parts]),
        torch.stack([part.info for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class _Direction:
    """Solves the Newton system for given complementarity targets, by LU in (nu, y).

    With G = M D^-1 M^T and the blocks e of each neuron, p = N y - G nu + q leaves two rows a neuron:
    e_pp p + e_py y - nu = b_p and e_py p + e_yy y + N^T nu = b_y. Keeping y avoids E^-1, which is singular for neurons
    inside their triangle, and with it the loss of digits of the normal equations.
    """

    state: Newton
    residual: tuple[Tensor, Tensor, Tensor, Tensor]
    d_v: Tensor
    e_pp: Tensor
    e_py: Tensor
    scaled: Tensor
    row_scale: Tensor
    lu: tuple[Tensor, Tensor]
    usable: Tensor

    @classmethod
    def factor(
        cls, state: Newton, residual: tuple[Tensor, Tensor, Tensor, Tensor], d_v: Tensor, e: Tensor
    ) -> _Direction:
        """Form and factor the system of the live problems (the identity for the others)."""
        q = state.problem
        e_pp, e_py, e_yy = (
            (e * state.g_p * state.g_p).sum(0),
            (e * state.g_p * state.g_y).sum(0),
            (e * state.g_y * state.g_y).sum(0),
        )
        scaled = q.M / d_v[:, None]
        gram = scaled @ q.M.mT
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        top = torch.cat([-e_pp[..., None] * gram - eye, e_pp[..., None] * q.N + torch.diag_embed(e_py)], 2)
        bottom = torch.cat([q.N.mT - e_py[..., None] * gram, e_py[..., None] * q.N + torch.diag_embed(e_yy)], 2)
        system = torch.cat([top, bottom], 1)
        size = system.abs().amax(2)
        row_scale = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 1.0)
        system = system * row_scale[..., None]
        usable = flatten_from(system.isfinite(), 1).all(1) & state.live
        whole = torch.eye(system.shape[1], dtype=system.dtype, device=system.device)
        factors, pivots, info = factor(torch.where(usable[:, None, None], system, whole))
        # An overflow on the way leaves NaN and pivots that point nowhere.
        count = system.shape[1]
        usable &= (info == 0) & ((pivots >= 1) & (pivots <= count)).all(1) & flatten_from(factors.isfinite(), 1).all(1)
        factors = torch.where(usable[:, None, None], factors, whole)
        still = torch.arange(1, count + 1, dtype=pivots.dtype, device=pivots.device)
        pivots = torch.where(usable[:, None], pivots, still)
        return cls(state, residual, d_v, e_pp, e_py, scaled, row_scale, (factors, pivots), usable)

    def solve(self, low: Tensor, high: Tensor, target: Tensor) -> _NewtonStep:
        s, q = self.state, self.state.problem
        r_v, r_p, r_y, r_e = self.residual
        b_v = r_v + low / s.w_low - high / s.w_high
        b_p = r_p + (target / s.w * s.g_p).sum(0)
        b_y = r_y + (target / s.w * s.g_y).sum(0)
        fixed = (self.scaled @ b_v[..., None])[..., 0] + r_e
        right = torch.cat([b_p - self.e_pp * fixed, b_y - self.e_py * fixed], 1) * self.row_scale
        right = torch.where(self.usable[:, None], right, 0.0)
        found = torch.linalg.lu_solve(*self.lu, right[..., None])[..., 0]
        nu, y = found.chunk(2, 1)
        v = (b_v - (q.M.mT @ nu[..., None])[..., 0]) / self.d_v
        p = r_e + (q.M @ v[..., None])[..., 0] + (q.N @ y[..., None])[..., 0]
        w = s.g_p * p + s.g_y * y
        return _NewtonStep(
            nu,
            v,
            p,
            y,
            w,
            (low - s.z_low * v) / s.w_low,
            (high + s.z_high * v) / s.w_high,
            (target - s.lam * w) / s.w,
        )
