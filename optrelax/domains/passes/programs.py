"""The program of a target: the steps of its rows, and where their coefficients lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optrelax.domains.frames import Plan
from optrelax.domains.passes.folding import channels_last
from optrelax.domains.passes.neurons import EveryNeuron, Neurons
from optrelax.domains.passes.steps import PassStep, seen_at
from optrelax.domains.passes.workspace import KEPT, KEPT_HIDDEN, Layout, PassTensors, RowShape, most_bytes
from optrelax.kernels.convolutions import Pair
from optrelax.kernels.window_step import scatter
from optrelax.networks.ops import flatten_from


@dataclass(slots=True)
class Program:
    """The steps of a target's rows, and where their coefficients lie in the workspace."""

    target: str
    grid: Pair
    windows: bool
    """Whether each place of a map has rows of its own; else rows begin in the target's own shape."""
    before: Plan
    """Frames of the affine ops between the target and the first activations, `stops`."""
    stops: tuple[str, ...]
    rows: list[RowShape]
    steps: list[PassStep]
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    entry: str
    """Node at which rows end in the box: the input, or what diagonal ops make of it."""
    layouts: dict[bool, Layout] = field(default_factory=dict)
    makers: dict[int, str] = field(init=False)
    """Activations by the slot that holds what came out of them."""
    readers: dict[int, str | None] = field(init=False)
    """Activations by the slots that these alone read, perhaps behind sums; None: any other step does, too."""

    def __post_init__(self) -> None:
        self.makers, self.readers = {}, {}
        for step in reversed(self.steps):
            reader = self.readers.get(step.to) if step.aligns and step.to is not None else step.relaxes
            for slot in step.sources:
                self.readers[slot] = reader if self.readers.get(slot, reader) == reader else None
            if step.to is not None and step.relaxes is not None:
                self.makers[step.to] = step.relaxes

    def layout(self, gradient: bool) -> Layout:
        """Where coefficients and, where wanted, their gradients lie."""
        if gradient not in self.layouts:
            self.layouts[gradient] = _lay_out(self.rows, self.steps, gradient)
        return self.layouts[gradient]

    @property
    def depth(self) -> int:
        """Convolutions on the way."""
        return sum(step.convolves for step in self.steps)

    @property
    def weighed(self) -> dict[str, RowShape]:
        """Rows at each activation: the shape of weights that a row has of its own there."""
        met = [(step.relaxes, step.source) for step in self.steps]
        return {name: self.rows[source] for name, source in met if name is not None}

    @property
    def shared(self) -> int:
        """Numbers of one row before the first activations."""
        return sum(rows.numbers for rows in self.rows if rows.stop is not None)

    def numbers(self, gradient: bool) -> int:
        """Numbers alive at once, of one row."""
        return self.layout(gradient).numbers

    def by_name(self, given: Sequence[Tensor | None], mixed: bool) -> PassTensors:
        """A call's tensors, or the sums of their gradients, which stand in the order in which they were given."""
        return PassTensors(self.stops, self.activations, self.weights, given, mixed)

    def at_once(self, like: Tensor, room: float, gradient: bool) -> int:
        """Rows that the workspace holds; one is the least."""
        most = int(min(room, most_bytes()))
        return max(1, most // (self.numbers(gradient) * like.element_size()))

    def bytes_taken(self, n: int, given: int, size: int, hidden: bool) -> tuple[int, int]:
        """Bytes of n rows that are kept for a gradient, and of those alive beside them at once.

        given: shared rows before the first activations; size: of a number.
        """
        gradient = torch.is_grad_enabled()
        each = self.numbers(gradient) * size
        shared = given * size * self.shared
        kept = 2 * size * n + shared
        if gradient and self.keeps(n, size, hidden):
            return kept + n * each, shared
        return kept, shared + min(n * each, max(each, most_bytes()))

    def keeps(self, n: int, size: int, hidden: bool) -> bool:
        """Whether the coefficients of n rows are kept for a gradient: all at once or, where there is room, in parts."""
        return n * self.numbers(gradient=True) * size <= (KEPT_HIDDEN if hidden else KEPT)

    def units(self, shape: Sequence[int]) -> int:
        """Entries of a target that rows of its own tell apart: channels of a map, or all."""
        return shape[0] if self.windows else math.prod(shape)

    def unit_rows(self, shape: Sequence[int], like: Tensor, entries: Tensor | None = None) -> Tensor:
        """One row up and one down a channel of a map, or an entry of another target, as `lower_bounds` takes them.

        entries: of some channels or entries alone.
        """
        n = self.units(shape)
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        rows = torch.cat([eye, -eye]) if entries is None else torch.cat([eye[entries], -eye[entries]])
        return rows.reshape(1, -1, 1, 1, n) if self.windows else rows.reshape(1, -1, *shape)

    def every_neuron(self, rows: Tensor, batch: int) -> EveryNeuron:
        """Unit rows of every entry of a target: example, place, side, channel."""
        return EveryNeuron(batch, self.before.places(rows.device)[0], rows.shape[1])

    def some_neurons(self, wanted: Tensor) -> tuple[Neurons, tuple[Tensor, ...]]:
        """Both unit rows of the entries of a target that are wanted, [batch, *shape], bool; and where these are.

        Neighbours stay together, so that they read the same lines.
        """
        if self.windows:
            example, y, x, entry = wanted.permute(0, 2, 3, 1).nonzero(as_tuple=True)
            index: tuple[Tensor, ...] = (example, entry, y, x)
        else:
            example, entry = flatten_from(wanted, 1).nonzero(as_tuple=True)
            index = wanted.nonzero(as_tuple=True)
            y = x = torch.zeros_like(example)
        place = torch.stack([example, y, x], 1).repeat_interleave(2, 0)
        entries, which = entry.unique(return_inverse=True)
        return Neurons(place, torch.stack([which, which + len(entries)], 1).flatten(), entries=entries), index

    def seen_by(self, name: str, maps: Tensor, neurons: Neurons) -> Tensor:
        """What each row sees of its example's map at an activation: [batch, *shape] -> [n, high, wide, channels]."""
        return seen_at(channels_last(maps).contiguous(), self.weighed[name].frame, neurons.place)

    def on_maps(self, name: str, windows: Tensor, neurons: Neurons) -> Tensor:
        """Windows [n, high, wide, channels] on maps of their own, 0 elsewhere: [n, channels, *image]."""
        frame = self.weighed[name].frame
        if not frame.whole:
            corners = frame.corners(neurons.place[:, 1:])[:, None].contiguous()
            windows = scatter(windows[:, None].contiguous(), corners, frame.image, windows.shape[0])
        return windows.permute(0, 3, 1, 2)


def _lay_out(rows: Sequence[RowShape], steps: Sequence[PassStep], gradient: bool) -> Layout:
    """Where coefficients lie: each as long as a later step reads it, backward too where there is a gradient."""
    end = 2 * len(steps)
    born: dict[tuple[int, bool], int] = {}
    last: dict[tuple[int, bool], int] = {}

    def use(slot: int | None, time: int, back: bool = False) -> None:
        if slot is not None and (rows[slot].stop is None or back):
            born[slot, back] = min(time, born.get((slot, back), time))
            last[slot, back] = max(time, last.get((slot, back), time))

    for i, step in enumerate(steps):
        for slot in (*step.sources, step.to):
            use(slot, i)
            if gradient:
                use(slot, end - 1 - i)
                use(slot, end - 1 - i, back=True)
    offsets = {False: [0] * len(rows), True: [0] * len(rows)}
    taken: list[tuple[int, int, int]] = []  # first, behind the last, until when
    most = 0
    for (slot, back), time in sorted(born.items(), key=lambda item: item[1]):
        alive = sorted((a, b) for a, b, until in taken if until >= time)
        at, size = 0, rows[slot].numbers
        for a, b in alive:
            if a - at >= size:
                break
            at = max(at, b)
        offsets[back][slot] = at
        taken.append((at, at + size, last[slot, back]))
        most = max(most, at + size)
    return Layout(offsets[False], offsets[True], most)
