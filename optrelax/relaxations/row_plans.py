"""How the rows of each node go back to the input, and what memory that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optrelax import memory, memory_counts
from optrelax.domains import frames
from optrelax.domains.passes import planning
from optrelax.domains.passes.programs import Program
from optrelax.domains.row_rules import bytes_at_entrance
from optrelax.kernels.relax_step import kernels as relax_step_kernels
from optrelax.kernels.triton_steps import passes as step_passes
from optrelax.networks.graph import Network
from optrelax.regions import Region


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes for a pass, for the relaxation of its pre-activation bounds, and for its rows; infinite: not cut."""

    whole: float
    source: float
    rows: float

    @property
    def limit(self) -> int:
        """Bytes for a pass, as a limit of it."""
        return max(1, int(self.whole))


@dataclass(frozen=True, slots=True)
class RowPlans:
    """How rows of one network go back over one region."""

    network: Network
    region: Region
    outward: bool
    one_row: bool
    """Whether one row gives both bounds of a neuron, as far as the relaxation knows."""

    @property
    def sides(self) -> int:
        """Rows for both bounds of a neuron."""
        return 1 if self.one_row else 2

    def program(self, target: str) -> Program | None:
        """The compiled steps for a target's rows, where these can be taken."""
        if self.outward or self.one_row or not planning.available(self.region):
            return None
        found = planning.program(self.network, target)
        return None if found is not None and found.windows and target == self.network.output else found

    def pull(self, target: str, shared: bool, end: bool = False, batch: int | None = None) -> memory.Pull:
        """Numbers of one whole row; batch: another than the region's."""
        batch = self.region.shape[0] if batch is None else batch
        eager = step_passes(relax_step_kernels(), self.region.like) is None
        return memory.pull(self.network, target, batch, shared=shared, outward=self.outward, eager=eager, end=end)

    def pull_windows(self, plan: frames.Plan, rows: int, batch: int | None = None) -> memory.Pull:
        """Numbers of one row of `rows` a place; batch: another than the region's."""
        batch = self.region.shape[0] if batch is None else batch
        return frames.pull(self.network, plan, batch, rows, outward=self.outward)

    @property
    def example_bytes(self) -> int:
        """Bytes of bounds, lines and room for products, an example."""
        hidden, values = memory.hidden_entries(self.network), memory.value_entries(self.network)
        numbers = memory_counts.bounds_and_lines(torch.is_grad_enabled()).of(hidden=hidden, values=values)
        return self.region.dtype.itemsize * numbers

    def row_bytes(self, targets: Sequence[str], k: int) -> int:
        """Bytes of the rows of every target, and of k rows of the output."""
        network, gradient = self.network, torch.is_grad_enabled()
        counted = [(self.sides * math.prod(network.shape_of(name)), name) for name in targets]
        held = most = 0
        for rows, target in (*counted, (k, network.output)):
            kept, alive = self._bytes_of(target, rows)
            if gradient:  # the last rows go back first, and take what they kept with them
                held += kept
            most = max(most, held + alive)
        return most

    def _bytes_of(self, target: str, rows: int) -> tuple[int, int]:
        """Bytes of a target's rows that are kept for a gradient, and that are alive at once, beside these if any."""
        network, batch, gradient = self.network, self.region.shape[0], torch.is_grad_enabled()
        size = self.region.dtype.itemsize
        end = None if self.outward else bytes_at_entrance(network, self.region, rows)
        plan = None if target == network.output else frames.plan(network, target)
        found = self.program(target)
        if found is not None:
            hidden = target != network.output
            given = 2 * found.units(network.shape_of(target)) if hidden else batch * rows
            kept, alive = found.bytes_taken(batch * rows, given, size, hidden)
            return kept, alive if gradient else kept + alive
        if plan is not None:
            pull = self.pull_windows(plan, self.sides * network.shape_of(target)[0])
        else:
            pull = self.pull(target, target != network.output, end is not None)
        there, back = end or (0, 0)
        passing = size * rows * pull.passing
        return size * rows * pull.kept, max(passing + back, there) if gradient else passing + there

    def least_bytes(self, targets: Sequence[str]) -> int:
        """Bytes of one row of one example: of the greatest there is."""
        network = self.network
        pulled = max(self.pull(node.name, shared=False, batch=1).whole for node in network)
        for name in targets:
            if (found := self.program(name)) is not None:
                pulled = max(pulled, found.numbers(torch.is_grad_enabled()))
            plan, rows = frames.plan(network, name), self.sides * network.shape_of(name)[0]
            if plan is not None:  # one place
                pulled = max(pulled, rows * self.pull_windows(plan, rows, batch=1).whole)
        return self.region.dtype.itemsize * pulled
