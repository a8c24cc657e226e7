"""Mehrotra's predictor-corrector in PyTorch: a whole batch at once, for devices and where there is no C compiler.

The method and its regularised system are those of interior.c, reduced to n x n by eliminating the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optrelax.layers.programs.equilibration import equilibration
from optrelax.layers.programs.lp_data import LPData, stack_rows, times, transposed_times
from optrelax.layers.solutions import Status

_RHO, _DELTA = 1e-11, 1e-10
_PINNED = 1e30


def solve_together(data: LPData, tol: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(primal or ray, multipliers or ray of all rows, statuses as claimed, iterations) of B >= 1 problems."""
    state = _State(data, tol)
    for _ in range(max_iterations):
        state.look()
        if not bool(state.live.any()):
            break
        state.step()
    else:
        state.look()
    primal = state.best_x * state.columns * state.beta
    return primal, state.best_y * state.rows * state.gamma, state.status, state.steps


class _State:
    """Iterates of all problems; those that have finished stand still."""

    def __init__(self, data: LPData, tol: float) -> None:
        self.tol, self.m = tol, data.size[2]
        size, n, m, _ = data.size
        K = stack_rows(data.A, data.E)
        rows, columns = equilibration(K)
        self.K = K * rows.unsqueeze(-1) * columns.unsqueeze(-2)
        self.rows, self.columns = rows.expand(size, -1), columns.expand(size, -1)
        sides = torch.cat([data.b, data.d], -1)
        self.unit_side = sides.abs().clamp(min=1)
        c, q = data.c * self.columns, sides * self.rows
        ends = torch.cat([data.lower / self.columns, data.upper / self.columns], -1)
        largest = _largest(q)
        self.beta = torch.where(largest > 0, largest, _largest(torch.where(ends.isfinite(), ends, 0.0)))
        self.beta = torch.where(self.beta > 0, self.beta, 1.0)
        scaled = None if data.P is None else data.P * self.columns.unsqueeze(-1) * self.columns.unsqueeze(-2)
        self.gamma = _largest(c)
        if scaled is not None:
            self.gamma = torch.maximum(self.gamma, scaled.abs().amax((-1, -2)).unsqueeze(-1))
        self.gamma = torch.where(self.gamma > 0, self.gamma, 1.0)
        self.P = None if scaled is None else scaled * (self.beta / self.gamma).unsqueeze(-1)
        self.c, self.q = c / self.gamma, q / self.beta
        self.l, self.u = ends[:, :n] / self.beta, ends[:, n:] / self.beta
        self.fixed = self.l.isfinite() & ~(self.u - self.l > 1e-14 * (1 + self.l.abs()))
        self.has_l, self.has_u = self.l.isfinite() & ~self.fixed, self.u.isfinite() & ~self.fixed
        self._begin()
        self.count = (self.has_l.sum(-1) + self.has_u.sum(-1) + m).clamp(min=1)
        self.live = torch.ones(size, dtype=torch.bool, device=c.device)
        self.status = torch.full((size,), int(Status.ITERATION_LIMIT), device=c.device)
        self.steps = torch.zeros(size, dtype=torch.int64, device=c.device)
        self.merit = torch.full_like(self.c[:, 0], torch.inf)
        self.best_x, self.best_y = self.x, self.y

    def _begin(self) -> None:
        l, u = self.l, self.u
        room = (0.5 * (u - l)).clamp(max=1)
        x = torch.zeros_like(l).clamp(l + room, u - room)
        self.x = torch.where(self.fixed, torch.where(l.isfinite(), l, u), x)
        self.zl, self.zu = self.has_l.to(l), self.has_u.to(l)
        inequality = torch.arange(self.q.shape[-1], device=l.device) < self.m
        self.inequality = inequality.expand_as(self.q)
        self.s = torch.where(inequality, (self.q - times(self.K, self.x)).clamp(min=1), 0.0)
        self.y = inequality.to(l).expand_as(self.q).clone()

    def _quadratic(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.P is None else times(self.P, x)

    def look(self) -> None:
        """Residuals; the best points so far; who has finished."""
        Px = self._quadratic(self.x)
        r = self.c + Px + transposed_times(self.K, self.y) - self.zl + self.zu
        self.r_d = torch.where(self.fixed, 0.0, r)
        self.r_p = times(self.K, self.x) + self.s - self.q
        self.wl, self.wu = (torch.where(has, w, 1.0) for has, w in self._slacks())
        self.total = (self.zl * self.wl + self.zu * self.wu).sum(-1) + (self.s * self.y).sum(-1)
        width = self.u - self.l
        charge = self.total + (self.y * self.r_p).abs().sum(-1)
        charge = charge + (self.r_d.abs() * torch.where(width.isfinite(), width, self.x.abs() + 1)).sum(-1)
        value = (self.c * self.x).sum(-1) + (Px * self.x).sum(-1) / 2
        unit = (self.gamma * self.beta).squeeze(-1)
        merit = charge * unit / (value.abs() * unit).clamp(min=1)
        if self.q.shape[-1]:
            merit = torch.maximum(merit, (self.r_p.abs() * self.beta / self.rows / self.unit_side).amax(-1))
        failed = self.live & ~merit.isfinite()
        better = self.live & (merit < self.merit)
        self._keep(better)
        self.merit = torch.where(better, merit, self.merit)
        self._put(failed, Status.NUMERICAL)
        self._put(self.live & (merit <= self.tol), Status.OPTIMAL)
        self._look_for_rays()

    def _slacks(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.has_l, self.x - self.l), (self.has_u, self.u - self.x)

    def _keep(self, which: Tensor) -> None:
        self.best_x = torch.where(which.unsqueeze(-1), self.x, self.best_x)
        self.best_y = torch.where(which.unsqueeze(-1), self.y, self.best_y)

    def _put(self, which: Tensor, status: Status) -> None:
        self.status = torch.where(which, int(status), self.status)
        self.live = self.live & ~which

    def _look_for_rays(self) -> None:
        size = _largest(self.y).squeeze(-1)
        push = transposed_times(self.K, self.y)
        end = torch.where(push > 0, self.l, self.u)
        open_ = end.isinf()
        value = torch.where(open_, 0.0, push * end).sum(-1) - (self.y * self.q).sum(-1)
        wrong = torch.where(open_, push.abs(), 0.0).amax(-1)
        farkas = self.live & (size > 1e3) & (value > 1e-6 * size) & (wrong <= 1e-8 * size)
        size = _largest(self.x).squeeze(-1)
        Kx = times(self.K, self.x)
        wrong = torch.cat([torch.where(self.inequality, Kx.clamp(min=0), Kx.abs()), self._quadratic(self.x).abs()], -1)
        outside = torch.maximum(
            torch.where(self.l.isfinite(), -self.x, 0.0), torch.where(self.u.isfinite(), self.x, 0.0)
        )
        wrong = torch.maximum(wrong.amax(-1), outside.amax(-1))
        falls = (self.c * self.x).sum(-1) < -1e-6 * size
        descent = self.live & ~farkas & (size > 1e3) & falls & (wrong <= 1e-7 * size)
        for which, status in ((farkas, Status.INFEASIBLE), (descent, Status.UNBOUNDED)):
            self._keep(which)
            self._put(which, status)

    def step(self) -> None:
        """One predictor-corrector step of the live problems."""
        D = (self.zl / self.wl + self.zu / self.wu).clamp(max=1e25)
        ratio = torch.where(self.inequality, self.s / torch.where(self.inequality, self.y, 1.0), 0.0).clamp(max=1e25)
        self.D, self.S = D, ratio
        self._factorise()
        mu = (self.total / self.count).unsqueeze(-1)
        plain = -self.zl * self.wl * self.has_l, -self.zu * self.wu * self.has_u, -self.s * self.y
        first = self._newton(*plain)
        a, b = self._lengths(first, 1.0)
        dx, dy, dzl, dzu, ds = first
        after = ((self.wl + a * dx) * (self.zl + b * dzl) * self.has_l).sum(-1)
        after = after + ((self.wu - a * dx) * (self.zu + b * dzu) * self.has_u).sum(-1)
        after = after + ((self.s + a * ds) * (self.y + b * dy) * self.inequality).sum(-1)
        target = ((after / self.count).unsqueeze(-1) / mu).clamp(0, 1) ** 3 * mu
        slow = torch.where(torch.minimum(a, b) < 0.1, 0.1, 1.0)
        second = self._newton(
            plain[0] + (target - slow * dx * dzl) * self.has_l,
            plain[1] + (target + slow * dx * dzu) * self.has_u,
            plain[2] + (target - slow * ds * dy) * self.inequality,
        )
        a, b = self._lengths(second, (1 - mu).clamp(0.99, 1 - 2**-40))
        self._move(second, a, b)

    def _factorise(self) -> None:
        """The normal equations' factor; what breaks down gets more regularisation, three times."""
        bump = torch.ones_like(self.beta)
        for _ in range(4):
            self.omega = 1 / (self.S + bump * _DELTA)
            H = (self.K * self.omega.unsqueeze(-1)).mT @ self.K
            H = H if self.P is None else H + self.P
            diagonal = torch.where(self.fixed, _PINNED, self.D + bump * _RHO)
            self.factor, info = torch.linalg.cholesky_ex(H + torch.diag_embed(diagonal))
            broken = self.live & (info != 0)
            if not bool(broken.any()):
                return
            bump = torch.where(broken.unsqueeze(-1), 100 * bump, bump)
        self._put(broken, Status.NUMERICAL)

    def _newton(self, tl: Tensor, tu: Tensor, ts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        g = torch.where(self.fixed, 0.0, -self.r_d + tl / self.wl - tu / self.wu)
        safe_y = torch.where(self.inequality, self.y, 1.0)
        h = -self.r_p - torch.where(self.inequality, ts / safe_y, 0.0)
        dx, dy = self._direction(g, h)
        for _ in range(2):
            left = g - self._quadratic(dx) - self.D * dx - transposed_times(self.K, dy)
            more_x, more_y = self._direction(torch.where(self.fixed, 0.0, left), h - times(self.K, dx) + self.S * dy)
            dx, dy = dx + more_x, dy + more_y
        dzl = torch.where(self.has_l, (tl - self.zl * dx) / self.wl, 0.0)
        dzu = torch.where(self.has_u, (tu + self.zu * dx) / self.wu, 0.0)
        ds = torch.where(self.inequality, (ts - self.s * dy) / safe_y, 0.0)
        return dx, dy, dzl, dzu, ds

    def _direction(self, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        right = (g + transposed_times(self.K, self.omega * h)).unsqueeze(-1)
        dx = torch.cholesky_solve(right, self.factor).squeeze(-1)
        dx = torch.where(self.fixed, 0.0, dx)
        return dx, self.omega * (times(self.K, dx) - h)

    def _lengths(self, step: tuple[Tensor, ...], keep: Tensor | float) -> tuple[Tensor, Tensor]:
        dx, dy, dzl, dzu, ds = step
        a = torch.minimum(_longest(self.wl, dx, self.has_l), _longest(self.wu, -dx, self.has_u))
        a = torch.minimum(a, _longest(self.s, ds, self.inequality))
        b = torch.minimum(_longest(self.zl, dzl, self.has_l), _longest(self.zu, dzu, self.has_u))
        b = torch.minimum(b, _longest(self.y, dy, self.inequality))
        a, b = (a * keep).clamp(max=1), (b * keep).clamp(max=1)
        return (a, b) if self.P is None else (torch.minimum(a, b), torch.minimum(a, b))

    def _move(self, step: tuple[Tensor, ...], a: Tensor, b: Tensor) -> None:
        dx, dy, dzl, dzu, ds = step
        live = self.live.unsqueeze(-1)
        x = self.x + a * dx
        x = torch.where(self.has_l & (x <= self.l), torch.nextafter(self.l, self.u), x)
        x = torch.where(self.has_u & (x >= self.u), torch.nextafter(self.u, self.l), x)
        self.x = torch.where(live, x, self.x)
        self.s = torch.where(live, self.s + a * ds, self.s)
        self.y = torch.where(live, self.y + b * dy, self.y)
        self.zl = torch.where(live, self.zl + b * dzl, self.zl)
        self.zu = torch.where(live, self.zu + b * dzu, self.zu)
        self.steps = self.steps + self.live


def _largest(x: Tensor) -> Tensor:
    """max |x| over the last dimension, kept; 0 where it is empty."""
    return x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def _longest(w: Tensor, dw: Tensor, has: Tensor) -> Tensor:
    """The step at which the first of the positive w vanishes, [B, 1]."""
    if not w.shape[-1]:
        return w.new_full((len(w), 1), torch.inf)
    shrinks = has & (dw < 0)
    return torch.where(shrinks, -w / torch.where(shrinks, dw, -1.0), torch.inf).amin(-1, keepdim=True)
