"""Where a relaxation can switch: functions of the pre-activation bounds whose sign it, or its activation, depends on.

Kinks decide whether a neuron crosses (l = 0, u = 0 for a ReLU); ties of the hull's lines, and of the widths of the
flat and the steep band, decide which line is taken (|l| = |u| for a ReLU).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Box, Crown, FastLin, Intersect, Preactivation, Relaxation
from optrelax.relaxations.zonotopes import ZonotopeFamily

__all__ = ["CAUSES", "EVERYWHERE", "expected_causes", "sources", "switch_functions"]

LOWER, UPPER, TIE = "l = 0", "u = 0", "|l| = |u|"
CAUSES = (LOWER, UPPER, TIE)
"""Causes of a jump by the index that `switch_functions` gives; of a ReLU's names, for any kink or tie."""
EVERYWHERE = "everywhere"


def switch_functions(network: Network, bounds: Preactivation) -> tuple[Tensor, Tensor]:
    """Values whose signs say which branch every neuron of every example is on, and the cause of each: [e], int [e]."""
    values, causes = [], []
    for name, b in bounds.items():
        activation = network[name].op
        if not isinstance(activation, PiecewiseLinear):  # its lines move with the bounds and never switch
            continue
        for kink in activation.kinks:
            values += [(b.lower - kink).flatten(), (b.upper - kink).flatten()]
            causes += [torch.zeros(b.lower.numel()), torch.ones(b.lower.numel())]
        for tie in _ties(activation, b):
            values.append(tie.flatten())
            causes.append(torch.full((tie.numel(),), 2.0))
    if not values:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
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


def sources(relaxation: Any, network: Network, region: Region) -> Iterator[Preactivation]:
    """Every set of pre-activation bounds on which lines of this relaxation, or of its parts, are chosen."""
    if isinstance(relaxation, Intersect):
        for part in relaxation.parts:
            yield from sources(part, network, region)
        return
    before = getattr(relaxation, "preactivation", None)
    if before is not None and isinstance(before, Relaxation):
        yield from sources(before, network, region)
        if not _refines(relaxation):
            return
    try:
        yield relaxation.preactivation_bounds(network, region)
    except NotImplementedError:  # a user's relaxation that states no pre-activation bounds
        return


def _refines(relaxation: Any) -> bool:
    """Whether a relaxation has bounds of its own beside those it starts from."""
    from optrelax.layers import Layerwise

    return isinstance(relaxation, Layerwise)


def expected_causes(relaxation: Any) -> frozenset[str] | None:
    """Where the paper says that the bound may jump in the weights; None for a relaxation that it does not know.

    Source: arXiv 2102.06700, table of relaxations and section 4; for LPs, continuity of the optimal value in
    continuous pre-activation bounds.
    """
    from optrelax.layers import Layerwise, Triangle

    if isinstance(relaxation, Intersect):
        parts = [expected_causes(part) for part in relaxation.parts]
        known = [part for part in parts if part is not None]
        return frozenset().union(*known) if len(known) == len(parts) else None
    if isinstance(relaxation, Box):
        return frozenset({EVERYWHERE} if relaxation.F is not None and relaxation.omega > 0 else ())
    if isinstance(relaxation, ZonotopeFamily):
        return frozenset(_of_band(relaxation))
    if isinstance(relaxation, FastLin):
        return _with_source(frozenset(), relaxation)
    if isinstance(relaxation, Crown):
        return _with_source(frozenset(_of_lines(relaxation)), relaxation)
    if isinstance(relaxation, Layerwise):
        return frozenset()
    if isinstance(relaxation, Triangle):
        return _with_source(frozenset(), relaxation)
    return None


def _with_source(own: frozenset[str], relaxation: Any) -> frozenset[str] | None:
    before = relaxation.preactivation
    if before is None:
        return own
    found = expected_causes(before)
    return None if found is None else own | found


def _of_band(relaxation: ZonotopeFamily) -> tuple[str, ...]:
    if relaxation.continuous:
        return ()
    jumps = {"chord": (), "box": (LOWER,), "diag": (UPPER,), "switch": (TIE,), "soft": ()}
    if relaxation.slope == "slanted":
        return () if relaxation.kappa == 1 else (LOWER,)
    return jumps[relaxation.slope]


def _of_lines(relaxation: Crown) -> tuple[str, ...]:
    if relaxation.continuous or relaxation.lower == "soft":
        return ()
    if relaxation.lower == "adaptive":
        return (TIE,)
    if relaxation.tria:
        return (LOWER, UPPER)
    return (LOWER,) if relaxation.lower == 0 else (UPPER,)
