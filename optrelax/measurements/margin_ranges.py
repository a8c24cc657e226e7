"""What margins really take on over a region: ranges found by ascent and descent, and exact ones by MILP."""

from __future__ import annotations

import torch
from torch import Tensor

from optrelax.networks.graph import Network
from optrelax.regions import InputBox

__all__ = ["found_ranges"]


def found_ranges(network: Network, region: InputBox, rows: Tensor, *, steps: int = 30) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row met on a sign-gradient path over the region: [batch, k] each.

    rows [batch, k, *output_shape].  Both are values at points of the region, so the true range holds them.  The path
    starts at the centre, its first step reaches a corner, and steps shrink linearly to 0: exact where the network is
    affine on the region.
    """
    batch, k = rows.shape[:2]
    shape = region.shape[1:]
    spread = [t[:, None].expand(batch, k, *shape).reshape(-1, *shape) for t in (region.lower, region.upper)]
    lower, upper = (t.detach() for t in spread)
    flat = rows.reshape(batch * k, *rows.shape[2:])
    ends = []
    for sign in (-1.0, 1.0):
        points = (lower + upper) / 2
        best = torch.full_like(points.flatten(1)[:, 0], -torch.inf)
        for i in range(steps + 1):
            with torch.enable_grad():
                points.requires_grad_(True)
                values = sign * (network(points) * flat).flatten(1).sum(1)
                (gradient,) = torch.autograd.grad(values.sum(), points)
            best = torch.maximum(best, values.detach())
            length = (upper - lower) * (1 - i / (steps + 1))
            points = torch.minimum(torch.maximum(points.detach() + length * gradient.sign(), lower), upper)
        ends.append((sign * best).reshape(batch, k))
    return ends[0], ends[1]
