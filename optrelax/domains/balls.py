"""Values within a radius of a center, elementwise, and what an affine op adds to it by rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.enclosures import Bounds, ordered
from optrelax.networks.ops import Affine
from optrelax.rounding import SLACK, down, gamma, peak, underflow, up


@dataclass(frozen=True, slots=True)
class Ball:
    """Values within `radius` of `center`, elementwise; [batch, *shape] each."""

    center: Tensor
    radius: Tensor
    outward: bool = False

    @property
    def bounds(self) -> Bounds:
        """[center - radius, center + radius]; a center or radius that overflowed bounds nothing."""
        l, u = self.center - self.radius, self.center + self.radius
        return ordered(down(l), up(u)) if self.outward else ordered(l, u)

    @property
    def magnitude(self) -> Tensor:
        """Greatest absolute value, [batch, *shape]."""
        return self.center.abs() + self.radius


def ball(l: Tensor, u: Tensor, outward: bool = False) -> Ball:
    """The smallest ball around [l, u]; outward, one that holds it in real arithmetic."""
    center, radius = (l + u) * 0.5, (u - l) * 0.5  # a division takes five times as long
    if outward:
        # u - c and c - l each round by half an ulp; the next float up covers it.
        radius = up(torch.maximum(u - center, center - l).clamp_min(0))
        radius = torch.where(l == u, 0.0, radius)
        center = torch.where(l == u, l, center)
    return Ball(center, radius, outward)


def affine_error(op: Affine, magnitudes: list[Tensor]) -> Tensor:
    """Allowance for an affine op on values of these magnitudes, image and |image| both: [batch, *shape].

    Each of the two products errs by at most gamma(fan_in + roundings) times the sum of absolute terms, which is
    |W| magnitude + |b|; their common sum is at most twice that. Products, sums and constants may underflow: see
    `optrelax.rounding`.
    """
    total, lost = absolute_terms(op, magnitudes)
    if op.cost() == 0:  # the same numbers in another shape
        return torch.zeros_like(total)
    return SLACK * (2 * gamma(_products(op), total.dtype) * total + lost)


def absolute_terms(op: Affine, magnitudes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """|W| magnitude + |b|, and what may be lost below the normal range: [batch, *shape], [batch, 1...]."""
    total = op.apply_abs(*magnitudes)
    size = op.bias_size(total)
    greatest = torch.stack([peak(m).reshape(-1, *[1] * len(op.shape)) for m in magnitudes]).amax(0)
    return total if size is None else total + size, underflow(4 * _products(op), total.dtype) * (1 + greatest)


def _products(op: Affine) -> int:
    """Roundings of one output, those of its constants included."""
    return op.fan_in * len(op.input_shapes) + op.roundings
