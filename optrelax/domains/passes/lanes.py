"""Rows that stand in one place side by side, without the neurons whose lines are 0 (`kernels.lane_step`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.domains.passes.neurons import EveryNeuron, Neurons
from optrelax.domains.passes.workspace import Layout, PassTensors, RowsAtWork, Workspace
from optrelax.kernels import lane_step
from optrelax.kernels.convolutions import ConvGeometry, Pair

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
        self.kept: dict[str | None, Tensor] = {}
        for name in found.activations:
            maps = tensors.lines[name]
            batch, high, wide, c = maps[0].shape
            self.kept[name] = torch.empty(batch, high, wide, c + 1, dtype=torch.int32)
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
        for i, start in enumerate(range(0, blocks, step)):
            block = torch.arange(start, min(blocks, start + step))
            lane = block[:, None] % a_place * lanes + torch.arange(lanes)
            there = None if each % lanes == 0 else lane < each
            row = (block // a_place * each)[:, None] + lane.clamp(max=each - 1)
            part = slice(int(row[0, 0]), int(row[-1, -1]) + 1)
            place, which = neurons.part(part)
            row -= part.start
            own = column[part]
            laid = own.view(-1, lanes) if there is None else own[row] * there
            arena = self.arenas[i % len(self.arenas)]
            yield LanesAtWork(self, arena, part, place[row[:, 0]], which, laid, own, row, there)

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


@dataclass(frozen=True, slots=True)
class LanesAtWork(RowsAtWork):
    """Some blocks in the workspace: place [blocks, 3], column [blocks, lanes]."""

    space: LaneSpace
    own: Tensor
    """The column as it was given, [n]."""
    row: Tensor
    """Of each lane, [blocks, lanes]."""
    there: Tensor | None
    """Whether a lane holds a row; None: all do."""

    @property
    def count(self) -> int:
        """Blocks."""
        return self.row.shape[0]

    def at(self, slot: int) -> Tensor:
        """The coefficients of a slot, [blocks, h, w, c, lanes]."""
        stop = self.space.rows[slot].stop
        if stop is None:
            return self._view(slot, self.space.layout.offsets)
        laid = self.space.tensors.stops[stop][self.which[self.row]].movedim(1, -1)
        return (laid if self.there is None else laid * self.there[:, None, None, None]).contiguous()

    def selected(self, slot: int) -> Tensor:
        return self.at(slot)

    def _view(self, slot: int, offsets: Any) -> Tensor:
        rows, first, lanes = self.space.rows[slot], offsets[slot] * self.space.count, self.space.lanes
        size = self.count * lanes * rows.numbers
        return self.arena[first : first + size].view(self.count, *rows.shape, lanes)

    def relax(self, source: int, to: int | None, activation: str | None) -> None:
        clear = to is not None and to not in self.space.convolved
        self._relax("relax", source, activation, clear, found=None if to is None else self.at(to))

    def relax_back(self, source: int, to: int | None, activation: str | None, found: Tensor, sums: PassTensors) -> None:
        grad = None if to is None else self.gradient(to)
        clear = source not in self.space.convolving or activation is None or self.space.readers[source] != activation
        self._relax("relax_back", source, activation, clear, grad=grad, found=found, more=sums.lines[activation])

    def _relax(
        self,
        name: str,
        source: int,
        activation: str | None,
        clear: bool,
        found: Tensor | None,
        grad: Tensor | None = None,
        more: Any = (None, None, None, None),
    ) -> None:
        rows, columns, channels = self.space.rows[source].shape
        lines = dict(zip(("ls", "li", "us", "ui"), self.space.tensors.lines[activation], strict=True))
        sums = dict(zip(("to_ls", "to_li", "to_us", "to_ui"), more, strict=True))
        shape = {"blocks": self.count, "lanes": self.space.lanes, "rows": rows, "columns": columns}
        lane_step.lines().call(
            name,
            self.arena.dtype,
            **shape,
            **self._view_of("map", source),
            channels=channels,
            clear=int(clear),
            kept=self.space.kept.get(activation),
            place=self.place,
            a=self.at(source),
            grad=grad,
            column=self.column,
            found=found,
            **lines,
            **sums,
        )

    def spread(self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair) -> None:
        turned = self.space.turned[weight]
        self._convolve("push", source, to, g, corner, a=self.at(source), weight=turned, found=self.at(to))

    def spread_back(
        self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair, found: Tensor, sums: PassTensors
    ) -> None:
        grad, back = self.gradient(to), self.space.back[weight]
        if sums.weights[weight] is not None:
            outer = self.space.outer(weight)
            self._convolve("outer", source, to, g, corner, a=self.at(source), given=grad, weight=back, found=outer)
        self._convolve("pull", source, to, g, corner, given=grad, weight=back, found=found)

    def _convolve(
        self,
        name: str,
        source: int,
        to: int,
        g: ConvGeometry,
        corner: Pair,
        weight: Tensor,
        found: Tensor,
        a: Tensor | None = None,
        given: Tensor | None = None,
    ) -> None:
        space = self.space
        (high, wide, out), (rows, columns, into) = space.rows[source].shape, space.rows[to].shape
        kh, kw = weight.shape[:2]
        maker, reader = space.makers.get(source), space.readers.get(to)
        lane_step.products().call(
            name,
            self.arena.dtype,
            blocks=self.count,
            lanes=space.lanes,
            high=high,
            wide=wide,
            out=out,
            rows=rows,
            columns=columns,
            into=into,
            kh=kh,
            kw=kw,
            step_y=g.stride[0],
            step_x=g.stride[1],
            apart=g.dilation[0],
            top=corner[0],
            left=corner[1],
            **self._view_of("from", source),
            **self._view_of("to", to),
            kept_from=space.kept.get(maker),
            kept_to=space.kept.get(reader),
            place=self.place,
            a=a,
            given=given,
            weight=weight,
            found=found,
        )

    def _view_of(self, name: str, slot: int) -> dict[str, int]:
        """Where a slot's windows lie in their map."""
        frame = self.space.rows[slot].frame
        steps = (0, 0, 0, 0) if frame.whole else (*frame.stride, *frame.offset)
        sides = ("high", "wide", "step_y", "step_x", "offset_y", "offset_x")
        return {f"{name}_{side}": n for side, n in zip(sides, (*frame.image, *steps), strict=True)}

    def multiply(self, source: int, to: int, weight: str) -> None:
        w, lanes = self.space.tensors.weights[weight], self.space.lanes
        found, a = self.at(to).view(self.count, -1, lanes), self.at(source).view(self.count, -1, lanes)
        torch.bmm(w.mT.expand(self.count, -1, -1), a, out=found)

    def multiply_back(self, source: int, to: int, weight: str, found: Tensor, sums: PassTensors) -> None:
        w, into, lanes = self.space.tensors.weights[weight], sums.weights[weight], self.space.lanes
        grad = self.gradient(to).view(self.count, -1, lanes)
        torch.bmm(w.expand(self.count, -1, -1), grad, out=found.view(self.count, -1, lanes))
        if into is not None:
            into.addbmm_(self.at(source).view(self.count, -1, lanes), grad.mT)

    def add_shared(self, slot: int, total: Tensor) -> None:
        rows = self.gradient(slot).movedim(-1, 1)
        which = self.which[self.row]
        if self.there is not None:
            rows, which = rows[self.there], which[self.there]
        total.index_add_(0, which.flatten(), rows.reshape(-1, *total.shape[1:]))

    def finish(self) -> None:
        if self.there is not None:
            self.own[self.row[self.there]] = self.column[self.there]
