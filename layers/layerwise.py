"""`Layerwise`: exact layerwise linear programs (LP-ALL): every crossing neuron's bounds by LP, layer by layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from optrelax import memory
from optrelax.domains import interval
from optrelax.enclosures import Bounds, ordered
from optrelax.layers.layer_memory import LayerBudget
from optrelax.layers.lots import solve_problems, solve_rows
from optrelax.layers.network_layer import NetworkLayer, network_layer
from optrelax.layers.network_lp import shared
from optrelax.layers.solutions import Solution
from optrelax.layers.starts import Warm
from optrelax.layers.triangle import beside_pools
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import flatten_from
from optrelax.regions import Region
from optrelax.relaxations import Preactivation
from optrelax.relaxations.jumps import Jumps
from optrelax.uncompiled import uncompiled

_PIECE_BYTES = 512 * 2**20  # data of the neuron LPs in flight, at most


@network_layer
class Layerwise(NetworkLayer):
    """The exact layerwise triangle LP as a differentiable layer (LP-ALL).

    Pre-activation bounds of every hidden layer are themselves LP optima on the layers before; only neurons that cross
    under the bounds so far are solved, stable ones keep what they came with, and nothing gets looser.

    Args:
        preactivation: the closed form that says which neurons cross.
        solver: as for `Triangle`.
        gradient: as for `Triangle`.
        throw: as for `Triangle`.

    Raises:
        TypeError: as `Triangle`.
        ValueError: as `Triangle`.

    Sound: yes.  Exact: the convex barrier of single-neuron relaxations (Salman et al. 2019), to the solver's gap.
    Gradient: of the optimal value, through the LPs of earlier layers too; continuous in the weights.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> all_layers, last = (layer.solve(net, region, torch.eye(2)).lower for layer in (Layerwise(), Triangle()))
        >>> bool((all_layers >= last - 1e-3).all())
        True
    """

    tightens: ClassVar[bool] = True

    @property
    def monotone(self) -> bool:
        return True

    @property
    def jumps(self) -> Jumps:
        return frozenset()

    @uncompiled
    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        region, lowered = self.prepare(region), self.lowered(network)
        return shared(network, self.refine(lowered, region, self.budget(lowered, region, 0)))

    def solve_flat(self, network: Network, region: Region, rows: Tensor, warm: Warm | None = None) -> Solution:
        region, lowered = self.prepare(region), self.lowered(network)
        budget = self.budget(lowered, region, rows.shape[1])
        bounds = self.refine(lowered, region, budget)
        found = beside_pools(self, network, region, rows, solve_rows(self, lowered, region, rows, bounds, warm, budget))
        return replace(found, preactivation=shared(network, bounds))

    def problem_count(self, network: Network, batch: int, k: int) -> int:
        """As if every neuron crossed."""
        return batch * (memory.neuron_rows(network) + k)

    def refine(self, network: Network, region: Region, budget: LayerBudget) -> Preactivation:
        """Pre-activation bounds of every activation: LP optima where the neuron crosses."""
        given = self.closed_form(network, region, budget.source)
        balls = interval.propagate(network, region, rounding=self.rounding).balls
        known = interval.exact_nodes(network, region)
        bounds: Preactivation = {}
        for node in network.activations:
            source = node.inputs[0]
            before = given[node.name]
            if source in known:
                # Nothing relaxed lies before: the interval is the LP's optimum.
                exact = balls[source].bounds
                bounds[node.name] = self._tighten(before, exact.lower, exact.upper)
            else:
                bounds[node.name] = self._solve_neurons(network, region, node, before, bounds, budget)
        return bounds

    def _solve_neurons(
        self,
        network: Network,
        region: Region,
        node: Node,
        before: Bounds,
        bounds: Preactivation,
        budget: LayerBudget,
    ) -> Bounds:
        """Both LPs of every crossing neuron of one activation, on the bounds of the layers before."""
        activation = node.op
        lower, upper = flatten_from(before.lower, 1), flatten_from(before.upper, 1)
        crossing = activation.crossing(lower.detach(), upper.detach())  # type: ignore[union-attr]
        example, neuron = crossing.nonzero(as_tuple=True)
        if example.numel() == 0:
            return before
        source = node.inputs[0]
        shape = network.shape_of(source)
        lows, highs = [], []
        for piece in torch.arange(example.numel(), device=example.device).split(self._piece(network, region, budget)):
            rows = lower.new_zeros(piece.numel(), math.prod(shape))
            rows[torch.arange(piece.numel(), device=rows.device), neuron[piece]] = 1
            both = torch.cat([rows, -rows]).reshape(-1, *shape)
            owner = example[piece].repeat(2)
            found = solve_problems(self, network, source, both, region, bounds, owner, None, budget).lower
            low, high = found.chunk(2)
            lows.append(low)
            highs.append(-high)
        place = (example, neuron)
        tight = self._tighten(Bounds(lower[place], upper[place]), torch.cat(lows), torch.cat(highs))
        return Bounds(
            lower.index_put(place, tight.lower).reshape(before.lower.shape),
            upper.index_put(place, tight.upper).reshape(before.upper.shape),
        )

    def _tighten(self, before: Bounds, lower: Tensor, upper: Tensor) -> Bounds:
        """Bounds intersected with what was found for them.

        Two sound enclosures part by rounding alone, and `ordered` keeps the gap between them. Given bounds may
        contradict the network: they stay as they are there, so that the LP of the output finds the contradiction.
        """
        low, high = torch.maximum(before.lower, lower), torch.minimum(before.upper, upper)
        if self.given is None:
            return ordered(low, high)
        empty = low.detach() > high.detach()
        return Bounds(torch.where(empty, before.lower, low), torch.where(empty, before.upper, high))

    def _piece(self, network: Network, region: Region, budget: LayerBudget) -> int:
        """Neurons whose two LPs are laid out at once."""
        hidden = sum(math.prod(n.shape) for n in network.activations)
        each = 2 * region.dtype.itemsize * (4 * math.prod(network.input_shape) + 16 * hidden)
        return max(1, int(min(_PIECE_BYTES // each, budget.lot // 2)))
