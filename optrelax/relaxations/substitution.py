"""What relaxations by back-substitution share: layer by layer, each bounded by rows through the layers before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from optrelax import memory
from optrelax.domains import backsubstitution, interval
from optrelax.domains import lines as named
from optrelax.domains.balls import Ball
from optrelax.domains.lines import Lines
from optrelax.domains.passes.line_maps import LineMaps
from optrelax.domains.planes import Planes, outward_planes, product_planes, square_planes
from optrelax.domains.row_walks import Enclosure
from optrelax.enclosures import Bounds
from optrelax.frozen import filled
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.networks.products import Operand
from optrelax.regions import Region
from optrelax.relaxations.base import (
    LineRelaxation,
    Preactivation,
    Relaxation,
    limited,
    pooled,
    with_rounding,
)
from optrelax.relaxations.registry import resolve, resolve_bound
from optrelax.relaxations.row_bounds import RowBounds
from optrelax.relaxations.row_plans import MemoryBudget, RowPlans


@dataclass(frozen=True, kw_only=True)
class Substitution(LineRelaxation):
    """Shared by every relaxation by back-substitution: lines, and a source of pre-activation bounds."""

    preactivation: Relaxation | str | None = None
    """Another relaxation (or its name) for the pre-activation bounds; None: this method's own, layer by layer."""

    parallel: ClassVar[bool] = False
    """Whether both lines of every piecewise-linear activation share their slope."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preactivation is not None:
            filled(self, preactivation=resolve_bound(type(self).__name__, self.preactivation))

    @property
    def parts(self) -> tuple[Relaxation, ...]:
        return () if self.preactivation is None else (resolve(self.preactivation),)

    def _lines(self, activation: Activation, before: Bounds) -> Lines:
        lines = self.lines(activation, before.lower, before.upper)
        return named.outward_lines(lines, activation, before.lower, before.upper) if self.outward else lines

    def preactivation_bounds(self, network: Network, region: Region) -> Preactivation:
        if self.preactivation is not None:
            return self._given(network, region, math.inf if self.max_bytes is None else self.max_bytes)
        self.require_supported(network)
        region = self.prepare(region)
        size, budget = self._cut(network, region, 0)
        if size < region.shape[0]:
            whole = replace(self, max_bytes=budget.limit)
            return memory.in_pieces(network, lambda r, _: whole.preactivation_bounds(network, r), region, None, size)
        return self._layers(network, region, budget)[0]

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        self.require_supported(network)
        region = self.prepare(region)
        size, budget = self._cut(network, region, rows.shape[1])
        if size < region.shape[0]:
            whole = replace(self, max_bytes=budget.limit)
            return memory.in_pieces(network, partial(whole.lower_bounds, network), region, rows, size)
        return self._lower_bounds(network, region, rows, budget)

    def _lower_bounds(self, network: Network, region: Region, rows: Tensor, budget: MemoryBudget) -> Tensor:
        """Lower bounds of rows, the examples not cut any more."""
        _, lines = self._layers(network, region, budget)
        return self._of_rows(network, region, rows, lines, budget)

    def _of_rows(
        self, network: Network, region: Region, rows: Tensor, lines: Mapping[str, Enclosure], budget: MemoryBudget
    ) -> Tensor:
        magnitude = None
        if self.outward:
            magnitude = self._magnitude(network, interval.propagate(network, region, rounding="outward").balls)
        return self._rows(network, region, lines, magnitude, budget).lower(network.output, rows)

    def _rows(
        self,
        network: Network,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        budget: MemoryBudget,
    ) -> RowBounds:
        """What bounds rows through these lines."""
        return RowBounds(self._plans(network, region), lines, magnitude, budget.rows)

    def _plans(self, network: Network, region: Region) -> RowPlans:
        return RowPlans(network, region, self.outward, self._one_row(network))

    def _given(self, network: Network, region: Region, room: float) -> Preactivation:
        """The pre-activation bounds of the relaxation they come from."""
        (source,) = self.parts
        return limited(with_rounding(source, self.rounding), room).preactivation_bounds(network, region)

    def refines(self, network: Network) -> bool:
        """Whether `refine` may be asked: where all lines are chosen at bounds of this relaxation's own."""
        return self.preactivation is None and not pooled(network)

    def refine(
        self, network: Network, region: Region, start: Preactivation, rows: Tensor | None
    ) -> tuple[Preactivation, Tensor | None]:
        """Pre-activation bounds and lower bounds of rows, where bounds are known that hold already.

        Only neurons that cross in these are bounded, and keep the better of both ends; their lines, too, are chosen
        there.  rows [batch or 1, k, *output_shape] or None -> [batch, k].
        """
        self.require_supported(network)
        region = self.prepare(region)
        size, budget = self._cut(network, region, 0 if rows is None else rows.shape[1])
        if size < region.shape[0]:
            whole = replace(self, max_bytes=budget.limit)

            def piece(some: Region, own: Tensor | None, before: Preactivation) -> tuple[Preactivation, Tensor | None]:
                return whole.refine(network, some, before, own)

            return memory.in_pieces(network, piece, region, rows, size, given=start)
        bounds, lines = self._layers(network, region, budget, start)
        return bounds, None if rows is None else self._of_rows(network, region, rows, lines, budget)

    def _layers(
        self, network: Network, region: Region, budget: MemoryBudget, start: Preactivation | None = None
    ) -> tuple[Preactivation, dict[str, Enclosure]]:
        """Pre-activation bounds and lines of every activation (and of poolings, the bounds they read)."""
        given = None if self.preactivation is None else self._given(network, region, budget.source)
        enough = _without_rows(network, region, given)
        # Outward rounding wants the sizes of all values.
        narrow = interval.narrow_sources(network)
        targets = None if self.outward else enough | narrow
        balls = interval.propagate(network, region, rounding=self.rounding, targets=targets).balls
        magnitude = self._magnitude(network, balls)
        bounds: Preactivation = {}
        known: dict[str, Bounds] = {}
        lines = LineMaps()
        rows = self._rows(network, region, lines, magnitude, budget)
        for node in network:
            if node.affine:
                continue
            for source in node.inputs:
                if source in known:
                    continue
                if given is not None and node.name in given:
                    known[source] = given[node.name]
                elif source in enough:
                    known[source] = balls[source].bounds
                else:
                    first = None if start is None else start.get(node.name)
                    known[source] = rows.both(source) if first is None else rows.refined(node, first)
                    if source in narrow:
                        known[source] = known[source].intersect(balls[source].bounds)
            before = known[node.inputs[0]]
            if node.maximum:
                lines[node.name] = before
            elif node.product:
                lines[node.name] = self._planes(before, known[node.inputs[1]], node.inputs[0] == node.inputs[1])
            elif node.activation:
                bounds[node.name] = before
                lines[node.name] = self._lines(node.activation, before)
                if node.of(Operand):
                    known[node.name] = before
        return bounds, lines

    def _planes(self, x: Bounds, y: Bounds, same: bool) -> Planes:
        """Planes of a product: the even mixture of each side's, which is flattest where nothing says otherwise."""
        planes = square_planes(x) if same else product_planes(x, y)
        return outward_planes(planes, x, y, same) if self.outward else planes

    def _magnitude(self, network: Network, balls: Mapping[str, Ball]) -> dict[str, Tensor] | None:
        return backsubstitution.magnitudes(network, balls) if self.outward else None

    def _one_row(self, network: Network) -> bool:
        """Whether one row gives both bounds of a neuron: parallel lines, to nearest, no pooling."""
        return self.parallel and not self.outward and not pooled(network)

    # --- memory ---

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        return sum((self._source_bytes(network, region), *self._bytes(network, region, k)))

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        source = sum(part.least_bytes(network, region, 0) for part in self.parts)
        plans = self._plans(network, region)
        return source + plans.example_bytes + plans.least_bytes(self._targets(network, region))

    def _bytes(self, network: Network, region: Region, k: int) -> tuple[int, int]:
        """Bytes of bounds, lines and room for products, and of the rows of every node that is bounded by them."""
        plans = self._plans(network, region)
        return region.shape[0] * plans.example_bytes, plans.row_bytes(self._targets(network, region), k)

    def _cut(self, network: Network, region: Region, k: int) -> tuple[float, MemoryBudget]:
        """Examples at a time, and the memory for each part of the work."""
        source = self._source_bytes(network, region)
        fixed, pulled = self._bytes(network, region, k)
        need = source + fixed + pulled
        most = memory.limit(self.max_bytes, need, region.device)
        if need <= most:
            return math.inf, MemoryBudget(most, math.inf, math.inf)
        for_source, own = memory.shares(most, [source, fixed + pulled])
        if region.shape[0] > 1 and fixed > own / 2:
            return max(1, own / 2 * region.shape[0] // fixed), MemoryBudget(most, for_source, own)
        return math.inf, MemoryBudget(most, for_source, own - fixed)

    def _source_bytes(self, network: Network, region: Region) -> int:
        return sum(part.bytes_needed(network, region, 0) for part in self.parts)

    def _targets(self, network: Network, region: Region) -> list[str]:
        """Nodes whose entries are bounded by rows."""
        sources = [name for node in network if not node.affine for name in node.inputs]
        if self.preactivation is not None:
            return []
        known = interval.exact_nodes(network, region)
        return [name for name in dict.fromkeys(sources) if name not in known]


def _without_rows(network: Network, region: Region, given: Preactivation | None) -> frozenset[str]:
    """Nodes whose intervals do: where these are exact, and before poolings and products where bounds are given."""
    nodes = [n for n in network if not n.affine and not (given and n.name in given)]
    loose = {i for n in nodes if given is not None and not n.activation for i in n.inputs}
    return frozenset(loose | {i for n in nodes for i in n.inputs} & interval.exact_nodes(network, region))
