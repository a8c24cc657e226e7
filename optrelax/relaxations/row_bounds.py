"""Bounds of any rows of any node by back-substitution, as many rows at a time as there is room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax import memory
from optrelax.domains import backsubstitution, frames
from optrelax.domains.frames import Plan
from optrelax.domains.lines import Lines
from optrelax.domains.passes import running
from optrelax.domains.passes.line_maps import LineMaps
from optrelax.domains.passes.neurons import rows_of_examples
from optrelax.domains.passes.programs import Program
from optrelax.domains.row_walks import Enclosure
from optrelax.enclosures import Bounds, from_below, ordered
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import flatten_from
from optrelax.regions import Region
from optrelax.relaxations.base import identity_rows
from optrelax.relaxations.row_plans import RowPlans


@dataclass(frozen=True, slots=True)
class RowBounds:
    """Rows of one network pulled back over one region, in `room` bytes; computed again for a gradient where cut."""

    plans: RowPlans
    lines: Mapping[str, Enclosure]
    """Of all activations, poolings and products behind the rows; filled while layers are bounded."""
    magnitude: Mapping[str, Tensor] | None
    """As `backsubstitution.substitute` takes it."""
    room: float

    @property
    def network(self) -> Network:
        return self.plans.network

    @property
    def region(self) -> Region:
        return self.plans.region

    @property
    def parallel(self) -> bool:
        """Whether these lines let one row give both bounds."""
        return self.plans.one_row and all(isinstance(pair, Lines) and pair.parallel for pair in self.lines.values())

    def both(self, source: str) -> Bounds:
        """Lower and upper bounds of every entry of a node."""
        found = self._program(source)
        if found is not None:
            return ordered(*self._every_neuron(found))
        # Without examples there is no telling how many places a window's rows belong to.
        plan = frames.plan(self.network, source) if self.region.shape[0] else None
        if plan is not None:
            return ordered(*self.windows(source, plan))
        shape = self.network.shape_of(source)
        low, high = self._ends(source, identity_rows(shape, self.region.like))
        return ordered(low.reshape(-1, *shape), high.reshape(-1, *shape))

    def refined(self, node: Node, known: Bounds) -> Bounds:
        """The better of an activation's known bounds and these, of the neurons alone that cross in them."""
        source, shape = node.inputs[0], known.lower.shape
        if not node.piecewise:  # it is curved wherever it is
            return known.intersect(self.both(source))
        crossing = node.piecewise.crossing(known.lower.detach(), known.upper.detach())
        if not bool(crossing.any()):
            return known
        found = self._program(source)
        if found is None:
            both = self._some(source, crossing)
            low = torch.where(crossing, torch.maximum(both.lower, known.lower), known.lower)
            return ordered(low, torch.where(crossing, torch.minimum(both.upper, known.upper), known.upper))
        neurons, index = found.some_neurons(crossing)
        rows = found.unit_rows(shape[1:], self.region.like, neurons.entries)
        value = running.lower_bounds(found, self.network, rows, neurons, self.region, self.lines, self.room)
        value = value.view(-1, 2)
        low, high = known.lower[index], known.upper[index]
        tight = ordered(torch.maximum(value[:, 0], low), torch.minimum(-value[:, 1], high))
        return Bounds.known(known.lower.index_put(index, tight.lower), known.upper.index_put(index, tight.upper))

    def lower(self, target: str, rows: Tensor) -> Tensor:
        """Lower bounds of rows [batch or 1, k, *shape] of a node: [batch, k]."""
        found = None if self.magnitude is not None else self._program(target)
        if found is not None and not found.windows:
            return self._passed(found, rows)
        plan = frames.plan_rows(self.network, target) if self.region.shape[0] else None

        def part(chunk: Tensor) -> Tensor:
            return self._substituted(target, chunk, plan)

        return self._in_chunks(part, target, rows)

    def ranges(self, target: str, rows: Tensor) -> Tensor:
        """Both bounds of every row by parallel lines, [2, batch, k]."""
        plan = frames.plan_rows(self.network, target) if self.region.shape[0] else None
        return self._in_chunks(lambda chunk: self._range(target, chunk, plan), target, rows)

    def windows(self, source: str, plan: Plan) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of every entry of a map, by windows; as many places at a time as there is room for."""
        channels, *grid = self.network.shape_of(source)
        one_row = self.parallel
        eye = torch.eye(channels, dtype=self.region.dtype, device=self.region.device)
        rows = (eye if one_row else torch.cat([eye, -eye])).reshape(1, -1, 1, 1, channels)
        places = plan.places(self.region.device)

        def part(some: Tensor) -> Tensor:
            if one_row:
                return self._range(source, rows, plan, some).unflatten(2, (-1, channels))
            found = self._substituted(source, rows, plan, some)
            low, high = found.unflatten(1, (-1, 2, channels)).unbind(2)
            return torch.stack([low, -high])

        each = self.plans.pull_windows(plan, rows.shape[1]).whole * rows.shape[1] * rows.element_size()
        if self.room < each * places.shape[1]:
            part = memory.recomputed(self.network, part)
        count = places.shape[1] if self.room == math.inf else max(1, int(self.room // each))
        found = torch.cat([part(some) for some in places.split(count, dim=1)], 2)
        low, high = found.mT.unflatten(-1, grid).unbind(0)
        return low, high

    def _ends(self, target: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both bounds of every row, [batch, k] each."""
        if self.parallel:
            low, high = self.ranges(target, rows)
            return low, high
        both, k = self.lower(target, torch.cat([rows, -rows], 1)), rows.shape[1]
        return both[:, :k], -both[:, k:]

    def _some(self, source: str, wanted: Tensor) -> Bounds:
        """Bounds of the wanted entries of a node, anything elsewhere: as many rows an example as one wants at most."""
        shape, batch, like = self.network.shape_of(source), self.region.shape[0], self.region.like
        flat = flatten_from(wanted, 1)
        most = int(flat.sum(1).amax())
        plan = frames.plan(self.network, source)
        # Rows that all places share, or all examples, cost less each.
        if most > flat.shape[1] // (2 if plan is None else 4):
            return self.both(source)
        entries = flat.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        if plan is None:
            rows = like.new_zeros(batch, most, flat.shape[1]).scatter(2, entries[..., None], 1.0)
            low, high = self._ends(source, rows.reshape(batch, most, *shape))
        else:
            pixels = shape[1] * shape[2]
            channel, pixel = entries // pixels, entries % pixels
            places = torch.stack([pixel // shape[2], pixel % shape[2]], -1)
            eye = torch.eye(shape[0], dtype=like.dtype, device=like.device)
            low, high = self._places(source, plan, eye[channel], places)
        ends = []
        for end in (low, high):
            ends.append(end.new_zeros(batch, flat.shape[1]).scatter(1, entries, end).reshape(batch, *shape))
        return Bounds.known(*ends)

    def _places(self, source: str, plan: Plan, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Both bounds of one row a place: rows [batch, n, channels], places [batch, n, 2] -> [batch, n] each."""
        one_row = self.parallel

        def part(some: Tensor, where: Tensor) -> Tensor:
            own = some.flatten(0, 1)[:, None, None, None]
            if one_row:
                return self._range(source, own, plan, where)
            found = self._substituted(source, torch.cat([own, -own], 1), plan, where)
            low, high = found.unflatten(1, (-1, 2)).unbind(2)
            return torch.stack([low, -high])

        sides = 1 if one_row else 2
        each = self.plans.pull_windows(plan, sides).whole * sides * rows.element_size()
        count = rows.shape[1] if self.room == math.inf else max(1, int(self.room // each))
        if count < rows.shape[1]:
            part = memory.recomputed(self.network, part)
        found = [part(r, p) for r, p in zip(rows.split(count, 1), places.split(count, 1), strict=True)]
        low, high = torch.cat(found, 2).unbind(0)
        return low, high

    def _substituted(self, target: str, rows: Tensor, plan: Plan | None, places: Tensor | None = None) -> Tensor:
        return backsubstitution.substitute(
            self.network, target, rows, self.region, self.lines, magnitude=self.magnitude, plan=plan, places=places
        )

    def _range(self, target: str, rows: Tensor, plan: Plan | None, places: Tensor | None = None) -> Tensor:
        return torch.stack(
            backsubstitution.substitute_both(
                self.network, target, rows, self.region, self.lines, plan=plan, places=places
            )
        )

    def _in_chunks(self, part: Callable[[Tensor], Tensor], target: str, rows: Tensor) -> Tensor:
        """`part` of as many rows at a time as there is room for; [..., k]."""
        if self.room == math.inf:
            return part(rows)
        each = self.plans.pull(target, rows.shape[0] == 1).whole * rows.element_size()
        again = memory.recomputed(self.network, part)
        return torch.cat([again(chunk) for chunk in rows.split(max(1, int(self.room // each)), dim=1)], -1)

    # --- by compiled steps ---

    def _program(self, target: str) -> Program | None:
        """The compiled steps for a target's rows, where these lines let them be taken."""
        apart = isinstance(self.lines, LineMaps) and not self.parallel
        found = self.plans.program(target) if apart else None
        if found is None or any(not isinstance(self.lines[name], Lines) for name in found.activations):
            return None
        return found

    def _every_neuron(self, found: Program) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of every entry of a node, by the compiled steps."""
        shape, batch = self.network.shape_of(found.target), self.region.shape[0]
        rows = found.unit_rows(shape, self.region.like)
        neurons = found.every_neuron(rows, batch)
        value = running.lower_bounds(found, self.network, rows, neurons, self.region, self.lines, self.room)
        low, high = value.view(batch, -1, 2, rows.shape[1] // 2).unbind(2)
        return low.mT.reshape(batch, *shape), -high.mT.reshape(batch, *shape)

    def _passed(self, found: Program, rows: Tensor) -> Tensor:
        """Rows in their target's own shape by the compiled steps; with a finite room some at a time."""
        batch, half = self.region.shape[0], self.room / 2

        def part(some: Tensor) -> Tensor:
            neurons = rows_of_examples(some.shape[0], some.shape[1], batch, self.region.device)
            value = running.lower_bounds(found, self.network, some, neurons, self.region, self.lines, half)
            return from_below(value.view(batch, some.shape[1]))

        # The rows before the first activations, a gradient of theirs and a copy of either.
        each = 4 * rows.element_size() * rows.shape[0] * found.shared
        if self.room == math.inf or each * rows.shape[1] <= half:
            return part(rows)
        again = memory.recomputed(self.network, part)
        return torch.cat([again(some) for some in rows.split(max(1, int(half // each)), dim=1)], -1)
