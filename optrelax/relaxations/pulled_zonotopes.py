"""The zonotope family as rows pulled back, where that is cheaper than noise terms carried forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optrelax.domains import backsubstitution, frames, interval
from optrelax.domains.lines import Lines
from optrelax.domains.row_walks import Enclosure, dot
from optrelax.domains.zonotope_rows import frontier
from optrelax.enclosures import from_below, ordered
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations.base import LineRelaxation, Preactivation, identity_rows
from optrelax.relaxations.row_plans import MemoryBudget
from optrelax.relaxations.substitution import Substitution

__all__ = ["Bands", "PulledHybrid"]


@dataclass(frozen=True, kw_only=True)
class Bands(Substitution):
    """The zonotope family as back-substitution: parallel lines, so one row gives both bounds."""

    lines_of: LineRelaxation
    """Whose lines, to nearest."""

    parallel: ClassVar[bool] = True

    def refusal(self, activation: Activation) -> str | None:
        return self.lines_of.refusal(activation)

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        return self.lines_of.lines(activation, l, u)


@dataclass(frozen=True, kw_only=True)
class PulledHybrid(Substitution):
    """The hybrid zonotope with its shared noise as rows pulled back, and its interval part carried forward.

    Without errors of their own the noise terms see an affine map at every activation: the row of a neuron pulled back
    through the maps has the input's generators as coefficients. Values are to nearest, of networks without pooling.
    """

    lines_of: LineRelaxation

    parallel: ClassVar[bool] = True

    def refusal(self, activation: Activation) -> str | None:
        return self.lines_of.refusal(activation)

    def refines(self, network: Network) -> bool:
        return False

    def _layers(
        self, network: Network, region: Region, budget: MemoryBudget, start: Preactivation | None = None
    ) -> tuple[Preactivation, dict[str, Enclosure]]:
        bounds, maps, _ = self._hybrid(network, region, budget)
        return bounds, {**maps}

    def _hybrid(
        self, network: Network, region: Region, budget: MemoryBudget
    ) -> tuple[Preactivation, dict[str, Lines], dict[str, Tensor]]:
        """Pre-activation bounds, each activation's affine map (as two equal lines), half widths of interval parts."""
        known = _exact_sources(network, region)
        exact = interval.propagate(network, region, targets=known).balls
        bounds: Preactivation = {}
        maps: dict[str, Lines] = {}
        betas: dict[str, Tensor] = {}
        rows = self._rows(network, region, maps, None, budget)
        for node in network:
            if not node.activation:
                if any(name in betas for name in node.inputs):
                    zero = region.like.new_zeros(())
                    shapes = [(region.shape[0], *network.shape_of(name)) for name in node.inputs]
                    parts = [betas.get(n, zero.expand(s)) for n, s in zip(node.inputs, shapes, strict=True)]
                    assert node.affine, "pooled networks go forward"
                    betas[node.name] = node.affine.apply_abs(*parts)
                continue
            source = node.inputs[0]
            beta = betas.get(source)
            if source in known:
                before = exact[source].bounds
            else:
                shape = network.shape_of(source)
                plan = frames.plan(network, source) if region.shape[0] else None
                if plan is None:
                    eye = identity_rows(shape, region.like)
                    low, high = rows.ranges(source, eye)
                    low, high = low.reshape(-1, *shape), high.reshape(-1, *shape)
                else:
                    low, high = rows.windows(source, plan)
                before = ordered(low, high) if beta is None else ordered(low - beta, high + beta)
            band = self.lines_of.lines(node.activation, before.lower, before.upper)
            lam, shift = band.lower_slope, (band.lower_intercept + band.upper_intercept) / 2
            error = (band.upper_intercept - band.lower_intercept) / 2
            bounds[node.name] = before
            maps[node.name] = Lines(lam, shift, lam, shift)
            betas[node.name] = error if beta is None else error + lam.abs() * beta
        return bounds, maps, betas

    def _lower_bounds(self, network: Network, region: Region, rows: Tensor, budget: MemoryBudget) -> Tensor:
        _, maps, betas = self._hybrid(network, region, budget)
        shared = self._rows(network, region, maps, None, budget).lower(network.output, rows)
        front = backsubstitution.pull(
            network, network.output, rows, region.shape[0], {}, stop=frontier(network) - {network.input}
        )
        for name, a in front.stops.items():
            shared = shared - dot(a.abs(), betas[name])
        return from_below(shared)


def _exact_sources(network: Network, region: Region) -> frozenset[str]:
    """Inputs of activations whose interval is exact."""
    sources = {node.inputs[0] for node in network if node.activation}
    return frozenset(sources & interval.exact_nodes(network, region))
