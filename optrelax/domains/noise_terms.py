"""A zonotope: centre, noise terms that values share, and an interval part for errors that are not shared."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optrelax.enclosures import Bounds, ordered
from optrelax.networks.ops import flatten_from
from optrelax.rounding import SLACK, down, gamma, underflow, up


@dataclass(frozen=True, slots=True)
class Block:
    """Noise terms of one origin: generators [batch or 1, e, *shape] times scale [batch, e], each in [-1, 1]."""

    generators: Tensor
    scale: Tensor

    @property
    def radius(self) -> Tensor:
        """Sum of the absolute generators, [batch, *shape]."""
        g = self.generators.abs()
        flat = flatten_from(g, 2)
        total = self.scale @ flat[0] if flat.shape[0] == 1 else (self.scale[:, None] @ flat)[:, 0]
        return total.reshape(total.shape[0], *g.shape[2:])


@dataclass(frozen=True, slots=True)
class Zonotope:
    """center + sum of generators times noise + an interval of half width beta; [batch, *shape].

    `projected` replaces the generators by k Cauchy projections [batch, k, *shape], whose median absolute value
    estimates the radius: an estimate, not a bound.
    """

    center: Tensor
    blocks: dict[str, Block] = field(default_factory=dict)
    beta: Tensor | None = None
    projected: Tensor | None = None
    outward: bool = False

    @property
    def reach(self) -> Tensor:
        """Sum of the noise terms' scales and one, [batch, 1...]: what an underflowing generator is multiplied by."""
        total = torch.ones_like(self.center[(slice(None), *[slice(1)] * (self.center.dim() - 1))])
        for block in self.blocks.values():
            total = total + block.scale.sum(1).reshape(-1, *total.shape[1:])
        return total

    @property
    def radius(self) -> Tensor:
        """Half width of the interval hull, [batch, *shape]."""
        total = torch.zeros_like(self.center) if self.beta is None else self.beta
        terms = 1
        for block in self.blocks.values():
            total = total + block.radius
            terms += block.generators.shape[1] + 1
        if self.projected is not None:
            total = total + median(self.projected.abs())
        if not self.outward:
            return total
        return total * (1 + SLACK * gamma(terms, total.dtype)) + underflow(terms, total.dtype)

    @property
    def bounds(self) -> Bounds:
        """The interval hull."""
        radius = self.radius
        l, u = self.center - radius, self.center + radius
        return ordered(down(l), up(u)) if self.outward else ordered(l, u)


def median(x: Tensor) -> Tensor:
    """Median over dimension 1, the mean of the middle two for even counts."""
    return (x.median(1).values - (-x).median(1).values) / 2
