"""Bounds of Jacobians over a region, and local Lipschitz constants from them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from optrelax.analysis import Net, bounds, prepare
from optrelax.enclosures import Bounds
from optrelax.networks.derivatives import derivative
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.rounding import SLACK, Rounding, gamma, underflow

Norm = Literal[1, 2] | float  # 1, 2 or math.inf

_POWERS = 50


def jacobian_bounds(
    net: Net, region: Region, relaxation: Relaxation | str = "crown", *, rounding: Rounding | None = None
) -> Bounds:
    """Bounds of every partial derivative over the region.

    The derivative is a network of its own (`optrelax.networks.derivatives`), and its products are relaxed by planes.

    Args:
        net: as for `bounds`.
        region: as for `bounds`.
        relaxation: one that takes products: Box to CROWN.
        rounding: as for `bounds`.

    Returns:
        Lower and upper bounds, [*batch, *output_shape, *input_shape].

    Raises:
        UnsupportedOpError: for relaxations that take no products (LP layers), for maxima, and for activations that say
            nothing of their derivative.

    Sound: yes, for each element of the generalised Jacobian at kinks.
    Exact, gradient: as the relaxation; exact where no neuron crosses.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> b = ox.jacobian_bounds(net, ox.LinfBall(torch.zeros(1, 2), eps=1.0))
        >>> torch.equal(b.lower[0], net.weight), b.width.max().item()
        (True, 0.0)
    """
    network, flat, batch = prepare(net, region)
    found = bounds(derivative(network), flat, relaxation, rounding=rounding)
    shape = (*batch, *found.lower.shape[1:])
    return Bounds(found.lower.reshape(shape), found.upper.reshape(shape))


def lipschitz_bound(
    net: Net,
    region: Region,
    norm: Norm = math.inf,
    relaxation: Relaxation | str = "crown",
    *,
    rounding: Rounding | None = None,
) -> Tensor:
    """Bound of |f(x) - f(y)| / |x - y| for x, y of one region.

    Args:
        net: as for `bounds`.
        region: convex.
        norm: 1, 2 or `math.inf`, on both sides.
        relaxation: as for `jacobian_bounds`.
        rounding: as for `bounds`.

    Returns:
        [*batch].

    Raises:
        ValueError: for another norm.
        UnsupportedOpError: as `jacobian_bounds`.

    Sound: yes, over convex regions (mean value theorem): the norm of the matrix of the largest absolute partial
    derivatives; for the 2-norm of a non-negative matrix M the greatest (M^T M v)_i / v_i at a positive v
    (Collatz 1942), which power iterations bring down to it.  With rounding="outward" in real arithmetic.
    Gradient: exact, for norm 2 at the v found.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = nn.init.constant_(net[0].weight, 3.0)
        >>> region = ox.LinfBall(torch.ones(1, 2), eps=0.5)
        >>> ox.lipschitz_bound(net, region).item(), ox.lipschitz_bound(net, region, norm=1).item()
        (6.0, 6.0)
    """
    if norm not in (1, 2, math.inf):
        raise ValueError(f"lipschitz_bound: norm must be 1, 2 or math.inf, got {norm!r}")
    network, flat, batch = prepare(net, region)
    b = bounds(derivative(network), flat, relaxation, rounding=rounding)
    size = torch.maximum(b.lower.abs(), b.upper.abs()).reshape(flat.shape[0], network.outputs, -1)
    if norm == 2:
        found, terms = _spectral(size)
    else:
        found, terms = size.sum(2 if norm == math.inf else 1).amax(1), max(size.shape[1:])
    if rounding == "outward":
        found = found * (1 + SLACK * gamma(4 * terms + 8, found.dtype)) + underflow(terms, found.dtype)
    return found.reshape(batch)


def _spectral(m: Tensor) -> tuple[Tensor, int]:
    """At least the largest singular value of matrices >= 0 [batch, k, n], and the number of terms rounded."""
    with torch.no_grad():
        v = torch.ones_like(m[:, 0])
        for _ in range(_POWERS):
            v = (m.mT @ (m @ v[..., None]))[..., 0]
            v = v / v.amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        v = v.clamp_min(2.0**-20)  # positive in every entry
    image = (m.mT @ (m @ v[..., None]))[..., 0]
    return (image / v).amax(1).sqrt(), m.shape[1] + m.shape[2]
