"""What margins really take on over a region: ranges found by ascent and descent, and exact ones by MILP."""

from __future__ import annotations

import torch
from torch import Tensor

from optrelax.networks.graph import Network
from optrelax.regions import Region

__all__ = ["found_ranges"]


def found_ranges(network: Network, region: Region, rows: Tensor, *, steps: int = 30) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row met on a path of steepest ascent over the region: [batch, k] each.

    rows [batch, k, *output_shape].  Both are values at points of the region, so the true range holds them.  The path
    starts at the centre, its first step reaches an edge, and steps shrink linearly to 0: exact where the network is
    affine on the region.
    """
    batch, k = rows.shape[:2]
    spread = region.detach().select(torch.arange(batch, device=rows.device).repeat_interleave(k))
    flat = rows.reshape(batch * k, *rows.shape[2:])
    ends = []
    for sign in (-1.0, 1.0):
        points = spread.project(spread.center)
        best = torch.full_like(points.flatten(1)[:, 0], -torch.inf)
        for i in range(steps + 1):
            with torch.enable_grad():
                points.requires_grad_(True)
                values = sign * (network(points) * flat).flatten(1).sum(1)
                (gradient,) = torch.autograd.grad(values.sum(), points)
            best = torch.maximum(best, values.detach())
            length = 2 * (1 - i / (steps + 1))
            points = spread.project(points.detach().add(spread.direction(-gradient), alpha=length))
        ends.append((sign * best).reshape(batch, k))
    return ends[0], ends[1]
