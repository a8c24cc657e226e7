"""Where the coefficients of some rows lie while they are pulled back, and the tensors that the steps read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from optrelax.domains.frames import Frame
from optrelax.domains.passes.neurons import EveryNeuron, Neurons
from optrelax.kernels import window_step
from optrelax.kernels.convolutions import ConvGeometry, Pair
from optrelax.kernels.signatures import Argument

WORKSPACE = 12 * 2**20
"""Bytes of coefficients that are alive at once, a thread; calls of less cost more than what caches save."""
KEPT, KEPT_HIDDEN = 2**26, 2**24
"""Bytes of coefficients up to which a gradient keeps those of all rows: making them again is the slower way.

Of the rows of hidden neurons, few of whose bounds have a gradient, it seldom is.
"""


MANY = 64
"""Rows from which a matrix is laid out for the compiled product, on AMD's processors up to twice as fast as MKL's."""


def most_bytes() -> int:
    """Bytes of coefficients that are alive at once on all threads."""
    return WORKSPACE * torch.get_num_threads()


@dataclass(frozen=True, slots=True)
class RowShape:
    """Coefficients on their way: one window a row."""

    frame: Frame
    channels: int
    stop: str | None = None
    """Given by the caller: rows that several neurons share."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one row: height, width, channels."""
        return (*self.frame.size, self.channels)

    @property
    def numbers(self) -> int:
        """Of one row."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets, in numbers a row, of each slot's coefficients and of their gradients; and how many there are in all."""

    offsets: Sequence[int]
    gradients: Sequence[int]
    numbers: int


_Lines = Sequence[Tensor | None]


class PassTensors:
    """The tensors of a call by name, or the sums of their gradients."""

    def __init__(
        self,
        stops: Sequence[str],
        activations: Sequence[str],
        weights: Sequence[str],
        given: Sequence[Any],  # of a call all are there, of sums what is wanted
        mixed: bool,
    ) -> None:
        n, each = len(stops), maps_each(mixed)
        self.stops = dict(zip(stops, given[:n], strict=True))
        self.lines: dict[str | None, Sequence[Any]] = {}
        for i, name in enumerate(activations):
            self.lines[name] = given[n + each * i : n + each * (i + 1)]
        n += each * len(activations)
        self.weights = dict(zip(weights, given[n : n + len(weights)], strict=True))
        n += len(weights)
        self.own: dict[str | None, Any] = dict(zip(activations, given[n:-2], strict=True)) if mixed else {}
        self.lines[None] = (None, given[-2], None, given[-1])

    def mixed_lines(self, activation: str | None, part: slice) -> tuple[_Lines, _Lines]:
        """Both lines; and the weights of some rows, with what the second lower line is more."""
        lines, own = self.lines[activation], self.own.get(activation)
        return lines[:4], (None if own is None else own[part], *(lines[4:] or (None, None)))


def maps_each(mixed: bool) -> int:
    """Maps of an activation's lines."""
    return 6 if mixed else 4


class Workspace:
    """Room for the coefficients of `count` rows at a time: the same for all, or, kept, each with its own."""

    lays_matrices: ClassVar[bool] = True

    def __init__(
        self, rows: Sequence[RowShape], layout: Layout, tensors: PassTensors, count: int, arena: Tensor, gradient: bool
    ) -> None:
        self.rows, self.layout, self.tensors, self.count = rows, layout, tensors, count
        # `data`: what is written here is nobody's to watch.
        self.arenas = arena.data.view(-1, count * layout.numbers)
        self.turned: dict[str, Tensor] = {}
        self.back: dict[str, Tensor] = {}
        for name, w in tensors.weights.items():
            if w.dim() == 2 and self.lays_matrices and count >= MANY:
                self.turned[name] = w
                if gradient:
                    self.back[name] = w.mT.contiguous()
            elif w.dim() == 4:
                self.turned[name] = self._turned(w)
                if gradient:
                    self.back[name] = self._back(w)

    def _turned(self, w: Tensor) -> Tensor:
        """A convolution's weight [out, in, kh, kw] as the kernel of its transpose reads it."""
        return w.permute(2, 0, 3, 1).flatten(2).contiguous()

    def _back(self, w: Tensor) -> Tensor:
        """As the kernel of the gradient reads it."""
        return w.permute(2, 3, 1, 0).flatten(1, 2).contiguous()

    def finish(self, sums: PassTensors) -> None:
        """Add up what all parts have left behind."""

    def parts(self, neurons: Neurons | EveryNeuron, column: Tensor) -> Iterator[RowsAtWork]:
        """As many rows at a time as there is room for; column [n]: what their bounds are added to, or its gradient."""
        n = neurons.count
        for i, start in enumerate(range(0, n, self.count)):
            part = slice(start, min(n, start + self.count))
            yield RowsAtWork(self, self.arenas[i % len(self.arenas)], part, *neurons.part(part), column[part])


@dataclass(frozen=True, slots=True)
class RowsAtWork:
    """Some rows in the workspace."""

    space: Workspace
    arena: Tensor
    """Where their coefficients lie."""
    part: slice
    place: Tensor
    """Example and place in the grid, [n, 3]."""
    which: Tensor
    """Of the rows that several neurons share, [n]."""
    column: Tensor
    """What their bounds are added to, or its gradient, [n]."""

    @property
    def count(self) -> int:
        """n."""
        return self.part.stop - self.part.start

    def at(self, slot: int) -> Tensor:
        """The coefficients of a slot, [n, h, w, c]; shared rows as they were given."""
        stop = self.space.rows[slot].stop
        if stop is None:
            return self._view(slot, self.space.layout.offsets)
        given: Tensor = self.space.tensors.stops[stop]
        return given

    def gradient(self, slot: int) -> Tensor:
        """The gradient of a slot's coefficients, [n, h, w, c]."""
        return self._view(slot, self.space.layout.gradients)

    def _view(self, slot: int, offsets: Sequence[int]) -> Tensor:
        rows, first = self.space.rows[slot], offsets[slot] * self.space.count
        return self.arena[first : first + self.count * rows.numbers].view(self.count, *rows.shape)

    def unread(self) -> RowsAtWork:
        """The same rows once more, for their coefficients alone."""
        return replace(self, column=torch.zeros_like(self.column))

    def spare(self, like: Tensor) -> Tensor:
        """Room of the shape of one slot's gradient, until it is asked for again."""
        return torch.empty_like(like)

    def shared(self, slot: int) -> Tensor | None:
        """Which of the shared rows each is, where a slot holds such."""
        return None if self.space.rows[slot].stop is None else self.which

    def selected(self, slot: int) -> Tensor:
        """Shared rows, one a neuron."""
        return self.at(slot).index_select(0, self.which)

    def corners(self, slot: int) -> Tensor:
        """Corner of each row's window in the image, [n, 1, 2]."""
        return self.space.rows[slot].frame.corners(self.place[: self.count, 1:])[:, None].contiguous()

    def frame(self, slot: int) -> tuple[int, ...]:
        """A slot's window as the kernels take it."""
        rows = self.space.rows[slot]
        frame = rows.frame
        if frame.whole:
            return (*rows.shape, *frame.size, 0, 0, 0, 0)
        return (*rows.shape, *frame.image, *frame.stride, *frame.offset)

    def call(self, name: str, *given: Argument) -> None:
        """A kernel on all of these rows."""
        window_step.kernels().call(name, self.arena.dtype, self.count, *given)

    def relax(self, source: int, to: int | None, activation: str | None) -> None:
        """Through an activation; None: into the box of the input."""
        lines, weights = self.space.tensors.mixed_lines(activation, self.part)
        rows = self.at(source)
        given = (self.place, self.shared(source), rows, *lines, *weights, None if to is None else self.at(to))
        self.call("relax", len(rows), *self.frame(source), *given, self.column)

    def relax_back(self, source: int, to: int | None, activation: str | None, found: Tensor, sums: PassTensors) -> None:
        """The gradient of `relax`, to `found` and `sums`."""
        lines, weights = self.space.tensors.mixed_lines(activation, self.part)
        more, to_weights = sums.mixed_lines(activation, self.part)
        grad = None if to is None else self.gradient(to)
        rows = self.at(source)
        given = (self.place, self.shared(source), rows, *lines, *weights, grad, self.column, found)
        self.call("relax_back", len(rows), *self.frame(source), *given, *more, *to_weights)

    def spread(self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair) -> None:
        """Through the transpose of a convolution."""
        sizes = self._sizes(source, to, weight, g, corner)
        self.call("spread", *sizes, self.at(source), self.space.turned[weight], self.at(to))

    def spread_back(
        self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair, found: Tensor, sums: PassTensors
    ) -> None:
        """The gradient of `spread`."""
        into = sums.weights[weight]
        turned = None if into is None else into.new_zeros(self.space.turned[weight].shape)
        sizes = self._sizes(source, to, weight, g, corner)
        self.call("back", *sizes, self.at(source), self.gradient(to), self.space.back[weight], found, turned)
        if into is not None and turned is not None:
            (kh, out, run), kw = turned.shape, into.shape[3]
            into += turned.view(kh, out, kw, run // kw).permute(1, 3, 0, 2)

    def _sizes(self, source: int, to: int, weight: str, g: ConvGeometry, corner: Pair) -> tuple[int, ...]:
        out, into, kh, kw = self.space.tensors.weights[weight].shape
        before, behind = self.space.rows[to].frame.size, self.space.rows[source].frame.size
        return (*behind, out, into, kh, kw, *g.stride, g.dilation[0], *corner, *before)

    def multiply(self, source: int, to: int, weight: str) -> None:
        """Through a matrix."""
        turned = self.space.turned.get(weight)
        self._product(self.at(source), self.space.tensors.weights[weight], turned, self.at(to))

    def multiply_back(self, source: int, to: int, weight: str, found: Tensor, sums: PassTensors) -> None:
        """The gradient of `multiply`."""
        grad, into = self.gradient(to), sums.weights[weight]
        self._product(grad, self.space.tensors.weights[weight].mT, self.space.back.get(weight), found)
        if into is not None:
            into.addmm_(self.at(source).flatten(1).mT, grad.flatten(1))

    def _product(self, a: Tensor, w: Tensor, laid: Tensor | None, found: Tensor) -> None:
        """Rows times a matrix; laid: the same as the compiled product reads it."""
        if laid is None:
            torch.mm(a.flatten(1), w, out=found.view(self.count, -1))
        else:
            self.call("multiply", *laid.shape, a, laid, found)

    def add_shared(self, slot: int, total: Tensor) -> None:
        """Gradients of rows that several neurons share, added up."""
        total.index_add_(0, self.which, self.gradient(slot))

    def finish(self) -> None:
        """Bounds are where they were asked for."""


class TracedRows:
    """All rows, and coefficients that autograd follows."""

    def __init__(
        self, rows: Sequence[RowShape], tensors: PassTensors, neurons: Neurons | EveryNeuron, constant: Tensor
    ) -> None:
        self.rows, self.tensors, self.constant = rows, tensors, constant
        self.place, self.which = neurons.part(slice(0, neurons.count))
        self.kept: dict[int, Tensor] = {}

    def at(self, slot: int) -> Tensor:
        """The coefficients of a slot, [n, h, w, c]."""
        stop = self.rows[slot].stop
        return self.kept[slot] if stop is None else self.tensors.stops[stop][self.which]
