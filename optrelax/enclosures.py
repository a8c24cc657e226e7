"""Elementwise enclosures of a tensor of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bounds:
    """Elementwise lower and upper bounds: lower <= value <= upper.

    Shapes [*batch, *shape], both alike.  Raises ValueError where the shapes or dtypes differ or lower exceeds upper.
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape:
            raise ValueError(f"Bounds: lower has shape {tuple(self.lower.shape)}, upper has {tuple(self.upper.shape)}")
        if self.lower.dtype != self.upper.dtype:
            raise ValueError(f"Bounds: lower is {self.lower.dtype}, upper is {self.upper.dtype}")
        check_order("Bounds", self.lower, self.upper)

    @classmethod
    def known(cls, lower: Tensor, upper: Tensor) -> Bounds:
        """Bounds whose order is a matter of arithmetic, which needs no pass over them to check."""
        found = object.__new__(cls)
        object.__setattr__(found, "lower", lower)
        object.__setattr__(found, "upper", upper)
        return found

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
    """Bounds whose ends may have crossed by rounding: swapped there, which only widens."""
    swap = lower.detach() > upper.detach()
    return Bounds(torch.where(swap, upper, lower), torch.where(swap, lower, upper))


def check_order(name: str, lower: Tensor, upper: Tensor) -> None:
    """Raise ValueError where lower > upper, saying how often and where first."""
    width = upper.detach() - lower.detach()
    if width.numel() == 0 or bool(width.amin() >= 0):
        return
    wrong = lower.detach() > upper.detach()
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: lower exceeds upper in {int(wrong.sum())} of {wrong.numel()} entries (first at {first})"
        )
