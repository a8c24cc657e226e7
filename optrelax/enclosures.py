"""Elementwise enclosures of a tensor of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.frozen import filled


@dataclass(frozen=True, slots=True)
class Bounds:
    """Elementwise lower and upper bounds: lower <= value <= upper.

    Args:
        lower: [*batch, *shape].  Never NaN: what overflowed is no bound, -inf below.
        upper: like lower; +inf where it overflowed.

    Raises:
        ValueError: where the shapes or dtypes differ or lower exceeds upper.

    Example:
        >>> b = ox.Bounds(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.5]))
        >>> b.width
        tensor([2.0000, 0.5000])
        >>> b.intersect(ox.Bounds(torch.zeros(2), torch.ones(2))).upper
        tensor([1., 1.])
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape:
            raise ValueError(f"Bounds: lower has shape {tuple(self.lower.shape)}, upper has {tuple(self.upper.shape)}")
        if self.lower.dtype != self.upper.dtype:
            raise ValueError(f"Bounds: lower is {self.lower.dtype}, upper is {self.upper.dtype}")
        if not check_order("Bounds", self.lower, self.upper):
            filled(self, lower=from_below(self.lower), upper=from_above(self.upper))

    @classmethod
    def known(cls, lower: Tensor, upper: Tensor) -> Bounds:
        """Bounds whose order is a matter of arithmetic, which needs no pass over them to check."""
        return filled(object.__new__(cls), lower=lower, upper=upper)

    @property
    def width(self) -> Tensor:
        """upper - lower, [*batch, *shape]."""
        return self.upper - self.lower

    def intersect(self, other: Bounds) -> Bounds:
        """The tighter of the two, entry by entry.

        Two sound enclosures of one value overlap in real arithmetic; where rounding parts them (both within an
        ulp or so of the value) the gap between them is what is left, so the order of the ends is kept.
        """
        lower = torch.maximum(self.lower, other.lower)
        upper = torch.minimum(self.upper, other.upper)
        return ordered(lower, upper)


def ordered(lower: Tensor, upper: Tensor) -> Bounds:
    """Bounds from computed ends: where they crossed by rounding, swapped, which only widens; what overflowed is none.

    Every pre-activation and output bound is made here, so that lines and hulls never meet a NaN.
    """
    if _in_order(lower, upper):
        return Bounds.known(lower, upper)
    lower, upper = from_below(lower), from_above(upper)
    swap = lower.detach() > upper.detach()
    return Bounds.known(torch.where(swap, upper, lower), torch.where(swap, lower, upper))


def from_below(bound: Tensor) -> Tensor:
    """Lower bounds of which what overflowed, NaN or +inf, is none: -inf, without gradient."""
    return bound.masked_fill(~(bound.detach() < torch.inf), -torch.inf)


def from_above(bound: Tensor) -> Tensor:
    """Upper bounds of which what overflowed, NaN or -inf, is none: +inf, without gradient."""
    return bound.masked_fill(~(bound.detach() > -torch.inf), torch.inf)


def _in_order(lower: Tensor, upper: Tensor) -> bool:
    """Whether lower <= upper everywhere, none of them NaN, and no end infinite on the wrong side: one pass."""
    width = upper.detach() - lower.detach()
    return width.numel() == 0 or bool(width.amin() >= 0)


def check_order(name: str, lower: Tensor, upper: Tensor) -> bool:
    """Whether all is in order; False where an end overflowed. ValueError where lower > upper, how often and where."""
    if _in_order(lower, upper):
        return True
    wrong = lower.detach() > upper.detach()
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: lower exceeds upper in {int(wrong.sum())} of {wrong.numel()} entries (first at {first})"
        )
    return False
