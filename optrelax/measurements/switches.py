"""Where a relaxation can switch: functions of the pre-activation bounds whose sign it, or its activation, depends on.

Kinks decide whether a neuron crosses (l = 0, u = 0 for a ReLU); ties of the hull's lines, and of the widths of the
flat and the steep band, decide which line is taken (|l| = |u| for a ReLU).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Preactivation, Relaxation
from optrelax.relaxations.jumps import LOWER, TIE, UPPER

__all__ = ["CAUSES", "sources", "switch_functions"]

CAUSES = (LOWER, UPPER, TIE)
"""Causes of a jump by the index that `switch_functions` gives."""


def switch_functions(network: Network, bounds: Preactivation) -> tuple[Tensor, Tensor]:
    """Values whose signs say which branch every neuron of every example is on, and the cause of each: [e], int [e]."""
    values, causes = [], []
    for name, b in bounds.items():
        if (pieces := network[name].piecewise) is None:  # its lines move with the bounds and never switch
            continue
        for kink in pieces.kinks:
            values += [(b.lower - kink).flatten(), (b.upper - kink).flatten()]
            causes += [torch.zeros(b.lower.numel(), device="cpu"), torch.ones(b.lower.numel(), device="cpu")]
        for tie in _ties(pieces, b):
            values.append(tie.flatten())
            causes.append(torch.full((tie.numel(),), 2.0, device="cpu"))
    if not values:
        return torch.zeros(0, dtype=torch.float64, device="cpu"), torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.cat(values).double(), torch.cat(causes).long()


def _ties(activation: PiecewiseLinear, b: Bounds) -> list[Tensor]:
    """Which of the hull's two lines is closer at the middle, and which band is narrower; continuous in l and u."""
    l, u = b.lower, b.upper
    if len(activation.kinks) == 1:
        # All ties of one kink are the same.
        return [l + u - 2 * activation.kinks[0]]
    hull = activation.hull(l, u)
    crossing = activation.crossing(l, u)
    ties = []
    for (s0, i0), (s1, i1) in (hull.below, hull.above):
        ties.append(torch.where(crossing, (s1 - s0) * (l + u) + 2 * (i1 - i0), 0.0))
    widths = []
    for slope in (0.0, max(activation.slopes)):
        low, high = activation.band(torch.full_like(l, slope), l, u)
        widths.append(high - low)
    return [*ties, widths[0] - widths[1]]


def sources(relaxation: Relaxation, network: Network, region: Region) -> Iterator[Preactivation]:
    """Every set of pre-activation bounds on which lines of this relaxation, or of its parts, are chosen."""
    for part in relaxation.parts:
        yield from sources(part, network, region)
    if relaxation.parts and not relaxation.tightens:
        return
    try:
        yield relaxation.preactivation_bounds(network, region)
    except NotImplementedError:  # a user's relaxation that states no pre-activation bounds
        return
