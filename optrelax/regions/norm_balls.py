"""Balls of a norm cut by a box: one support function for all of them, by weak duality.

The ball is {x + d: |d| <= eps}, the box holds x, so a row a moves coordinate i against its sign, by at most c_i. For
every split |a| = p + q with p, q >= 0

    a.x - eps * dual(p) - q.c  <=  least value of a over the ball in the box,

dual the dual norm, with equality at the best one (Rockafellar 1970, section 16: the support function of an
intersection). A ball says where the best split lies; whatever it says, the value is a bound. Of the best split follow
the gradients: the minimiser in a, the signed p in x, -dual(p) in eps, the signed q in the ends of the box.
"""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optrelax.kernels.relax_step import rows_dot
from optrelax.networks.ops import flatten_from
from optrelax.regions.base import Region, Support
from optrelax.regions.boxes import InputBox
from optrelax.regions.numbers import Numbers, as_range, as_tensor, check_finite, check_floating, shown
from optrelax.rounding import down, gamma, tiny, unit_roundoff, up

_ENTRIES = 2**22
"""Coefficients whose split is looked for at once: more leave a processor's caches."""


@dataclass(frozen=True, slots=True, init=False)
class NormBall(Region):
    """All inputs within eps of x in a norm, clipped to the legal range; a new norm states its split and its points.

    x [batch, *input_shape], the norm over all of an example; eps a number or [batch]; clip (low, high), each a number
    or what broadcasts against an example, or None.
    Raises ValueError for eps < 0, NaN, or an x outside clip.
    """

    x: Tensor
    eps: Tensor
    """[batch]."""
    low: Tensor | None
    """Ends of the box, [batch, *input_shape]; None: without."""
    high: Tensor | None
    given: tuple[float | None, float | None, float | None]
    """eps and the ends of clip as the numbers that they were given as; None for tensors."""

    norm: ClassVar[float]

    def __init__(self, x: Tensor, eps: Numbers, clip: tuple[Numbers, Numbers] | None = None) -> None:
        name = type(self).__name__
        check_floating(name, "x", x)
        if x.dim() == 0:
            raise ValueError(f"{name}: needs a batch dimension, got a scalar; pass x[None]")
        check_finite(name, "x", x)
        size = float(eps) if isinstance(eps, numbers.Real) else None
        found = torch.as_tensor(as_tensor(name, "eps", eps) if size is None else size, dtype=x.dtype, device=x.device)
        if found.dim() > 1 or (found.dim() == 1 and len(found) != len(x)):
            raise ValueError(f"{name}: eps must be a number or [batch] of {len(x)}, got {tuple(found.shape)}")
        if found.numel() and not bool((found.detach() >= 0).all()):
            raise ValueError(f"{name}: eps must be >= 0, got {float(found.detach().min())}")
        check_finite(name, "eps", found)
        low = high = None
        ends: tuple[float | None, float | None] = (None, None)
        if clip is not None:
            both = as_range(name, x, clip)
            low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device).expand_as(x) for end in both)
            ends = tuple(end if isinstance(end, float) else None for end in both)  # type: ignore[assignment]
            outside = (x.detach() < low) | (x.detach() > high)
            if bool(outside.any()):
                raise ValueError(
                    f"{name}: x lies outside clip [{shown(both[0])}, {shown(both[1])}] in {int(outside.sum())} of "
                    f"{outside.numel()} entries (first at {outside.nonzero()[0].tolist()}); scale pixels to the range "
                    "of clip"
                )
        for key, value in zip(
            ("x", "eps", "low", "high", "given"), (x, found.expand(len(x)), low, high, (size, *ends)), strict=True
        ):
            object.__setattr__(self, key, value)

    # --- what a norm states ---

    @classmethod
    @abstractmethod
    def dual_norm(cls, p: Tensor) -> Tensor:
        """The dual norm over the last dimension."""

    @classmethod
    @abstractmethod
    def length(cls, d: Tensor) -> Tensor:
        """The norm over the last dimension."""

    @classmethod
    @abstractmethod
    def price(cls, size: Tensor, room: Tensor) -> Tensor:
        """Where the best split of coefficients `size` >= 0 lies, in a ball of radius 1: [batch, k], for `split`.

        size [batch, k, n], at most 1; room [batch, k, n] in [0, 2], how far each coordinate may move.
        """

    @classmethod
    @abstractmethod
    def split(cls, size: Tensor, room: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """The part p <= size that the ball bounds, and how far each coordinate moves: [batch, k, n] each."""

    @classmethod
    @abstractmethod
    def smooth(cls, size: Tensor, room: Tensor, eps: Tensor, free: Tensor, bound: Tensor) -> Tensor:
        """How far a row falls below its value at x, [batch, k], as a function that can be differentiated twice.

        free: where a coordinate stops within its room, bound: where at its end; as constants, [batch, k, n].
        """

    @classmethod
    @abstractmethod
    def draw(cls, shape: tuple[int, int, int], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
        """Uniform points of the ball of radius 1, [count, batch, n]."""

    # --- what follows ---

    @property
    def center(self) -> Tensor:
        """x."""
        return self.x

    def box(self, outward: bool = False) -> InputBox:
        """The smallest box around; outward, in real arithmetic."""
        eps = self.eps.reshape(-1, *[1] * (self.x.dim() - 1))
        lower, upper = self.x - eps, self.x + eps
        if outward:
            still = eps == 0
            lower, upper = torch.where(still, self.x, down(lower)), torch.where(still, self.x, up(upper))
        if self.low is not None and self.high is not None:
            lower, upper = torch.maximum(lower, self.low), torch.minimum(upper, self.high)
        return InputBox.known(lower, upper)

    def support(self, rows: Tensor) -> Tensor:
        """Least value of each row, [batch, k].

        Gradient: exact, and to second order; at coefficients of 0 and at ties a subgradient.
        """
        a, x = flatten_from(rows, 2), flatten_from(self.x, 1)
        if self.low is None or self.high is None:
            return rows_dot(a, x) - self.eps[:, None] * self.dual_norm(a)
        low, high = flatten_from(self.low, 1), flatten_from(self.high, 1)
        found: Tensor = _Least.apply(type(self), a, x, self.eps, low, high)
        return found

    def outward_support(self, rows: Tensor) -> Support:
        """A bound at the split found, whose terms are positive: sums, products and a norm of them."""
        a, x = flatten_from(rows.detach(), 2), flatten_from(self.x, 1)
        n = a.shape[2]
        center = rows_dot(a, x)
        size = rows_dot(a.abs(), x.abs() + tiny(a.dtype))
        if self.low is None or self.high is None:
            fall = self.eps[:, None] * _safely(self.dual_norm, a.abs())
        else:
            low, high = flatten_from(self.low, 1), flatten_from(self.high, 1)

            def part(some: Tensor) -> Tensor:
                cap, room = _rooms(some, x, self.eps, low, high)
                p, _, scale = _split(type(self), some, room)
                p = torch.minimum(p * scale, some.abs())
                held = ((some.abs() - p) * cap).sum(2)
                return self.eps[:, None] * _safely(self.dual_norm, p) + held

            fall = _in_chunks(part, a, len(x))
        return Support(center - fall, size + fall, n + 16)

    def lowest(self, rows: Tensor) -> Tensor:
        """Where each row takes its least value."""
        with torch.no_grad():
            a, x = flatten_from(rows, 2), flatten_from(self.x, 1)
            if self.low is None or self.high is None:
                low, high = x - self.eps[:, None], x + self.eps[:, None]
            else:
                low, high = flatten_from(self.low, 1), flatten_from(self.high, 1)
            found = _in_chunks(lambda some: _minimiser(type(self), some, x, self.eps, low, high)[0], a, len(x))
            return found.reshape(*found.shape[:2], *self.shape[1:])

    def contains(self, x: Tensor) -> Tensor:
        """Which examples lie in the ball and the box, with no tolerance: near the edge only what provably does."""
        step = flatten_from(x.double() - self.x.double(), 1)
        n, eps = step.shape[1], self.eps.double()
        still = (step == 0).all(1)
        # In units of eps: roundings are relative to 1, and nothing of weight is lost below the normal range.
        share = self.length(step / torch.where(eps > 0, eps, 1.0)[:, None])
        inside = still | ((eps > 0) & (share <= 1 - 2 * gamma(n + 16, torch.float64)))
        if self.low is None or self.high is None:
            return inside
        return inside & flatten_from((x >= self.low) & (x <= self.high), 1).all(1)

    def project(self, x: Tensor) -> Tensor:
        """Into the box, then towards x as far as the ball asks: the nearest point where only one of them does."""
        y = self._clipped(x)
        wide = [1] * (self.x.dim() - 1)
        step = flatten_from(y - self.x, 1)
        eps = self.eps
        positive = torch.where(eps > 0, eps, 1.0)
        share = self.length(step / positive[:, None])
        # A point is rounded to a float once more: by as much it has to lie inside.
        lost = self.length(unit_roundoff(x.dtype) * (flatten_from(self.x, 1).abs() / positive[:, None] + 4))
        most = (1 - 2 * lost - 4 * gamma(step.shape[1] + 16, torch.float64)).clamp_min(0)
        factor = torch.where(share > most, most / torch.where(share > 0, share, 1.0), 1.0)
        found = self._clipped(self.x + factor.reshape(-1, *wide) * (y - self.x))
        return torch.where(self.contains(found).reshape(-1, *wide), found, self.x)

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.low is None or self.high is None else x.clamp(self.low, self.high)

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform points of the ball, moved into the box: [count, *shape]."""
        shape = (count, len(self.x), math.prod(self.shape[1:]))
        step = self.draw(shape, generator, dtype or self.dtype).to(self.x) * self.eps[:, None]
        return self._clipped(self.x + step.reshape(count, *self.shape))

    def outward(self) -> Region:
        """The ball of the numbers that were given, where the type rounded them."""
        eps, low, high = self.given
        return self._with(
            self.x,
            self.eps if eps is None else torch.where(self.eps.double() < eps, up(self.eps), self.eps),
            self.low if low is None or self.low is None else _below(self.low, low),
            self.high if high is None or self.high is None else _above(self.high, high),
        )

    def enclosing(self, dtype: torch.dtype) -> Region:
        """A ball of another type that holds this one: its centre is rounded, and its radius grows by as much."""
        if dtype == self.dtype:
            return self
        x = self.x.to(dtype)
        moved = _safely(self.length, flatten_from((self.x.double() - x.double()).abs(), 1))
        moved = moved * (1 + 2 * gamma(math.prod(self.shape[1:]) + 8, torch.float64))
        eps = up(up(self.eps.double() + moved))
        eps = torch.where(moved > 0, eps, self.eps.double())
        small = eps.to(dtype)
        small = torch.where(small.double() < eps, up(small), small)
        if self.low is None or self.high is None:
            return self._with(x, small, None, None)
        ends = InputBox.known(self.low, self.high).enclosing(dtype)
        return self._with(x, small, ends.lower, ends.upper)

    def _with(self, x: Tensor, eps: Tensor, low: Tensor | None, high: Tensor | None) -> Region:
        found = object.__new__(type(self))
        for key, value in zip(
            ("x", "eps", "low", "high", "given"), (x, eps, low, high, (None, None, None)), strict=True
        ):
            object.__setattr__(found, key, value)
        return found


def _below(t: Tensor, number: float) -> Tensor:
    return torch.where(t.double() > number, down(t), t)


def _above(t: Tensor, number: float) -> Tensor:
    return torch.where(t.double() < number, up(t), t)


def _safely(norm: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    """A norm over the last dimension whose squares neither overflow nor are lost."""
    if p.shape[-1] == 0:
        return norm(p)
    greatest = p.amax(-1, keepdim=True)
    scale = torch.where(greatest > 0, greatest, 1.0)
    return norm(p / scale) * scale[..., 0]


def _in_chunks(part: Callable[[Tensor], Tensor], a: Tensor, batch: int) -> Tensor:
    """`part` of as many rows [batch or 1, k, n] at a time as the caches like: [batch, k, ...]."""
    count = max(1, _ENTRIES // max(1, batch * a.shape[2]))
    if count >= a.shape[1]:
        return part(a)
    return torch.cat([part(some) for some in a.split(count, 1)], 1)


def _rooms(a: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """How far each coordinate may fall, and the same in radii, at most 2: [batch, k, n] each."""
    # No coordinate moves by more than eps, whatever the box allows; and so no end is infinite.
    down_, up_ = (torch.minimum(t, eps[:, None]) for t in (x - low, high - x))
    cap = torch.where(a > 0, down_[:, None], up_[:, None])
    positive = torch.where(eps > 0, eps, 1.0)[:, None]
    ratios = []
    for t in (x - low, high - x):
        ratio = torch.where(eps[:, None] > 0, (t / positive).clamp_max(2), 2.0)
        ratios.append(torch.where(t > 0, ratio, 0.0))
    return cap, torch.where(a > 0, ratios[0][:, None], ratios[1][:, None])


def _split(ball: type[NormBall], a: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and the moves of rows, in units of `scale` [batch, k, 1], the greatest coefficient that moves, and of eps."""
    size = torch.where(room > 0, a.abs(), 0.0)
    if not size.shape[2]:
        return size, size, size.new_ones(*size.shape[:2], 1)
    greatest = size.amax(2, keepdim=True)
    scale = torch.where(greatest > 0, greatest, 1.0)
    size = size / scale
    p, moves = ball.split(size, room, ball.price(size, room))
    return p, moves, scale


def _minimiser(
    ball: type[NormBall], a: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimisers, p (in the units of a), the moves in radii, and the room for them: [batch, k, n] each."""
    _, room = _rooms(a, x, eps, low, high)
    p, moves, scale = _split(ball, a, room)
    step = moves * eps[:, None, None]
    points = torch.where(a > 0, torch.maximum(x[:, None] - step, low[:, None]), x[:, None])
    points = torch.where(a < 0, torch.minimum(x[:, None] + step, high[:, None]), points)
    return points, p * scale, moves, room


class _Least(torch.autograd.Function):
    """Saves its arguments only; the split is found again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, ball: type[NormBall], a: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.ball = ball
        ctx.save_for_backward(a, x, eps, low, high)

        def part(some: Tensor) -> Tensor:
            # The dual value: wherever the split lies, it is no greater than the least value.
            cap, room = _rooms(some, x, eps, low, high)
            p, _, scale = _split(ball, some, room)
            p = torch.minimum(p * scale, some.abs())
            held = torch.where(p < some.abs(), (some.abs() - p) * cap, 0.0).sum(2)
            return rows_dot(some, x) - eps[:, None] * _safely(ball.dual_norm, p) - held

        return _in_chunks(part, a, len(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, x, eps, low, high = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # to be differentiated again
            given = [t.view_as(t) for t in (a, x, eps, low, high)]
            wanted = [t for t, w in zip(given, need, strict=True) if w]
            value = _twice(ctx.ball, *given)
            found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True, materialize_grads=True))
            return None, *(next(found) if w else None for w in need)
        batch = len(x)
        to_a: list[Tensor] = []
        totals = [torch.zeros_like(t) if w else None for t, w in zip((x, eps, low, high), need[1:], strict=True)]
        count = max(1, _ENTRIES // max(1, batch * a.shape[2]))
        for some, g in zip(a.split(count, 1), grad.split(count, 1), strict=True):
            points, p, moves, room = _minimiser(ctx.ball, some, x, eps, low, high)
            g3 = g[..., None]
            if need[0]:
                own = points * g3
                to_a.append(own.sum(0, keepdim=True) if a.shape[0] == 1 and batch != 1 else own)
            if not any(need[1:]):
                continue
            if totals[1] is not None:
                totals[1] -= (g * ctx.ball.dual_norm(p)).sum(1)
            if totals[0] is not None:
                totals[0] += (p * some.sign() * g3).sum(1)
            # What is left of a coefficient at its end goes to that end.
            left = torch.where(moves >= room, some.abs() - p, 0.0) * g3
            left = torch.where(room < 2, left, 0.0)
            if totals[2] is not None:
                totals[2] += torch.where(some > 0, left, 0.0).sum(1)
            if totals[3] is not None:
                totals[3] -= torch.where(some < 0, left, 0.0).sum(1)
        return None, torch.cat(to_a, 1) if need[0] else None, *totals


def _twice(ball: type[NormBall], a: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The support function as one that can be differentiated again: which coordinates stop at an end is fixed."""
    with torch.no_grad():
        _, _, moves, room = _minimiser(ball, a, x, eps, low, high)
        bound = (moves >= room) & (a != 0)
        free = (moves > 0) & ~bound
    cap = torch.where(a > 0, (x - low)[:, None], (high - x)[:, None])
    return rows_dot(a, x) - ball.smooth(a.abs().expand_as(cap), cap, eps, free, bound)
