"""The ball of the sum of absolute values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optrelax.networks.ops import flatten_from
from optrelax.regions.base import Polyhedron
from optrelax.regions.norm_balls import NormBall
from optrelax.regions.registry import register_ball


@register_ball("l1")
class L1Ball(NormBall):
    """All inputs whose absolute differences from x sum to eps at most, clipped to the legal range.

    Support: a.x - eps max |a| without clip; with it the coordinates of the greatest |a_i| go to their ends, in turn,
    until eps is spent (Dantzig 1957): by sorting.

    Args:
        x: [batch, *input_shape]; the norm is over all of an example.
        eps: radius, a number or [batch], in the units of x: the sum over all entries.
        clip: (low, high), each a number or what broadcasts against an example, or None.

    Raises:
        ValueError: for eps < 0, NaN, or an x outside clip.

    Sound: yes; in real arithmetic where bounds are rounded outward.  Exact: the least value of a linear function, to
    rounding.  Gradient: in x and eps.

    Example:
        >>> row = torch.tensor([[[2.0, 1.0]]])
        >>> x = torch.tensor([[0.25, 0.5]])
        >>> ox.L1Ball(x, eps=0.5).support(row), ox.L1Ball(x, eps=0.5, clip=(0.0, 1.0)).support(row)
        (tensor([[0.]]), tensor([[0.2500]]))
    """

    __slots__ = ()
    compiled: ClassVar[int] = 1

    def polyhedron(self) -> Polyhedron:
        """With a number a coordinate that holds its change: |x_i - c_i| <= y_i, and these sum to eps at most."""
        x, eps = flatten_from(self.x.detach(), 1)[0], self.eps[:1].detach()
        eye = torch.eye(len(x), device="cpu").to(x)
        free = torch.full_like(x, -torch.inf)
        A = torch.cat([eye, -eye, torch.zeros_like(x)[None]])
        B = torch.cat([-eye, -eye, torch.ones_like(x)[None]])
        least = torch.cat([free, free, torch.zeros_like(eps)])
        return Polyhedron(A, B, least, torch.cat([x, -x, eps]), torch.zeros_like(x), eps.expand_as(x))

    @classmethod
    def dual_norm(cls, p: Tensor) -> Tensor:
        """The maximum norm."""
        return p.abs().amax(-1) if p.shape[-1] else p.sum(-1)

    @classmethod
    def length(cls, d: Tensor) -> Tensor:
        """Sum of absolute values."""
        return d.abs().sum(-1)

    @classmethod
    def price(cls, size: Tensor, room: Tensor) -> Tensor:
        """The coefficient at which the radius is spent; 0 where all reach their ends before."""
        if not size.shape[2]:
            return size.sum(2)
        ordered, order = size.sort(dim=2, descending=True)
        spent = room.expand_as(size).gather(2, order).cumsum(2)
        first = (spent < 1).sum(2, keepdim=True)
        price = ordered.gather(2, first.clamp_max(size.shape[2] - 1))[..., 0]
        return torch.where(first[..., 0] < size.shape[2], price, 0.0)

    @classmethod
    def split(cls, size: Tensor, room: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """p = min(size, price); coordinates above it go to their ends, those at it share what is left, in turn."""
        at = price[..., None]
        whole = torch.where(size > at, room, 0.0)
        left = (1 - whole.sum(2, keepdim=True)).clamp_min(0)
        equal = torch.where((size == at) & (size > 0), room, 0.0)
        part = torch.minimum((left - (equal.cumsum(2) - equal)).clamp_min(0), equal)
        return torch.minimum(size, at), whole + part

    @classmethod
    def nearest(cls, size: Tensor, room: Tensor) -> Tensor:
        """min(max(size - t, 0), room), t where these sum to 1: among the ends of the pieces of that sum, sorted."""
        if not size.shape[2]:
            return size
        ends, order = torch.cat([size, size - room], 2).sort(dim=2, descending=True)
        slope = torch.where(order < size.shape[2], 1.0, -1.0).to(size).cumsum(2)
        # The sum at each end: it rises as t falls, by the slope behind the end before.
        total = torch.cat([torch.zeros_like(size[..., :1]), slope[..., :-1] * -ends.diff(dim=2)], 2).cumsum(2)
        after = (total < 1).sum(2, keepdim=True).clamp_max(ends.shape[2] - 1)
        rise = slope.gather(2, (after - 1).clamp_min(0)).clamp_min(1)
        t = ends.gather(2, after) + (total.gather(2, after) - 1) / rise
        return torch.minimum((size - t).clamp_min(0), room)

    @classmethod
    def smooth(cls, size: Tensor, room: Tensor, eps: Tensor, free: Tensor, bound: Tensor) -> Tensor:
        """What is left of eps, by the coefficient that spends it, and what those before it fall by."""
        held = torch.where(bound, room, 0.0)
        left = eps[:, None] - held.sum(2)
        return left * cls.dual_norm(torch.where(free, size, 0.0)) + (size * held).sum(2)

    @classmethod
    def draw(cls, shape: tuple[int, int, int], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
        """Exponential variables over their sum with one more, with random signs."""
        device = torch.device("cpu") if generator is None else generator.device
        wide = (*shape[:2], shape[2] + 1)
        drawn = -torch.rand(wide, generator=generator, dtype=dtype, device=device).clamp_min(1e-30).log()
        sign = torch.rand(shape, generator=generator, dtype=dtype, device=device) < 0.5
        step = drawn[..., :-1] / drawn.sum(2, keepdim=True)
        return torch.where(sign, step, -step)
