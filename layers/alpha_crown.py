"""`AlphaCrown`: back-substitution with the slopes of all layers, intermediate ones included, optimised jointly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from optrelax import memory
from optrelax.checks import require_range
from optrelax.frozen import filled
from optrelax.layers.network_lp import shared
from optrelax.layers.slope_climb import ascend
from optrelax.layers.slope_rows import swept_numbers, windowed
from optrelax.layers.slope_search import SlopeSearch
from optrelax.networks.activations import Activation, Hull
from optrelax.networks.graph import Network
from optrelax.networks.ops import flatten_from
from optrelax.regions import Region
from optrelax.relaxations import Crown, Preactivation, Relaxation, limited, resolve_bound, with_rounding
from optrelax.uncompiled import uncompiled

_WINDOWED = 7
"""Numbers a parameter of a row's own: itself, its best, two moments, its gradient and what a step makes of them."""


@dataclass(frozen=True, kw_only=True)
class AlphaCrown(Relaxation):
    """CROWN whose lines are variables, one set a row of the specification and one a hidden neuron's bound.

    Of a piecewise-linear activation the line below (of two kinks also above) lies between two of its hull; of a smooth
    one both lines touch its envelope at a point that is sought, the chords included. Over several inflections, of a
    periodic function and at corners, smooth lines lie between CROWN's and one that holds the extreme value.

    Gradient ascent (Adam) on the sum of the lower bounds through the bounds of every layer; the best slopes of each
    example are kept. The start is CROWN's, so an example's sum is never below it; of piecewise-linear
    networks no bound exceeds the layerwise LP.
    Where pools and products are composed of other ops, CROWN with its own rules bounds every row beside.

    Args:
        iterations: gradient steps.
        step: size of the first.
        decay: factor an iteration.
        tol: share of all that an example has gained so far; gains up to it count for nothing.
        patience: iterations in a row that count for nothing, after which an example leaves.
        threshold: an example leaves as soon as all its bounds exceed it; None: never.
        preactivation: bounds that say which neurons cross, and that optimised ones never loosen.

    Raises:
        ValueError: for an option out of range, and for an estimate as preactivation.

    Sound: yes, at any slopes.  Gradient: that of the bound at the slopes found, through every layer.
    Source: Xu et al. 2021 (alpha-CROWN).

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.2)
        >>> ways = AlphaCrown(iterations=5), "crown"
        >>> found, crown = (ox.lower_bounds(net, region, torch.eye(2), way) for way in ways)
        >>> bool((found >= crown - 1e-6).all())
        True
    """

    iterations: int = 20
    step: float = 0.2
    decay: float = 0.9
    tol: float = 0.01
    patience: int = 4
    threshold: float | None = None
    preactivation: Relaxation = field(default_factory=Crown)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("AlphaCrown", ">= 0", iterations=self.iterations)
        require_range("AlphaCrown", "> 0", step=self.step)
        require_range("AlphaCrown", "in (0, 1]", decay=self.decay)
        require_range("AlphaCrown", ">= 0", tol=self.tol)
        require_range("AlphaCrown", ">= 1", patience=self.patience)
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("AlphaCrown: threshold must be a number, got nan")
        filled(self, preactivation=resolve_bound("AlphaCrown", self.preactivation))

    @property
    def parts(self) -> tuple[Relaxation, ...]:
        return (self.preactivation,)

    def neuron_hull(self, activation: Activation, l: Tensor, u: Tensor) -> Hull | None:
        return activation.hull(l, u)

    @uncompiled
    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        """Bounds whose slopes make the sum of all widths small."""
        return shared(network, self._bounded(network.lowered, region, None)[0])

    @uncompiled
    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        found = self._bounded(network.lowered, region, rows)[1]
        assert found is not None
        if network.lowered is network:
            return found
        source = self.preactivation
        crown = source if isinstance(source, Crown) else Crown(preactivation=source)
        crown = replace(crown, rounding=self.rounding, max_bytes=self.max_bytes)
        return torch.maximum(found, crown.lower_bounds(network, region, rows))

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        network = network.lowered
        return self.preactivation.bytes_needed(network, region, 0) + region.shape[0] * self._each(network, region, k)

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        network = network.lowered
        rows = memory.neuron_rows(network) + k
        slopes = region.dtype.itemsize * rows * memory.hidden_entries(network)
        first = self.preactivation.least_bytes(network, region, 0)
        return first + region.shape[0] * slopes + self._each(network, region, k)

    def _each(self, network: Network, region: Region, k: int, start: Preactivation | None = None) -> int:
        """Bytes of one example: parameters of every row, with Adam's moments, and what a gradient by them keeps.

        start: bounds that say which neurons cross; None: all do.
        """
        rows = {network.output: k}
        for node in network.activations:
            if node.inputs[0] in network.exact_intervals:
                continue
            neurons = math.prod(node.shape)
            if start is not None and region.shape[0]:
                b = start[node.name]
                crossing = node.op.crossing(b.lower, b.upper)
                neurons = int(flatten_from(crossing, 1).sum(1).max())
            rows[node.inputs[0]] = 2 * neurons
        total = 0
        for target, count in rows.items():
            found = None if torch.is_grad_enabled() else windowed(network, region, target)
            if found is None:
                total += count * swept_numbers(network)
            else:
                total += count * _WINDOWED * sum(seen.numbers for seen in found.weighed.values())
        return total * region.dtype.itemsize

    def _bounded(self, network: Network, region: Region, rows: Tensor | None) -> tuple[Preactivation, Tensor | None]:
        """The bounds, as many examples at a time as fit; of the others the slopes found are kept."""
        region = self.prepare(region)
        batch, k = region.shape[0], 0 if rows is None else rows.shape[1]
        source = self.preactivation.bytes_needed(network, region, 0)
        own = batch * self._each(network, region, k)
        most = memory.limit(self.max_bytes, source + own, region.device)
        room = math.inf if source + own <= most else most / 3
        given = self._given(network, region, room)
        if room < math.inf:
            own = batch * self._each(network, region, k, given)
        if room == math.inf or own <= most - room:
            search = SlopeSearch(network, region, given, rows)
            ascend(search, self)
            return search.evaluate(region, given, rows, self.outward)
        # The bounds that the pieces start from live beside them: a third for these.
        size = max(1, int((most - room) * batch // own))
        call = partial(self._piece, network)
        return memory.in_pieces(network, call, region, rows, size, again=False, given=given)

    def _piece(
        self, network: Network, region: Region, rows: Tensor | None, given: Preactivation
    ) -> tuple[Preactivation, Tensor | None]:
        """Slopes found once; bounds whose graph is made in the backward pass."""
        with torch.no_grad():
            search = SlopeSearch(network, region, given, rows)
            ascend(search, self)

        def evaluate() -> tuple[Preactivation, Tensor | None]:
            return search.evaluate(region, given, rows, self.outward)

        return memory.recomputed(network, evaluate)()

    def _given(self, network: Network, region: Region, room: float) -> Preactivation:
        source = limited(with_rounding(self.preactivation, self.rounding), room)
        return source.preactivation_bounds(network, region)
