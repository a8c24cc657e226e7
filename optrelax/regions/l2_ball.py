"""The Euclidean ball."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optrelax.regions.norm_balls import NormBall
from optrelax.regions.registry import register_ball

_ROUNDS = 64
"""Newton's steps at most: each settles one coordinate at least, and most rows take under eight."""


@register_ball("l2")
class L2Ball(NormBall):
    """All inputs within eps of x in the Euclidean norm, clipped to the legal range.

    Support: a.x - eps |a| without clip; with it coordinate i moves by min(t |a_i|, its room), t by Newton's method on
    a concave piecewise linear function: exact after finitely many steps.

    Args:
        x: [batch, *input_shape]; the norm is over all of an example.
        eps: radius, a number or [batch], in the units of x: the root of the sum of squares over all entries.
        clip: (low, high), each a number or what broadcasts against an example, or None.

    Raises:
        ValueError: for eps < 0, NaN, or an x outside clip.

    Sound: yes; in real arithmetic where bounds are rounded outward.  Exact: the least value of a linear function, to
    rounding.  Gradient: in x and eps.

    Example:
        >>> net, x = ox.models.fc(4, 8, 2, seed=0), torch.zeros(1, 4)
        >>> ball, box = (ox.bounds(net, kind(x, eps=0.1)).width.sum() for kind in (ox.L2Ball, ox.LinfBall))
        >>> bool(ball < box)
        True
    """

    __slots__ = ()
    compiled: ClassVar[int] = 2

    @classmethod
    def dual_norm(cls, p: Tensor) -> Tensor:
        """Its own dual."""
        return torch.linalg.vector_norm(p, dim=-1)

    @classmethod
    def length(cls, d: Tensor) -> Tensor:
        """Root of the sum of squares."""
        return torch.linalg.vector_norm(d, dim=-1)

    @classmethod
    def price(cls, size: Tensor, room: Tensor) -> Tensor:
        """The square of t: sum min(t^2 size^2, room^2) = 1; infinite where all reach their ends before."""
        squares, ends = size * size, torch.where(size > 0, room * room, 0.0)
        # From the left, where the function lies below its tangents: steps only rise.
        total = squares.sum(2)
        found = 1 / torch.where(total > 0, total, 1.0)
        for _ in range(_ROUNDS):
            free = found[..., None] * squares < ends
            slope = torch.where(free, squares, 0.0).sum(2)
            held = torch.where(free, 0.0, ends).sum(2)
            step = (1 - held).clamp_min(0) / torch.where(slope > 0, slope, 1.0)
            new = torch.where(slope > 0, torch.maximum(step, found), torch.inf)
            if bool((new == found).all()):
                break
            found = new
        return found

    @classmethod
    def split(cls, size: Tensor, room: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """p = size where the coordinate stops within its room, else room / t."""
        t = price.sqrt()[..., None]
        free = t * size < room
        p = torch.where(free, size, torch.minimum(room / t, size))
        return p, torch.where(free, t * size, torch.where(size > 0, room, 0.0))

    @classmethod
    def nearest(cls, size: Tensor, room: Tensor) -> Tensor:
        """min(t size, room), as of the row that points there: the conditions of optimality are the same."""
        size = size / size.amax(2, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny) if size.shape[2] else size
        moving = torch.where(room > 0, size, 0.0)
        return cls.split(moving, room, cls.price(moving, room))[1]

    @classmethod
    def smooth(cls, size: Tensor, room: Tensor, eps: Tensor, free: Tensor, bound: Tensor) -> Tensor:
        """sqrt(eps^2 - the ends' squares) |a| over the free coordinates, and what the others fall by."""
        held = torch.where(bound, room, 0.0)
        left = (eps[:, None].square() - held.square().sum(2)).clamp_min(torch.finfo(size.dtype).tiny)
        return left.sqrt() * cls.dual_norm(torch.where(free, size, 0.0)) + (size * held).sum(2)

    @classmethod
    def draw(cls, shape: tuple[int, int, int], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
        """A normal direction, by the n-th root of a uniform number."""
        device = torch.device("cpu") if generator is None else generator.device
        step = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        radius = torch.rand((*shape[:2], 1), generator=generator, dtype=dtype, device=device) ** (1 / max(1, shape[2]))
        length = torch.linalg.vector_norm(step, dim=2, keepdim=True)
        return step / torch.where(length > 0, length, 1.0) * radius
