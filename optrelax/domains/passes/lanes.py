"""Rows that stand in one place side by side, without the neurons whose lines are 0 (`kernels.lane_step`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.domains.passes.lanes_at_work import Known, LanesAtWork
from optrelax.domains.passes.neurons import EveryNeuron, Neurons
from optrelax.domains.passes.workspace import Layout, PassTensors, Workspace
from optrelax.kernels import lane_step

if TYPE_CHECKING:
    from optrelax.domains.passes.programs import Program


def lanes_of(neurons: Neurons | EveryNeuron, most: int, dtype: torch.dtype) -> int:
    """Lanes of a block, where enough of at most so many rows stand in one place; else 0."""
    one, n = lane_step.vector(dtype), neurons.together
    if 2 * n <= one or most < one or n == 0:
        return 0
    # Two vectors a block, unless rows that are not there would fill much of it.
    return one if most < 2 * one or -n % (2 * one) * 4 > n else 2 * one


class LaneSpace(Workspace):
    """A workspace of blocks [h, w, c, lanes]."""

    lays_matrices = False

    def __init__(
        self,
        found: Program,
        layout: Layout,
        tensors: PassTensors,
        count: int,
        arena: Tensor,
        gradient: bool,
        lanes: int,
    ) -> None:
        super().__init__(found.rows, layout, tensors, count, arena, gradient)
        self.lanes, self.makers, self.readers = lanes, found.makers, found.readers
        # What convolutions alone read or make needs no zeros where a list leaves a channel out.
        every = [step for step in found.steps for _ in step.sources]
        others = {slot for step in every if not step.convolves for slot in step.sources}
        self.convolved = {step.source for step in every} - others
        self.convolving = {step.to for step in every if step.convolves}
        self.partial: dict[str, Tensor] = {}
        self.place = torch.empty(count // lanes, 3, dtype=torch.int64, device="cpu")
        self.column, self.idle = (arena.new_zeros(count // lanes, lanes) for _ in range(2))
        self.kept: dict[str | None, Tensor] = {}
        for name in found.activations:
            maps = tensors.lines[name]
            batch, high, wide, c = maps[0].shape
            self.kept[name] = torch.empty(batch, high, wide, c + 1, dtype=torch.int32, device="cpu")
            lane_step.lines().call("keep", arena.dtype, batch * high * wide, c, *maps, self.kept[name])

    def _turned(self, w: Tensor) -> Tensor:
        return w.permute(2, 3, 0, 1).contiguous()

    def _back(self, w: Tensor) -> Tensor:
        return w.permute(2, 3, 1, 0).contiguous()

    def parts(self, neurons: Neurons | EveryNeuron, column: Tensor) -> Iterator[LanesAtWork]:
        """As many blocks at a time as there is room for; column [n]: what bounds are added to, or its gradient."""
        each, lanes = neurons.together, self.lanes
        a_place, step = -(-each // lanes), self.count // lanes
        blocks = neurons.count // each * a_place
        known = Known()
        for i, start in enumerate(range(0, blocks, step)):
            block = torch.arange(start, min(blocks, start + step), device="cpu")
            if i and (len(self.arenas) > 1 or len(block) < step):
                known = Known()
            lane = block[:, None] % a_place * lanes + torch.arange(lanes, device="cpu")
            there = None if each % lanes == 0 else lane < each
            row = (block // a_place * each)[:, None] + lane.clamp(max=each - 1)
            part = slice(int(row[0, 0]), int(row[-1, -1]) + 1)
            place, which = neurons.part(part)
            row -= part.start
            own = column[part]
            torch.mul(own[row], 1 if there is None else there, out=self.column[: len(block)])
            torch.index_select(place, 0, row[:, 0], out=self.place[: len(block)])
            arena = self.arenas[i % len(self.arenas)]
            work = LanesAtWork(self, arena, part, self.place, which, self.column, own, row, there, known)
            work.lay_shared()
            yield work

    def finish(self, sums: PassTensors) -> None:
        """Add up the gradients of weights over threads and lanes."""
        for name, partial in self.partial.items():
            sums.weights[name] += partial.sum((0, -1)).permute(2, 3, 0, 1)
        self.partial.clear()

    def outer(self, weight: str) -> Tensor:
        """Where the gradient of a convolution's weight is added up, [threads, kh, kw, out, in, lanes of a vector]."""
        if weight not in self.partial:
            shape = self.turned[weight].shape
            vector = lane_step.vector(self.turned[weight].dtype)
            self.partial[weight] = self.turned[weight].new_zeros(torch.get_num_threads(), *shape, vector)
        return self.partial[weight]
