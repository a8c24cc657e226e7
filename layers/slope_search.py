"""The search of `AlphaCrown`: parameters of every row that is bounded, moved by gradients that are written by hand.

Rows are those of the specification and, up and down, of every hidden neuron that crosses. Where compiled passes take
them (`domains/passes`), a row has parameters for the window that it sees; elsewhere for whole activations, in sweeps
of `layers.problems`. What is optimised is a list of `Parameter`: a new kind is one more entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from optrelax.domains import interval
from optrelax.domains.passes import running
from optrelax.domains.passes.line_maps import MixedMaps
from optrelax.domains.passes.neurons import Neurons, rows_of_examples
from optrelax.enclosures import Bounds, ordered
from optrelax.layers.hulls import HullLines, hull_lines, hulls_at, mix, product_hull
from optrelax.layers.problems import DualPoint, Problems
from optrelax.layers.slope_rows import BoundedRows, Parameter, lot, windowed
from optrelax.layers.starts import crown_start
from optrelax.layers.sweeps import backward_sweep, dual_value
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.networks.ops import flatten_from
from optrelax.regions import Region
from optrelax.relaxations import Preactivation

_SIDES = {"below": -1.0, "above": 1.0}
_OUTPUT = "output of the network"


class SlopeSearch:
    """Everything that is bounded of a batch of examples."""

    def __init__(self, network: Network, region: Region, given: Preactivation, rows: Tensor | None) -> None:
        self.network, self.region = network, region.detach()
        self.given = {name: Bounds.known(b.lower.detach(), b.upper.detach()) for name, b in given.items()}
        self.rows = None if rows is None else rows.detach()
        self.searching = False
        crown = crown_start(network, self.given, hulls_at(network, self.given))
        self.targets: dict[str, BoundedRows] = {}
        known = interval.exact_nodes(network, region)
        for node in network.activations:
            source, b = node.inputs[0], self.given[node.name]
            if source in known:
                continue
            assert node.activation
            crossing = node.op.crossing(b.lower, b.upper)
            if bool(crossing.any()):
                self.targets[node.name] = self._started(self._hidden(source, crossing), crown)
        if rows is not None:
            self.targets[_OUTPUT] = self._started(self._output(rows), crown)

    # --- what is bounded ---

    def _hidden(self, source: str, crossing: Tensor) -> BoundedRows:
        program = windowed(self.network, self.region, source)
        if program is not None:
            neurons, index = program.some_neurons(crossing)
            return BoundedRows(source, neurons, index, program)
        example, entry = flatten_from(crossing, 1).nonzero(as_tuple=True)
        n = math.prod(crossing.shape[1:])
        place = torch.zeros(2 * len(example), 3, dtype=torch.int64, device=example.device)
        place[:, 0] = example.repeat_interleave(2)
        neurons = Neurons(place, torch.stack([entry, entry + n], 1).flatten())
        return BoundedRows(source, neurons, crossing.nonzero(as_tuple=True), None)

    def _output(self, rows: Tensor) -> BoundedRows:
        output, batch = self.network.output, self.region.shape[0]
        neurons = rows_of_examples(rows.shape[0], rows.shape[1], batch, self.region.device)
        return BoundedRows(output, neurons, (), windowed(self.network, self.region, output))

    def _started(self, target: BoundedRows, crown: DualPoint) -> BoundedRows:
        """With CROWN's choice for every row."""
        program, wanted = target.program, self.network.ancestors(target.node)
        for kind, part in (("alpha", crown.alpha), ("beta", crown.beta)):
            for name, t in part.items():
                if program is not None and name in program.activations:
                    target.parameters.append(Parameter(kind, name, program.seen_by(name, t, target.neurons)))
                elif program is None and name in wanted:
                    target.parameters.append(Parameter(kind, name, t[target.example]))
        for node in self.network.activations:
            op, name = node.op, node.name
            for kind, sign in _SIDES.items() if op.slides and name in wanted else ():
                share = op.closest_share(self.given[name].lower, self.given[name].upper, sign)
                target.parameters.append(Parameter(kind, name, share[target.example]))
        return target

    # --- bounding ---

    def evaluate(
        self, region: Region, given: Preactivation, rows: Tensor | None, outward: bool
    ) -> tuple[Preactivation, Tensor | None]:
        """Bounds of every layer at the parameters, and of the rows; differentiable."""
        bounds: Preactivation = {}
        hulls: dict[str, HullLines] = {}
        lines = MixedMaps(constant=self.searching)

        def value(target: BoundedRows, rows: Tensor) -> Tensor:
            if target.program is None or outward:
                found = self._swept(target, rows, region, bounds, hulls, outward)
            else:
                found = running.lower_bounds(
                    target.program, self.network, rows, target.neurons, region, lines, weights=target.values("alpha")
                )
            # What overflows is no bound.
            return torch.where(found.detach().isfinite(), found, -torch.inf)

        for node in self.network.relaxed:
            if not node.activation:
                hulls[node.name] = product_hull(*(bounds[name] for name in node.inputs))
                continue
            before, target = given[node.name], self.targets.get(node.name)
            if target is not None:
                unit = self._unit(target, before, outward)
                before = self._tightened(before, target.index, value(target, unit))
            bounds[node.name] = before
            hulls[node.name] = h = hull_lines(node.op, before)
            if h.above1 is None:
                lines.add(node.name, h.below0, h.below1, h.above0)  # type: ignore[arg-type]
        if rows is None:
            return bounds, None
        return bounds, value(self.targets[_OUTPUT], rows).reshape(region.shape[0], rows.shape[1])

    def _unit(self, target: BoundedRows, before: Bounds, outward: bool) -> Tensor:
        """Rows up and down, as the way that they take wants them."""
        if target.program is not None and not outward:
            return target.program.unit_rows(before.lower.shape[1:], before.lower, target.neurons.entries)
        n = math.prod(before.lower.shape[1:])
        flat = before.lower.new_zeros(len(target.example), n)
        at = target.index[0] * 0  # entries of the neurons in their flat activation
        for t, size in zip(target.index[1:], before.lower.shape[1:], strict=True):
            at = at * size + t
        sign = flat.new_tensor([1.0, -1.0]).repeat(len(at))
        flat[torch.arange(len(flat), device=flat.device), at.repeat_interleave(2)] = sign
        return flat.reshape(1, -1, *before.lower.shape[1:])

    def _swept(
        self,
        target: BoundedRows,
        rows: Tensor,
        region: Region,
        bounds: Preactivation,
        hulls: Mapping[str, HullLines],
        outward: bool,
    ) -> Tensor:
        """By sweeps through whole activations: every region, activation and rounding."""
        wanted, example = self.network.ancestors(target.node), target.example
        flat = rows.flatten(0, 1)
        if target.node == self.network.output and not target.index:
            flat = flat[target.neurons.which]
        picked = {name: h for name, h in hulls.items() if name in wanted}
        before = {name: b for name, b in bounds.items() if name in wanted}

        def some(rows: Tensor) -> Tensor:
            own = example[rows]
            lines = {name: h.select(own) for name, h in picked.items()}
            part = target.part(rows)
            dual = self._shaped(part.whole(), lines)
            lines = {name: self._slid(name, h, dual, part) for name, h in lines.items()}
            problems = Problems(self.network, target.node, flat[rows], region.select(own), lines)
            if not outward:
                return backward_sweep(problems, dual).value
            known = {n: Bounds.known(b.lower[own], b.upper[own]) for n, b in before.items()}
            return dual_value(problems, dual, "outward", known)

        size = len(example) if torch.is_grad_enabled() else lot(self.network, region)
        return torch.cat([some(rows) for rows in torch.arange(len(example), device=example.device).split(max(1, size))])

    def _slid(self, name: str, h: HullLines, dual: DualPoint, part: BoundedRows) -> HullLines:
        """Of a curved function the lines that touch it where each row says; its mixed lines where none do."""
        if name not in part.values("below"):
            return h
        op, (l, u) = self.network[name].op, h.before
        assert isinstance(op, Activation)
        found = []
        for kind, mixed in (
            ("below", mix(h.below0, h.below1, dual.alpha[name])),
            ("above", mix(h.above0, h.above1, dual.beta.get(name))),
        ):
            (slope, intercept), there = op.supporting(l, u, part.values(kind)[name], _SIDES[kind])
            found.append((torch.where(there, slope, mixed[0]), torch.where(there, intercept, mixed[1])))
        below, above = found
        return replace(h, below0=below, below1=below, above0=above, above1=None)

    def _shaped(self, dual: DualPoint, hulls: Mapping[str, HullLines]) -> DualPoint:
        """Weights in the shapes of their activations; where rows see nothing any will do."""
        alpha = {}
        for name, h in hulls.items():
            t = dual.alpha.get(name)
            alpha[name] = torch.zeros_like(h.below0[0]) if t is None else t.reshape(h.free.shape)
        return replace(dual, alpha=alpha)

    def _tightened(self, before: Bounds, index: tuple[Tensor, ...], value: Tensor) -> Bounds:
        """The better of known bounds and those found for some neurons, up and down."""
        low, high = value.view(-1, 2).unbind(1)
        floor, ceiling = before.lower[index], before.upper[index]
        if self.searching:
            # At the start both agree to rounding, and the slopes of a bound that loses get no gradient: near ties go
            # to the optimised bound, sound as well.
            slack = 1e-6 * (ceiling - floor)
            floor, ceiling = floor - slack, ceiling + slack
        tight = ordered(torch.where(low >= floor, low, floor), torch.where(-high <= ceiling, -high, ceiling))
        return Bounds.known(before.lower.index_put(index, tight.lower), before.upper.index_put(index, tight.upper))

    def select(self, examples: Tensor) -> tuple[SlopeSearch, dict[str, Tensor]]:
        """Of some examples, a mask; and which rows of each target these are."""
        found = copy(self)
        renumbered = examples.cumsum(0) - 1
        found.region = self.region.select(examples)
        found.given = {name: Bounds.known(b.lower[examples], b.upper[examples]) for name, b in self.given.items()}
        rows = {name: examples[t.example].nonzero()[:, 0] for name, t in self.targets.items()}
        found.targets = {name: t.select(rows[name], examples, renumbered) for name, t in self.targets.items()}
        return found, rows
