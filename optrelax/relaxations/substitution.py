"""Relaxations by back-substitution: CROWN and its forms, CROWN-IBP, Fast-Lin, and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from optrelax import memory, memory_counts
from optrelax.domains import backsubstitution, frames, interval
from optrelax.domains import lines as named
from optrelax.domains.backsubstitution import Enclosure
from optrelax.domains.balls import Ball
from optrelax.domains.frames import Plan
from optrelax.domains.lines import Lines, LowerSlope
from optrelax.domains.passes import planning, running
from optrelax.domains.passes.line_maps import LineMaps
from optrelax.domains.passes.neurons import rows_of_examples
from optrelax.domains.passes.programs import Program
from optrelax.domains.planes import Planes, outward_planes, product_planes, square_planes
from optrelax.enclosures import Bounds, from_below, ordered
from optrelax.errors import require_number
from optrelax.kernels.relax_step import kernels as relax_step_kernels
from optrelax.kernels.triton_steps import passes as step_passes
from optrelax.networks.activations import Activation, PiecewiseLinear
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine
from optrelax.networks.products import Multiply, Operand
from optrelax.regions import Region
from optrelax.relaxations.base import (
    LineRelaxation,
    Preactivation,
    Relaxation,
    identity_rows,
    limited,
    pooled,
    with_rounding,
)
from optrelax.relaxations.box import Box
from optrelax.relaxations.jumps import LOWER, TIE, UPPER, Jumps, joined
from optrelax.relaxations.registry import name_of, resolve


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
            source = resolve(self.preactivation)
            if not source.sound:
                raise ValueError(f"{type(self).__name__}: preactivation {name_of(source)} is an estimate, not a bound")
            object.__setattr__(self, "preactivation", source)

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
            whole = replace(self, max_bytes=_whole_bytes(budget))
            return memory.in_pieces(network, lambda r, _: whole.preactivation_bounds(network, r), region, None, size)
        return self._layers(network, region, budget)[0]

    def lower_bounds(self, network: Network, region: Region, rows: Tensor) -> Tensor:
        self.require_supported(network)
        region = self.prepare(region)
        size, budget = self._cut(network, region, rows.shape[1])
        if size < region.shape[0]:
            whole = replace(self, max_bytes=_whole_bytes(budget))
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
        return self._substitute(network, network.output, rows, region, lines, magnitude, budget.rows)

    def _given(self, network: Network, region: Region, room: float) -> Preactivation:
        """The pre-activation bounds of the relaxation they come from."""
        assert self.preactivation is not None
        source = with_rounding(resolve(self.preactivation), self.rounding)
        return limited(source, room).preactivation_bounds(network, region)

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
            whole = replace(self, max_bytes=_whole_bytes(budget))

            def piece(some: Region, own: Tensor | None, before: Preactivation) -> tuple[Preactivation, Tensor | None]:
                return whole.refine(network, some, before, own)

            found: tuple[Preactivation, Tensor | None] = memory.in_pieces(
                network, piece, region, rows, size, given=start
            )
            return found
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
        for node in network:
            if isinstance(node.op, Affine):
                continue
            for source in node.inputs:
                if source in known:
                    continue
                if given is not None and node.name in given:
                    known[source] = given[node.name]
                elif source in enough:
                    known[source] = balls[source].bounds
                else:
                    if start is not None and node.name in start:
                        known[source] = self._refined(
                            network, node, region, lines, magnitude, start[node.name], budget.rows
                        )
                    else:
                        known[source] = self._both(network, source, region, lines, magnitude, budget.rows)
                    if source in narrow:
                        known[source] = known[source].intersect(balls[source].bounds)
            before = known[node.inputs[0]]
            if isinstance(node.op, Greatest):
                lines[node.name] = before
            elif isinstance(node.op, Multiply):
                lines[node.name] = self._planes(before, known[node.inputs[1]], node.inputs[0] == node.inputs[1])
            else:
                bounds[node.name] = before
                lines[node.name] = self._lines(node.op, before)
                if isinstance(node.op, Operand):
                    known[node.name] = before
        return bounds, lines

    def _planes(self, x: Bounds, y: Bounds, same: bool) -> Planes:
        """Planes of a product: the even mixture of each side's, which is flattest where nothing says otherwise."""
        planes = square_planes(x) if same else product_planes(x, y)
        return outward_planes(planes, x, y, same) if self.outward else planes

    def _magnitude(self, network: Network, balls: Mapping[str, Ball]) -> dict[str, Tensor] | None:
        return backsubstitution.magnitudes(network, balls) if self.outward else None

    def _both(
        self,
        network: Network,
        source: str,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        room: float,
    ) -> Bounds:
        """Lower and upper bounds of every entry of a node."""
        found = self._program(network, source, region, lines)
        if found is not None:
            return ordered(*self._every_neuron(found, network, region, lines, room))
        # Without examples there is no telling how many places a window's rows belong to.
        plan = frames.plan(network, source) if region.shape[0] else None
        if plan is not None:
            return ordered(*self._windows(network, source, plan, region, lines, magnitude, room))
        shape = network.shape_of(source)
        eye = identity_rows(shape, region.like)
        if self._parallel(network, lines):
            low, high = self._ranges(network, source, eye, region, lines, room)
            return ordered(low.reshape(-1, *shape), high.reshape(-1, *shape))
        both = self._substitute(network, source, torch.cat([eye, -eye], 1), region, lines, magnitude, room)
        n = eye.shape[1]
        return ordered(both[:, :n].reshape(-1, *shape), -both[:, n:].reshape(-1, *shape))

    def _refined(
        self,
        network: Network,
        node: Node,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        known: Bounds,
        room: float,
    ) -> Bounds:
        """The better of known bounds and this relaxation's, which bounds the neurons alone that cross in them."""
        source, shape = node.inputs[0], known.lower.shape
        if not isinstance(node.op, PiecewiseLinear):  # it is curved wherever it is
            return known.intersect(self._both(network, source, region, lines, magnitude, room))
        crossing = node.op.crossing(known.lower.detach(), known.upper.detach())
        if not bool(crossing.any()):
            return known
        found = self._program(network, source, region, lines)
        if found is None:
            both = self._few(network, source, region, lines, magnitude, crossing, room)
            low = torch.where(crossing, torch.maximum(both.lower, known.lower), known.lower)
            return ordered(low, torch.where(crossing, torch.minimum(both.upper, known.upper), known.upper))
        rows = found.unit_rows(shape[1:], region.like)
        neurons, index = found.some_neurons(crossing)
        value = running.lower_bounds(found, network, rows, neurons, region, lines, room).view(-1, 2)
        low, high = known.lower[index], known.upper[index]
        tight = ordered(torch.maximum(value[:, 0], low), torch.minimum(-value[:, 1], high))
        return Bounds.known(known.lower.index_put(index, tight.lower), known.upper.index_put(index, tight.upper))

    def _few(
        self,
        network: Network,
        source: str,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        wanted: Tensor,
        room: float,
    ) -> Bounds:
        """Bounds of the wanted entries of a node, anything elsewhere: as many rows an example as one wants at most."""
        shape, batch = network.shape_of(source), region.shape[0]
        flat = wanted.flatten(1)
        most = int(flat.sum(1).amax())
        plan = frames.plan(network, source)
        # Rows that all places share, or all examples, cost less each.
        if most > flat.shape[1] // (2 if plan is None else 4):
            return self._both(network, source, region, lines, magnitude, room)
        entries = flat.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        if plan is None:
            rows = region.like.new_zeros(batch, most, flat.shape[1]).scatter(2, entries[..., None], 1.0)
            rows = rows.reshape(batch, most, *shape)
            if self._parallel(network, lines):
                low, high = self._ranges(network, source, rows, region, lines, room)
            else:
                both = self._substitute(network, source, torch.cat([rows, -rows], 1), region, lines, magnitude, room)
                low, high = both[:, :most], -both[:, most:]
        else:
            pixels = shape[1] * shape[2]
            channel, pixel = entries // pixels, entries % pixels
            places = torch.stack([pixel // shape[2], pixel % shape[2]], -1)
            eye = torch.eye(shape[0], dtype=region.dtype, device=region.device)
            low, high = self._places(network, source, plan, eye[channel], places, region, lines, magnitude, room)
        ends = []
        for end in (low, high):
            ends.append(end.new_zeros(batch, flat.shape[1]).scatter(1, entries, end).reshape(batch, *shape))
        return Bounds.known(*ends)

    def _places(
        self,
        network: Network,
        source: str,
        plan: Plan,
        rows: Tensor,
        places: Tensor,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        room: float,
    ) -> tuple[Tensor, Tensor]:
        """Both bounds of one row a place: rows [batch, n, channels], places [batch, n, 2] -> [batch, n] each."""
        one_row = self._parallel(network, lines)

        def part(some: Tensor, where: Tensor) -> Tensor:
            own = some.flatten(0, 1)[:, None, None, None]
            if one_row:
                both = backsubstitution.substitute_both(network, source, own, region, lines, plan=plan, places=where)
                return torch.stack(both)
            own = torch.cat([own, -own], 1)
            found = backsubstitution.substitute(
                network, source, own, region, lines, magnitude=magnitude, plan=plan, places=where
            )
            low, high = found.unflatten(1, (-1, 2)).unbind(2)
            return torch.stack([low, -high])

        sides = 1 if one_row else 2
        each = frames.pull(network, plan, region.shape[0], sides, outward=self.outward).whole
        each *= sides * rows.element_size()
        count = rows.shape[1] if room == math.inf else max(1, int(room // each))
        if count < rows.shape[1]:
            part = memory.recomputed(network, part)
        found = [part(r, p) for r, p in zip(rows.split(count, 1), places.split(count, 1), strict=True)]
        low, high = torch.cat(found, 2).unbind(0)
        return low, high

    def _program(self, network: Network, target: str, region: Region, lines: Mapping[str, Enclosure]) -> Program | None:
        """The compiled steps for a target's rows, where these lines let them be taken."""
        apart = isinstance(lines, LineMaps) and not self._parallel(network, lines)
        found = self._planned(network, target, region) if apart else None
        return None if found is None or any(not isinstance(lines[name], Lines) for name in found.activations) else found

    def _planned(self, network: Network, target: str, region: Region) -> Program | None:
        if self.outward or self._one_row(network) or not planning.available(region):
            return None
        found = planning.program(network, target)
        return None if found is not None and found.windows and target == network.output else found

    def _every_neuron(
        self,
        found: Program,
        network: Network,
        region: Region,
        lines: Mapping[str, Enclosure],
        room: float,
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of every entry of a node, by the compiled steps."""
        shape, batch = network.shape_of(found.target), region.shape[0]
        rows = found.unit_rows(shape, region.like)
        neurons = found.every_neuron(rows, batch)
        value = running.lower_bounds(found, network, rows, neurons, region, lines, room)
        low, high = value.view(batch, -1, 2, rows.shape[1] // 2).unbind(2)
        return low.mT.reshape(batch, *shape), -high.mT.reshape(batch, *shape)

    def _windows(
        self,
        network: Network,
        source: str,
        plan: Plan,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        room: float,
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of every entry of a map, by windows; as many places at a time as there is room for."""
        channels, *grid = network.shape_of(source)
        one_row = self._parallel(network, lines)
        eye = torch.eye(channels, dtype=region.dtype, device=region.device)
        rows = (eye if one_row else torch.cat([eye, -eye])).reshape(1, -1, 1, 1, channels)
        places = plan.places(region.device)

        def part(some: Tensor) -> Tensor:
            if one_row:
                both = backsubstitution.substitute_both(network, source, rows, region, lines, plan=plan, places=some)
                return torch.stack([t.unflatten(1, (-1, channels)) for t in both])
            found = backsubstitution.substitute(
                network, source, rows, region, lines, magnitude=magnitude, plan=plan, places=some
            )
            low, high = found.unflatten(1, (-1, 2, channels)).unbind(2)
            return torch.stack([low, -high])

        each = frames.pull(network, plan, region.shape[0], rows.shape[1], outward=self.outward).whole
        each *= rows.shape[1] * rows.element_size()
        if room < each * places.shape[1]:
            part = memory.recomputed(network, part)
        count = places.shape[1] if room == math.inf else max(1, int(room // each))
        found = torch.cat([part(some) for some in places.split(count, dim=1)], 2)
        low, high = found.mT.unflatten(-1, grid).unbind(0)
        return low, high

    def _substitute(
        self,
        network: Network,
        target: str,
        rows: Tensor,
        region: Region,
        lines: Mapping[str, Enclosure],
        magnitude: Mapping[str, Tensor] | None,
        room: float,
    ) -> Tensor:
        """Back-substitution; with a finite room in chunks of rows, computed again in the backward pass."""
        found = None if magnitude is not None else self._program(network, target, region, lines)
        if found is not None and not found.windows:
            return self._passed(found, network, rows, region, lines, room)
        plan = frames.plan_rows(network, target) if region.shape[0] else None

        def part(chunk: Tensor) -> Tensor:
            return backsubstitution.substitute(network, target, chunk, region, lines, magnitude=magnitude, plan=plan)

        return self._in_chunks(part, network, target, rows, region, room)

    def _passed(
        self,
        found: Program,
        network: Network,
        rows: Tensor,
        region: Region,
        lines: Mapping[str, Enclosure],
        room: float,
    ) -> Tensor:
        """Rows in their target's own shape by the compiled steps; with a finite room some at a time."""
        batch = region.shape[0]

        def part(some: Tensor) -> Tensor:
            neurons = rows_of_examples(some.shape[0], some.shape[1], batch, region.device)
            value = running.lower_bounds(found, network, some, neurons, region, lines, room / 2)
            return from_below(value.view(batch, some.shape[1]))

        # The rows before the first activations, a gradient of theirs and a copy of either.
        each = 4 * rows.element_size() * rows.shape[0] * found.shared
        if room == math.inf or each * rows.shape[1] <= room / 2:
            return part(rows)
        again = memory.recomputed(network, part)
        return torch.cat([again(some) for some in rows.split(max(1, int(room / 2 // each)), dim=1)], -1)

    def _ranges(
        self,
        network: Network,
        target: str,
        rows: Tensor,
        region: Region,
        lines: Mapping[str, Enclosure],
        room: float,
    ) -> Tensor:
        """Both bounds of every row by parallel lines, [2, batch, k]."""
        plan = frames.plan_rows(network, target) if region.shape[0] else None

        def part(chunk: Tensor) -> Tensor:
            return torch.stack(backsubstitution.substitute_both(network, target, chunk, region, lines, plan=plan))

        return self._in_chunks(part, network, target, rows, region, room)

    def _in_chunks(
        self,
        part: Callable[[Tensor], Tensor],
        network: Network,
        target: str,
        rows: Tensor,
        region: Region,
        room: float,
    ) -> Tensor:
        """`part` of as many rows at a time as there is room for; [..., k]."""
        if room == math.inf:
            return part(rows)
        each = self._pull(network, target, region, rows.shape[0] == 1).whole * rows.element_size()
        again = memory.recomputed(network, part)
        return torch.cat([again(chunk) for chunk in rows.split(max(1, int(room // each)), dim=1)], -1)

    def _one_row(self, network: Network) -> bool:
        """Whether one row gives both bounds of a neuron: parallel lines, to nearest, no pooling."""
        return self.parallel and not self.outward and not pooled(network)

    def _parallel(self, network: Network, lines: Mapping[str, Enclosure]) -> bool:
        """Whether these lines let one row give both bounds."""
        return self._one_row(network) and all(isinstance(pair, Lines) and pair.parallel for pair in lines.values())

    # --- memory ---

    def bytes_needed(self, network: Network, region: Region, k: int) -> int:
        return self._source_bytes(network, region) + sum(self._bytes(network, region, k))

    def least_bytes(self, network: Network, region: Region, k: int) -> int:
        source = 0
        if self.preactivation is not None:
            source = resolve(self.preactivation).least_bytes(network, region, 0)
        one = region.select(slice(0, 1))
        pulled = max(self._pull(network, node.name, one, shared=False).whole for node in network)
        for name in self._targets(network, region):
            if (found := self._planned(network, name, region)) is not None:
                pulled = max(pulled, found.numbers(torch.is_grad_enabled()))
            plan, rows = frames.plan(network, name), self._sides(network) * network.shape_of(name)[0]
            if plan is not None:  # one place
                pulled = max(pulled, rows * frames.pull(network, plan, 1, rows, outward=self.outward).whole)
        return source + self._bytes(network, one, 0)[0] + region.dtype.itemsize * pulled

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
        return 0 if self.preactivation is None else resolve(self.preactivation).bytes_needed(network, region, 0)

    def _bytes(self, network: Network, region: Region, k: int) -> tuple[int, int]:
        """Bytes of bounds, lines and room for products, and of the rows of every node that is bounded by them."""
        size, batch = region.dtype.itemsize, region.shape[0]
        hidden, values = memory.hidden_entries(network), memory.value_entries(network)
        fixed = batch * memory_counts.bounds_and_lines(torch.is_grad_enabled()).of(hidden=hidden, values=values)
        sides = self._sides(network)
        targets = [(sides * math.prod(network.shape_of(name)), name) for name in self._targets(network, region)]
        held = most = 0
        for rows, target in (*targets, (k, network.output)):
            end = None if self.outward else backsubstitution.bytes_at_entrance(network, region, rows)
            plan = None if target == network.output else frames.plan(network, target)
            found = self._planned(network, target, region)
            if found is not None:
                given = batch * k if target == network.output else 2 * found.units(network.shape_of(target))
                kept, alive = found.bytes_taken(batch * rows, given, size)
                held += kept if torch.is_grad_enabled() else 0
                most = max(most, held + alive if torch.is_grad_enabled() else kept + alive)
                continue
            if plan is not None:
                pull = frames.pull(network, plan, batch, sides * network.shape_of(target)[0], outward=self.outward)
            else:
                pull = self._pull(network, target, region, target != network.output, end is not None)
            there, back = end or (0, 0)
            if torch.is_grad_enabled():  # the last rows go back first, and take what they kept with them
                held += size * rows * pull.kept
                most = max(most, held + max(size * rows * pull.passing + back, there))
            else:
                most = max(most, size * rows * pull.passing + there)
        return size * fixed, most

    def _sides(self, network: Network) -> int:
        """Rows for both bounds of a neuron."""
        return 1 if self._one_row(network) else 2

    def _targets(self, network: Network, region: Region) -> list[str]:
        """Nodes whose entries are bounded by rows."""
        sources = [name for node in network if not isinstance(node.op, Affine) for name in node.inputs]
        if self.preactivation is not None:
            return []
        known = interval.exact_nodes(network, region)
        return [name for name in dict.fromkeys(sources) if name not in known]

    def _pull(self, network: Network, target: str, region: Region, shared: bool, end: bool = False) -> memory.Pull:
        eager = step_passes(relax_step_kernels(), region.like) is None
        return memory.pull(network, target, region.shape[0], shared=shared, outward=self.outward, eager=eager, end=end)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes for a pass, for the relaxation of its pre-activation bounds, and for its rows; infinite: not cut."""

    whole: float
    source: float
    rows: float


def _whole_bytes(budget: MemoryBudget) -> int:
    return max(1, int(budget.whole))


@dataclass(frozen=True, kw_only=True)
class Crown(Substitution):
    """Back-substitution with one line below and one above (CROWN, DeepPoly).

    Args:
        preactivation: another relaxation's pre-activation bounds (`Crown(preactivation=Box())` is CROWN-IBP (R)); None:
            its own.
        lower: line below a crossing neuron: "adaptive" (smaller area), 0, 1, or "soft" (gamma).
        tria: the other side of the triangle above.
        continuous: the paper's -C forms, which relax stable neurons too.
        gamma: steepness of lower "soft", > 0.

    Raises:
        ValueError: for another `lower`; for tria or continuous without lower 0 or 1; for an estimate as preactivation.

    Sound: yes.  Exact: with no crossing neuron.  Gradient: exact almost everywhere; jumps in the weights at
    |l| = |u| (adaptive), l = 0 (lower 0), u = 0 (lower 1), both (tria); nowhere for "soft" and continuous.
    Source: Zhang et al. 2018; Singh et al. 2019; arXiv 2102.06700, table 3.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> own, boxes = (ox.bounds(net, region, ox.Crown(preactivation=part)) for part in (None, ox.Box()))
        >>> bool((own.lower >= boxes.lower - 1e-6).all())  # to rounding
        True
    """

    lower: LowerSlope = "adaptive"
    tria: bool = False
    continuous: bool = False
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lower, (bool, float)) or self.lower not in ("adaptive", "soft", 0, 1):
            raise ValueError(f"Crown: lower must be 'adaptive', 'soft', 0 or 1, got {self.lower!r}")
        if (self.tria or self.continuous) and self.lower not in (0, 1):
            raise ValueError(f"Crown: tria and continuous need lower 0 or 1, got lower={self.lower!r}")
        require_number("Crown", "gamma", self.gamma)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"Crown: gamma must be > 0 and finite, got {self.gamma}")

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(self._switches()), *(part.jumps for part in self.parts))

    def _switches(self) -> tuple[str, ...]:
        if self.continuous or self.lower == "soft":
            return ()
        if self.lower == "adaptive":
            return (TIE,)
        if self.tria:
            return (LOWER, UPPER)
        return (LOWER,) if self.lower == 0 else (UPPER,)

    def refusal(self, activation: Activation) -> str | None:
        fits = self.lower in ("adaptive", "soft") or isinstance(activation, PiecewiseLinear)
        return None if fits else named.NO_PIECES

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        return named.crown_lines(
            activation, l, u, lower=self.lower, tria=self.tria, continuous=self.continuous, gamma=self.gamma
        )


def CrownIBP(*, lower: LowerSlope = "adaptive", gamma: float = 1.0, **options: Any) -> Crown:
    """CROWN with pre-activation bounds from Box: CROWN-IBP (R).

    Args:
        lower: "adaptive" or "soft" (gamma), as for `Crown`.
        gamma: as for `Crown`.
        options: any other option of `Crown`.

    Returns:
        A `Crown` whose `preactivation` is a Box of the same rounding.

    Sound: yes.  Exact, gradient: as `Crown`.

    Example:
        >>> type(ox.CrownIBP()).__name__, type(ox.CrownIBP().preactivation).__name__
        ('Crown', 'Box')
        >>> ox.CrownIBP() == ox.Crown(preactivation=ox.Box())
        True
    """
    return Crown(lower=lower, gamma=gamma, preactivation=Box(), **options)


@dataclass(frozen=True, kw_only=True)
class FastLin(Substitution):
    """Back-substitution with both slopes u / (u - l): Fast-Lin, CAP, DeepZ as lines.

    Of a smooth activation, for which its authors went on to CROWN, it takes CROWN's lines.

    Args:
        preactivation: another relaxation's pre-activation bounds; None: its own.

    Raises:
        ValueError: for an estimate as preactivation.

    Sound: yes.  Exact: with no crossing neuron.  Gradient: exact; continuous in the weights.
    Source: Weng et al. 2018; Wong and Kolter 2018.

    Example:
        >>> net, region = ox.models.fc(4, 8, 8, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> lines, noise = ox.bounds(net, region, ox.FastLin()), ox.bounds(net, region, "deepz")
        >>> torch.allclose(lines.upper, noise.upper, atol=1e-5)
        True
    """

    parallel: ClassVar[bool] = True

    @property
    def jumps(self) -> Jumps:
        return joined(frozenset(), *(part.jumps for part in self.parts))

    def lines(self, activation: Activation, l: Tensor, u: Tensor) -> Lines:
        if isinstance(activation, PiecewiseLinear):
            return named.band_lines(activation, l, u, slope="chord")
        return named.crown_lines(activation, l, u)

    def _one_row(self, network: Network) -> bool:
        return super()._one_row(network) and all(isinstance(n.op, PiecewiseLinear) for n in network.activations)


def _without_rows(network: Network, region: Region, given: Preactivation | None) -> frozenset[str]:
    """Nodes whose intervals do: where these are exact, and before poolings and products where bounds are given."""
    nodes = [n for n in network if not isinstance(n.op, Affine) and not (given and n.name in given)]
    loose = {i for n in nodes if given is not None and not isinstance(n.op, Activation) for i in n.inputs}
    return frozenset(loose | {i for n in nodes for i in n.inputs} & interval.exact_nodes(network, region))
