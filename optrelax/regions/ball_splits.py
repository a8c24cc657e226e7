"""The support function of a ball cut by a box, by weak duality: values, minimisers and gradients of rows.

The ball is {x + d: |d| <= eps}, the box holds x, so a row a moves coordinate i against its sign, by at most c_i. For
every split |a| = p + q with p, q >= 0

    a.x - eps * dual(p) - q.c  <=  least value of a over the ball in the box,

dual the dual norm, with equality at the best one (Rockafellar 1970, section 16: the support function of an
intersection). A ball says where the best split lies; whatever it says, the value is a bound. Of the best split follow
the gradients: the minimiser in a, the signed p in x, -dual(p) in eps, the signed q in the ends of the box.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.kernels import ball_support
from optrelax.kernels.native import laid_out
from optrelax.kernels.relax_step import rows_dot

_ENTRIES = 2**22
"""Coefficients whose split is looked for at once: more leave a processor's caches."""


class Splitting(ABC):
    """What a norm states: its length, the dual one, and where the best split lies."""

    __slots__ = ()
    compiled: ClassVar[int] = 0
    """1 or 2: the norm whose compiled passes (`ball_support`) find the same split; 0: none does."""

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
    def nearest(cls, size: Tensor, room: Tensor) -> Tensor:
        """The moves within the ball and their rooms that lie nearest to `size`, beyond the ball: [batch, k, n]."""

    @classmethod
    @abstractmethod
    def smooth(cls, size: Tensor, room: Tensor, eps: Tensor, free: Tensor, bound: Tensor) -> Tensor:
        """How far a row falls below its value at x, [batch, k], as a function that can be differentiated twice.

        free: where a coordinate stops within its room, bound: where at its end; as constants, [batch, k, n].
        """


class CutBall(NamedTuple):
    """A ball cut by a box, flat: x and the ends [batch, n], eps [batch]."""

    x: Tensor
    eps: Tensor
    low: Tensor
    high: Tensor


class Falls(NamedTuple):
    """How far rows fall below their values at x, [batch, k]: by eps times the dual norm of p, and what the box holds.

    length, held [sides, batch, k], the second side of the rows' negatives; rooms [batch, 2, n], how far each coordinate
    may fall and rise, in radii; price, unit [sides, batch, k]: the compiled passes' own.
    """

    middle: Tensor
    length: Tensor
    held: Tensor
    rooms: Tensor
    price: Tensor | None = None
    unit: Tensor | None = None


def falls(norm: type[Splitting], a: Tensor, ball: CutBall, sides: int = 1) -> Falls:
    """The split of each row a [batch or 1, k, n], and of its negative where sides is 2; without gradient."""
    caps, rooms = _rooms(ball)
    if norm.compiled and ball_support.kernels().supports(a, *ball):
        a, x, caps, rooms = laid_out(a, ball.x, caps, rooms)
        middle, length, held, price, unit = ball_support.split(norm.compiled, sides, a, x, caps, rooms)
        return Falls(middle, length, held, rooms, price, unit)

    def part(rows: Tensor) -> Tensor:
        p, _, scale = _split(norm, rows, _toward(rows, rooms))
        p = torch.minimum(p * scale, rows.abs())
        held = torch.where(p < rows.abs(), (rows.abs() - p) * _toward(rows, caps), 0.0).sum(2)
        return torch.stack([safely(norm.dual_norm, p), held], 2)

    both = torch.stack([_in_chunks(part, rows, len(ball.x)) for rows in (a, -a)[:sides]])
    return Falls(rows_dot(a, ball.x), both[..., 0], both[..., 1], rooms)


def minimisers(norm: type[Splitting], a: Tensor, ball: CutBall) -> Tensor:
    """Where each row takes its least value, [batch, k, n]; without gradient."""
    if norm.compiled and ball_support.kernels().supports(a, *ball):
        a, x, eps = laid_out(a, ball.x, ball.eps)
        found = falls(norm, a, ball)
        assert found.price is not None
        assert found.unit is not None
        one = torch.ones_like(found.price)
        points = ball_support.points(norm.compiled, a, x, found.rooms, eps, found.price, found.unit, one)
        return points.clamp(ball.low[:, None], ball.high[:, None])
    return _in_chunks(lambda some: _minimiser(norm, some, ball)[0], a, len(ball.x))


def nearest(norm: type[Splitting], x: Tensor, ball: CutBall) -> Tensor:
    """The points of the ball and its box that lie nearest to x [batch, n], which is beyond the ball: [batch, n]."""
    step = x - ball.x
    size = step.abs()[:, None] / torch.where(ball.eps > 0, ball.eps, 1.0)[:, None, None]
    moves = norm.nearest(size, _toward(-step[:, None], _rooms(ball)[1]))[:, 0]
    return ball.x + step.sign() * moves * ball.eps[:, None]


def least(norm: type[Splitting], a: Tensor, ball: CutBall) -> Tensor:
    """Least values of rows a [batch or 1, k, n]: [batch, k].  Gradient: exact, and to second order."""
    found: Tensor = _SupportOfBall.apply(norm, 1, a, *ball)
    return found[0]


def extent(norm: type[Splitting], a: Tensor, ball: CutBall) -> tuple[Tensor, Tensor]:
    """Least and greatest values of rows, [batch, k] each.  Gradient: exact, and to second order."""
    low, high = _SupportOfBall.apply(norm, 2, a, *ball)
    return low, high


def safely(norm: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
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


def _rooms(ball: CutBall) -> tuple[Tensor, Tensor]:
    """How far each coordinate may fall and rise, and the same in radii, at most 2: [batch, 2, n] each."""
    gaps, eps = torch.stack([ball.x - ball.low, ball.high - ball.x], 1), ball.eps[:, None, None]
    # No coordinate moves by more than eps, whatever the box allows; and so no end is infinite.
    ratio = torch.where(eps > 0, (gaps / torch.where(eps > 0, eps, 1.0)).clamp_max(2), 2.0)
    return torch.minimum(gaps, eps), torch.where(gaps > 0, ratio, 0.0)


def _toward(a: Tensor, both: Tensor) -> Tensor:
    """What concerns the way that each coefficient moves its coordinate: [batch, k, n]."""
    return torch.where(a > 0, both[:, :1], both[:, 1:])


def _split(norm: type[Splitting], a: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and the moves of rows, in units of `scale` [batch, k, 1], the greatest coefficient that moves, and of eps."""
    moving = torch.where(room > 0, a.abs(), 0.0)
    if not moving.shape[2]:
        return moving, moving, moving.new_ones(*moving.shape[:2], 1)
    greatest = moving.amax(2, keepdim=True)
    scale = torch.where(greatest > 0, greatest, 1.0)
    p, moves = norm.split(a.abs() / scale, room, norm.price(moving / scale, room))
    return p, moves, scale


def _minimiser(norm: type[Splitting], a: Tensor, ball: CutBall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimisers, p (in the units of a), the moves in radii, and the room for them: [batch, k, n] each."""
    room = _toward(a, _rooms(ball)[1])
    p, moves, scale = _split(norm, a, room)
    step, x = moves * ball.eps[:, None, None], ball.x[:, None]
    points = torch.where(a > 0, torch.maximum(x - step, ball.low[:, None]), x)
    points = torch.where(a < 0, torch.minimum(x + step, ball.high[:, None]), points)
    return points, p * scale, moves, room


class _SupportOfBall(torch.autograd.Function):
    """Least values of rows, and the greatest where sides is 2: [sides, batch, k].

    Saves its arguments and two numbers a row; without compiled passes the split is found again.
    """

    @staticmethod
    def forward(
        ctx: Context, norm: type[Splitting], sides: int, a: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        ball = CutBall(x, eps, low, high)
        found = falls(norm, a, ball, sides)
        ctx.norm, ctx.sides = norm, sides
        # A kernel's price, where one was used, leads back to the same split.
        ctx.save_for_backward(a, *ball, found.length, found.rooms, found.price, found.unit)
        # The dual value: wherever the split lies, it is no greater than the least value.
        fall = eps[:, None] * found.length + found.held
        return torch.stack([found.middle - fall[0], *(found.middle + other for other in fall[1:])])

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, x, eps, low, high, length, rooms, price, unit = ctx.saved_tensors
        need, ball = ctx.needs_input_grad[2:], CutBall(x, eps, low, high)
        if torch.is_grad_enabled():  # to be differentiated again
            return None, None, *_again(ctx.norm, a, ball, grad, need)
        if price is None:
            return None, None, *_eager_gradient(ctx.norm, a, ball, grad, need)
        a, x, eps, rooms, grad = laid_out(a, x, eps, rooms, grad)
        given = (price, unit, grad)
        to_a = ball_support.gradient(ctx.norm.compiled, a, x, rooms, eps, *given) if need[0] else None
        to_x = to_low = to_high = None
        if need[1] or need[3] or need[4]:
            to_x, to_low, to_high = ball_support.ends(ctx.norm.compiled, a, x, rooms, *given)
        to_eps = (grad[1:] * length[1:]).sum((0, 2)) - (grad[0] * length[0]).sum(1) if need[2] else None
        return None, None, to_a, to_x, to_eps, to_low, to_high


def _eager_gradient(
    norm: type[Splitting], a: Tensor, ball: CutBall, grad: Tensor, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients in the rows and the ball where they are needed; of the second side by the rows' negatives."""
    found = [torch.zeros_like(t) if wanted else None for t, wanted in zip((a, *ball), need, strict=True)]
    count = max(1, _ENTRIES // max(1, len(ball.x) * a.shape[2]))
    for sign, side in zip((1, -1), grad, strict=False):
        for begin in range(0, a.shape[1], count):
            some = slice(begin, begin + count)
            rows, g = sign * a[:, some], sign * side[:, some]
            points, p, moves, room = _minimiser(norm, rows, ball)
            g3 = g[..., None]
            to_a, to_x, to_eps, to_low, to_high = found
            if to_a is not None:
                own = sign * points * g3
                to_a[:, some] += own.sum(0, keepdim=True) if len(a) != len(own) else own
            if to_eps is not None:
                to_eps -= (g * norm.dual_norm(p)).sum(1)
            if to_x is not None:
                to_x += (p * rows.sign() * g3).sum(1)
            # What is left of a coefficient at its end goes to that end.
            left = torch.where((moves >= room) & (room < 2), rows.abs() - p, 0.0) * g3
            if to_low is not None:
                to_low += torch.where(rows > 0, left, 0.0).sum(1)
            if to_high is not None:
                to_high -= torch.where(rows < 0, left, 0.0).sum(1)
    return found


def _again(
    norm: type[Splitting], a: Tensor, ball: CutBall, grad: Tensor, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated."""
    given = [t.view_as(t) for t in (a, *ball)]
    wanted = [t for t, w in zip(given, need, strict=True) if w]
    rows, fixed = given[0], CutBall(*given[1:])
    value = torch.stack([sign * _twice(norm, sign * rows, fixed) for sign in (1, -1)[: len(grad)]])
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if w else None for w in need]


def _twice(norm: type[Splitting], a: Tensor, ball: CutBall) -> Tensor:
    """The support function as one that can be differentiated again: which coordinates stop at an end is fixed."""
    with torch.no_grad():
        _, _, moves, room = _minimiser(norm, a, ball)
        bound = (moves >= room) & (a != 0)
        free = (moves > 0) & ~bound
    cap = torch.where(a > 0, (ball.x - ball.low)[:, None], (ball.high - ball.x)[:, None])
    return rows_dot(a, ball.x) - norm.smooth(a.abs().expand_as(cap), cap, ball.eps, free, bound)
