"""`Triangle`: the triangle LP with closed-form pre-activation bounds (LP-LAST), one LP a row of the specification."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optrelax.layers.ascent.dual_ascent import DualAscent
from optrelax.layers.lots import solve_rows
from optrelax.layers.network_layer import NetworkLayer, network_layer
from optrelax.layers.network_lp import shared
from optrelax.layers.solutions import Solution
from optrelax.layers.starts import Warm
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Crown, Preactivation, Relaxation
from optrelax.relaxations.jumps import Jumps, joined
from optrelax.uncompiled import uncompiled


@network_layer
class Triangle(NetworkLayer):
    """The triangle relaxation as a differentiable LP layer, pre-activation bounds from a closed form (LP-LAST).

    Pools are composed of ReLUs, and what CROWN's own rule for them gives is taken where it is the tighter bound.

    Args:
        preactivation: a relaxation (or an intersection of several, the default: tight and continuous in the weights),
            its name, or the user's own bounds {path: Bounds}. Those may be tighter than the LP implies (from a MILP, or
            by branching): they are constraints, and where `solver` cannot tell the optimum under them, HiGHS does.
            Bounds that contradict each other have the status INFEASIBLE and the bound -inf.
        solver: `DualAscent` (default) or `InteriorPoint`; or, through the explicit LP of every example, in float64:
            `Highs`, `Cvxpy`, `PDHG`.
        gradient: `Envelope` (default) or `FixedSlopes`.
        throw: whether `solve` raises UnsolvedError unless all problems are OPTIMAL.

    Raises:
        TypeError: for what is no solver.
        ValueError: for an estimate as preactivation, or bounds that do not fit the network.

    Sound: yes, whatever the solver did.  Exact: the single-neuron convex relaxation, to the certified gap.
    Gradient: of the optimal value (`Envelope`), through weights, biases, region, specification and pre-activation
    bounds; continuous in the weights where those bounds are.
    Source: Ehlers 2017; Salman et al. 2019; arXiv 2102.06700v1.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> spec = ox.margins(torch.tensor([0]), classes=2)
        >>> found = Triangle(preactivation="crown").solve(net, region, spec)
        >>> bool(found.lower >= ox.lower_bounds(net, region, spec, "crown") - 1e-6)
        True
        >>> found.lower.sum().backward()
        >>> net[1].weight.grad.shape
        torch.Size([8, 4])
    """

    @property
    def monotone(self) -> bool:
        return bool(self.parts) and all(part.monotone for part in self.parts)

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(), *(part.jumps for part in self.parts)) if self.parts else None

    @property
    def deciding(self) -> Relaxation:
        solver = self.solver
        if not isinstance(solver, DualAscent) or solver.threshold is not None:
            return self
        return replace(self, solver=replace(solver, threshold=0.0))

    @uncompiled
    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        region, lowered = self.prepare(region), self.lowered(network)
        return shared(network, self.closed_form(lowered, region, self.budget(lowered, region, 0).source))

    def solve_flat(self, network: Network, region: Region, rows: Tensor, warm: Warm | None = None) -> Solution:
        region, lowered = self.prepare(region), self.lowered(network)
        budget = self.budget(lowered, region, rows.shape[1])
        preactivation = self.closed_form(lowered, region, budget.source)
        return beside_pools(
            self, network, region, rows, solve_rows(self, lowered, region, rows, preactivation, warm, budget)
        )


def beside_pools(layer: NetworkLayer, network: Network, region: Region, rows: Tensor, found: Solution) -> Solution:
    """A solution, row by row no looser than CROWN with its own rule for pools on the same pre-activation relaxation.

    Composed of ReLUs, a maximum's LP does not imply that it is at most the greatest upper bound of its entries.
    A bound above the LP's feasible point has the gap 0.  Gradient: of the bound taken.
    """
    if network.lowered is network or layer.source is None:
        return found
    crown = Crown(preactivation=layer.source, rounding=layer.rounding, max_bytes=layer.max_bytes)
    lower = torch.maximum(found.lower, crown.lower_bounds(network, region, rows))
    gained = (lower - found.lower).detach()
    gap = torch.where(gained.isfinite() & found.gap.isfinite(), (found.gap - gained).clamp_min(0), found.gap)
    return replace(found, lower=lower, gap=gap)
