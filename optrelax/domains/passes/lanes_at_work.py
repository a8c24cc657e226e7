"""Some blocks of rows on their way back: the steps as calls, bound once for all parts of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.domains.passes.workspace import PassTensors, RowsAtWork
from optrelax.kernels import lane_step
from optrelax.kernels.convolutions import ConvGeometry, Pair
from optrelax.kernels.native import BoundCall

if TYPE_CHECKING:
    from optrelax.domains.passes.lanes import LaneSpace


@dataclass(frozen=True, slots=True)
class Known:
    """Tensors and calls that parts of as many blocks in one arena share."""

    rows: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    """Coefficients of a slot, or their gradient."""
    spare: dict[torch.Size, Tensor] = field(default_factory=dict)
    calls: dict[tuple[object, ...], BoundCall] = field(default_factory=dict)


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
    known: Known

    @property
    def count(self) -> int:
        """Blocks."""
        return self.row.shape[0]

    def at(self, slot: int) -> Tensor:
        """The coefficients of a slot, [blocks, h, w, c, lanes]."""
        return self._known(slot, back=False)

    def gradient(self, slot: int) -> Tensor:
        return self._known(slot, back=True)

    def _known(self, slot: int, back: bool) -> Tensor:
        found = self.known.rows.get((slot, back))
        if found is None:
            rows, layout = self.space.rows[slot], self.space.layout
            shape = (self.count, *rows.shape, self.space.lanes)
            if rows.stop is not None and not back:
                found = self.arena.new_empty(shape)
            else:
                first = (layout.gradients if back else layout.offsets)[slot] * self.space.count
                found = self.arena[first : first + math.prod(shape)].view(shape)
            self.known.rows[slot, back] = found
        return found

    def selected(self, slot: int) -> Tensor:
        return self.at(slot)

    def lay_shared(self) -> None:
        """Write the coefficients of slots that hold shared rows."""
        for slot, rows in enumerate(self.space.rows):
            if rows.stop is not None:
                laid = self.space.tensors.stops[rows.stop][self.which[self.row]].movedim(1, -1)
                torch.mul(laid, 1 if self.there is None else self.there[:, None, None, None], out=self.at(slot))

    def unread(self) -> LanesAtWork:
        return replace(self, column=self.space.idle)

    def spare(self, like: Tensor) -> Tensor:
        return self.known.spare.setdefault(like.shape, torch.empty_like(like))

    def _call(self, key: tuple[object, ...], bind: Callable[[], BoundCall]) -> None:
        """A kernel on all of these blocks, bound once for all parts that share what is known."""
        call = self.known.calls.get(key)
        if call is None:
            call = self.known.calls[key] = bind()
        call()

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
        more: Sequence[Tensor | None] = (None, None, None, None),
    ) -> None:
        def bind() -> BoundCall:
            rows, columns, channels = self.space.rows[source].shape
            lines = dict(zip(("ls", "li", "us", "ui"), self.space.tensors.lines[activation], strict=True))
            sums = dict(zip(("to_ls", "to_li", "to_us", "to_ui"), more, strict=True))
            shape = {"blocks": self.count, "lanes": self.space.lanes, "rows": rows, "columns": columns}
            return lane_step.lines().bound(
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

        self._call((name, source, activation, id(found), id(self.column)), bind)

    def spread(self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair) -> None:
        turned = self.space.turned[weight]
        self._convolve("push", source, to, g, corner, turned, self.at(to), a=self.at(source))

    def spread_back(
        self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair, found: Tensor, sums: PassTensors
    ) -> None:
        grad, back = self.gradient(to), self.space.back[weight]
        if sums.weights[weight] is not None:
            outer = self.space.outer(weight)
            self._convolve("outer", source, to, g, corner, back, outer, a=self.at(source), given=grad)
        self._convolve("pull", source, to, g, corner, back, found, given=grad)

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
        def bind() -> BoundCall:
            space = self.space
            (high, wide, out), (rows, columns, into) = space.rows[source].shape, space.rows[to].shape
            kh, kw = weight.shape[:2]
            maker, reader = space.makers.get(source), space.readers.get(to)
            return lane_step.products().bound(
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

        self._call((name, source, to, id(found)), bind)

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
        found = self.column[: self.count]
        if self.there is None:
            self.own[self.row] = found
        else:
            self.own[self.row[self.there]] = found[self.there]
