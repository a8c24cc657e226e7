"""InteriorPoint: the exact finish of network LPs, a batched primal-dual method on the crossing neurons alone.

Stable neurons are composed away: what is left are the input v in [-1, 1]^d (centred, scaled), and for each of the K
crossing neurons its pre-activation p = M v + N y + m and its value y inside the hull. One Newton system of size 2 K
an iteration (Mehrotra 1992). The
result only chooses a dual and a primal point, which are evaluated by the same sweeps as any other: an inaccurate
solve can be loose, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.layers.ascent.dual_ascent import DualAscent
from optrelax.layers.batched import join
from optrelax.layers.evaluation import best_points, evaluate
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.prices import in_float64
from optrelax.layers.problems import DualPoint, Problems
from optrelax.layers.reduction import Reduced, reduce_problems, without_flat
from optrelax.memory_counts import newton
from optrelax.networks.ops import flatten_from
from optrelax.regions import require_box

if TYPE_CHECKING:
    from optrelax.layers.programs.interior import InteriorPrograms

_BYTES = 512 * 2**20  # of the problems in flight, where max_bytes does not say
_PROBLEMS = 32  # at a time at most: more pad more than they save


@dataclass(frozen=True)
class InteriorPoint(NetworkSolver):
    """Exact solver in float64 on any device, of network LPs and of general programs.

    `Triangle(solver=InteriorPoint())` starts from a few sweeps of `warm`, and works on the problems those leave open;
    `LinearProgram(InteriorPoint())` and `QuadraticProgram(InteriorPoint())` solve each problem of a batch in cache by a
    compiled kernel, where there is a C compiler, else all of them at once in PyTorch (`programs.interior`).
    A start is ignored.

    Args:
        tol: certified relative gap that counts as OPTIMAL.
        max_iterations: Newton steps of a problem.
        max_bytes: most memory for the problems in flight; None: as the device has free.
        warm: the sweeps before, of network LPs.

    Raises:
        ValueError: for an option out of range.

    Sound: yes.  Exact: to a certified relative gap of `tol`, else the status is ITERATION_LIMIT.
    Source: Mehrotra 1992.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> found = Triangle(solver=InteriorPoint()).solve(net, region, torch.eye(2))
        >>> bool((found.status == Status.OPTIMAL).all()), bool((found.gap <= 1e-5).all())
        (True, True)
    """

    tol: float = 1e-6
    max_iterations: int = 60
    max_bytes: int | None = None
    warm: DualAscent = field(default_factory=lambda: DualAscent(max_iterations=16))

    def __post_init__(self) -> None:
        if not self.tol > 0:
            raise ValueError(f"InteriorPoint: tol must be > 0, got {self.tol}")
        if self.max_iterations < 1:
            raise ValueError(f"InteriorPoint: max_iterations must be >= 1, got {self.max_iterations}")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ValueError(f"InteriorPoint: max_bytes must be positive, got {self.max_bytes}")

    def for_programs(self) -> InteriorPrograms:
        """The method for `LinearProgram` and `QuadraticProgram`, with the same options."""
        from optrelax.layers.programs.interior import InteriorPrograms

        return InteriorPrograms(self.tol, self.max_iterations, self.max_bytes or _BYTES)

    def solve(self, problems: Problems, starts: Sequence[DualPoint]) -> Points:
        """Both points of R problems, in float64 where any needed more than the first sweeps."""
        return self.finish(problems, self.warm.solve(problems, starts))

    def finish(self, problems: Problems, points: Points) -> Points:
        """Bring every problem whose gap is above `tol` to an optimum; of both points the better ones are kept."""
        require_box("InteriorPoint", problems.region, "DualAscent() takes any region")
        with torch.no_grad():
            found = evaluate(problems, points, self.tol)
            # Even a closed gap may hide a primal or dual point off the optimal face by more than the gap shows,
            # so float64 gradients want every problem that is not closed to rounding.
            open_ = (~(found.gap <= self.tol * 1e-3 * found.lower.abs().clamp_min(1))).nonzero()[:, 0]
            if not len(open_):
                return points
            order = _by_size(problems, open_)
            chunks = order.split(self._chunk(problems))
            parts = [self._finished(in_float64(problems.select(i)), points.select(i).to(torch.float64)) for i in chunks]
            return points.to(torch.float64).put(order, join(parts))

    def _finished(self, part: Problems, points: Points) -> Points:
        part = without_flat(part)
        reduced = reduce_problems(part)
        if reduced.M.shape[1] == 0:  # affine: the corner
            v, y, prices, steps = -reduced.c_v.sign(), reduced.middle, reduced.middle, 0 * points.iterations
        else:
            state = _Newton(reduced, self.tol * 1e-3, self.max_iterations)
            state.run()
            v, y, prices, steps = state.v, state.y, state.nu, state.steps
        found = Points(reduced.dual_point(part, prices), reduced.primal_point(part, v, y), points.iterations + steps)
        return best_points(part, points, found)

    def bytes_needed(self, inputs: int, hidden: int, count: int) -> int:
        """Memory for `count` problems of these sizes, as if every neuron crossed."""
        whole = min(_PROBLEMS, count) * newton(inputs, hidden)
        return min(whole, max(self.max_bytes or _BYTES, newton(inputs, hidden)))

    def within(self, max_bytes: float) -> InteriorPoint:
        """With no more than this for the problems in flight."""
        return replace(self, max_bytes=max(1, int(min(max_bytes, self.max_bytes or max_bytes))))

    def _chunk(self, problems: Problems) -> int:
        """Problems in flight: K x d and K x K matrices and their copies, K at most every hidden neuron."""
        crossing = max(
            (int(flatten_from(h.free, 1).sum(1).max()) for h in problems.hulls.values() if h.free.numel()), default=1
        )
        crossing = max(1, crossing * len(problems.hulls))
        each = newton(problems.radius[0].numel(), crossing)
        budget = self.max_bytes if self.max_bytes is not None else _BYTES
        return max(1, min(_PROBLEMS, budget // each))


def _by_size(problems: Problems, index: Tensor) -> Tensor:
    """Problems ordered by their number of crossing neurons, so that chunks pad little."""
    if not problems.hulls:
        return index
    counts = sum(flatten_from(h.free[index], 1).sum(1) for h in problems.hulls.values())
    assert isinstance(counts, Tensor)
    return index[counts.argsort(stable=True)]


class _Newton:
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


def _factor(systems: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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

    state: _Newton
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
        cls, state: _Newton, residual: tuple[Tensor, Tensor, Tensor, Tensor], d_v: Tensor, e: Tensor
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
        factors, pivots, info = _factor(torch.where(usable[:, None, None], system, whole))
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
