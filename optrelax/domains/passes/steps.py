"""The steps of rows on their way back: each compiled, its gradient by hand, and once more as autograd follows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.frames import Frame
from optrelax.domains.lines import Lines
from optrelax.domains.passes.workspace import PassTensors, RowsAtWork, TracedRows
from optrelax.kernels.convolutions import ConvGeometry, Pair
from optrelax.kernels.relax_step import least_over_box, relax_step
from optrelax.kernels.window_step import gather, scatter, spread


@dataclass(frozen=True, slots=True)
class PassStep(ABC):
    """Coefficients of a slot become those of another."""

    convolves: ClassVar[bool] = False
    aligns: ClassVar[bool] = False
    """Whether it only brings rows to one frame, so that what reads `to` reads its sources."""

    source: int
    to: int | None

    @property
    def relaxes(self) -> str | None:
        """The activation that it goes through."""
        return None

    @property
    def sources(self) -> tuple[int, ...]:
        """Slots that it reads."""
        return (self.source,)

    @abstractmethod
    def forward(self, work: RowsAtWork) -> None:
        """Write the coefficients of `to`; add to the bounds."""

    @abstractmethod
    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        """Write the gradient of a slot that it reads to `found`; add those of tensors to theirs."""

    @abstractmethod
    def trace(self, work: TracedRows) -> None:
        """`forward` by operations that can be differentiated again."""


@dataclass(frozen=True, slots=True)
class RelaxStep(PassStep):
    """Through an activation; or, without one, into the box of the input."""

    activation: str | None

    @property
    def relaxes(self) -> str | None:
        return self.activation

    def forward(self, work: RowsAtWork) -> None:
        work.relax(self.source, self.to, self.activation)

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        work.relax_back(slot, self.to, self.activation, found, sums)

    def trace(self, work: TracedRows) -> None:
        frame, a = work.rows[self.source].frame, work.at(self.source)
        maps = work.tensors.lines[self.activation]
        lines = [None if t is None else seen_at(t, frame, work.place) for t in maps]
        if self.activation in work.tensors.own:
            own = work.tensors.own[self.activation]
            slope, intercept = (lines[i] + own * lines[i + 4] for i in (0, 1))
            lines = [slope, intercept, *lines[2:4]]
        if self.to is None:
            low, high = lines[1], lines[3]
            assert low is not None
            assert high is not None
            work.constant = work.constant + least_over_box(a[:, None], low, high)[:, 0]
            return
        pulled, more = relax_step(a[:, None], Lines(*lines))  # type: ignore[arg-type]
        work.constant = work.constant + more[:, 0]
        work.kept[self.to] = pulled[:, 0]


@dataclass(frozen=True, slots=True)
class ConvolutionStep(PassStep):
    """Through the transpose of a convolution, of whose reach `corner` says what is kept."""

    convolves: ClassVar[bool] = True
    to: int
    weight: str
    geometry: ConvGeometry
    corner: Pair

    def forward(self, work: RowsAtWork) -> None:
        work.spread(self.source, self.to, self.weight, self.geometry, self.corner)

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        work.spread_back(slot, self.to, self.weight, self.geometry, self.corner, found, sums)

    def trace(self, work: TracedRows) -> None:
        weight, size = work.tensors.weights[self.weight], work.rows[self.to].frame.size
        work.kept[self.to] = spread(work.at(self.source), weight, self.geometry, self.corner, size)


@dataclass(frozen=True, slots=True)
class MatrixStep(PassStep):
    """Through a matrix."""

    to: int
    weight: str

    def forward(self, work: RowsAtWork) -> None:
        work.multiply(self.source, self.to, self.weight)

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        work.multiply_back(slot, self.to, self.weight, found, sums)

    def trace(self, work: TracedRows) -> None:
        pulled = work.at(self.source).flatten(1) @ work.tensors.weights[self.weight]
        work.kept[self.to] = pulled.view(-1, *work.rows[self.to].shape)


@dataclass(frozen=True, slots=True)
class SelectionStep(PassStep):
    """Shared rows, one a neuron."""

    to: int

    def forward(self, work: RowsAtWork) -> None:
        work.at(self.to).copy_(work.selected(self.source))

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        found.copy_(work.gradient(self.to))

    def trace(self, work: TracedRows) -> None:
        work.kept[self.to] = work.at(self.source)


@dataclass(frozen=True, slots=True)
class PaddingStep(PassStep):
    """A window as part of a greater one, at `corner`."""

    aligns: ClassVar[bool] = True
    to: int
    corner: Pair

    def forward(self, work: RowsAtWork) -> None:
        a, to = work.at(self.source), work.at(self.to)
        to.zero_()
        self._inside(to, a.shape).copy_(a)

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        found.copy_(self._inside(work.gradient(self.to), found.shape))

    def trace(self, work: TracedRows) -> None:
        a, (tall, wide), (top, left) = work.at(self.source), work.rows[self.to].frame.size, self.corner
        below, right = tall - top - a.shape[1], wide - left - a.shape[2]
        work.kept[self.to] = F.pad(a, (0, 0, left, right, top, below))

    def _inside(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """The part of windows [n, h, w, ...] that has the smaller one's shape."""
        (top, left), (high, wide) = self.corner, shape[1:3]
        return t[:, top : top + high, left : left + wide]


@dataclass(frozen=True, slots=True)
class ImageStep(PassStep):
    """A window as part of the whole image, where its place says."""

    aligns: ClassVar[bool] = True
    to: int

    def forward(self, work: RowsAtWork) -> None:
        a, size = work.at(self.source), work.space.rows[self.to].frame.size
        image = scatter(a.flatten(3)[:, None], work.corners(self.source), size, len(a))
        work.at(self.to).copy_(image.view(work.at(self.to).shape))

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        size = work.space.rows[slot].frame.size
        found.copy_(gather(work.gradient(self.to).flatten(3), work.corners(slot), size)[:, 0].view(found.shape))

    def trace(self, work: TracedRows) -> None:
        a, size = work.at(self.source), work.rows[self.to].frame.size
        corners = work.rows[self.source].frame.corners(work.place[:, 1:])[:, None]
        work.kept[self.to] = scatter(a[:, None], corners, size, len(a))


@dataclass(frozen=True, slots=True)
class SumStep(PassStep):
    """Where branches meet."""

    aligns: ClassVar[bool] = True
    to: int
    other: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source, self.other)

    def forward(self, work: RowsAtWork) -> None:
        torch.add(work.at(self.source), work.at(self.other), out=work.at(self.to))

    def backward(self, work: RowsAtWork, slot: int, found: Tensor, sums: PassTensors) -> None:
        found.copy_(work.gradient(self.to))

    def trace(self, work: TracedRows) -> None:
        work.kept[self.to] = work.at(self.source) + work.at(self.other)


def seen_at(maps: Tensor, frame: Frame, place: Tensor) -> Tensor:
    """Each row's window of its example's map: [n, h, w, c]."""
    own = maps[place[:, 0]]
    return own if frame.whole else gather(own, frame.corners(place[:, 1:])[:, None], frame.size)[:, 0]
