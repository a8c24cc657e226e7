"""The plan of a target's rows: a walk from it to the input that writes down the steps, once a network."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from optrelax.domains import frames
from optrelax.domains.frames import Frame, Plan
from optrelax.domains.passes.folding import arrival_of, channelwise, diagonal_to_input, folds, settled
from optrelax.domains.passes.programs import Program
from optrelax.domains.passes.steps import (
    ConvolutionStep,
    ImageStep,
    MatrixStep,
    PaddingStep,
    PassStep,
    RelaxStep,
    SelectionStep,
    SumStep,
)
from optrelax.domains.passes.workspace import RowShape
from optrelax.kernels import window_step
from optrelax.kernels.convolutions import pair
from optrelax.networks.graph import Graph, Network, Node
from optrelax.networks.images import Conv2d
from optrelax.networks.ops import Add, Linear, Reshape, Scale
from optrelax.regions import Region

DEPTH = 3
"""Convolutions on the way at least: through fewer, making few coefficients again costs more than it saves.

Of maps one does: the rows of a place go side by side, and few of their bounds have a gradient.
"""

_PROGRAMS: WeakKeyDictionary[Graph, dict[str, Program | None]] = WeakKeyDictionary()


def program(network: Network, target: str, depth: int | None = None) -> Program | None:
    """The steps for rows of a node; None where the rules have to do it, or do it as fast.

    depth: convolutions on the way at least; None: `DEPTH`, of maps one.
    Kept as long as the graph, which is another one as soon as the network is.
    """
    known = _PROGRAMS.setdefault(network.graph, {})
    if target not in known:
        try:
            known[target] = _Planner(network, target).program()
        except NoPassError:
            known[target] = None
    found = known[target]
    if found is None:
        return None
    least = (1 if found.windows else DEPTH) if depth is None else depth
    return found if found.depth >= least else None


def available(region: Region) -> bool:
    """Whether the compiled steps work on this region: boxes of numbers they know."""
    return region.as_box is not None and window_step.kernels().supports(region.like) and region.shape[0] > 0


class NoPassError(Exception):
    """The network has something on the way that no step here does."""


class _Planner:
    """Walks from a target to the input once, and writes down the steps."""

    def __init__(self, network: Network, target: str) -> None:
        self.network, self.target = network, target
        plan = frames.plan(network, target)
        self.plan = frames.plan_rows(network, target) if plan is None else plan
        self.places = plan is not None
        self.rows: list[RowShape] = []
        self.steps: list[PassStep] = []
        self.pending: dict[str, int] = {}
        self.weights: list[str] = []
        self.entry: str | None = None

    def program(self) -> Program:
        network = self.network
        stops, before = self._prefix()
        for name in stops:
            frame = before[name]
            if frame == "rows":
                frame = frames.whole((1, 1)) if len(network.shape_of(name)) == 1 else _refuse()
            self._send(name, self._add(RowShape(frame, network.shape_of(name)[0], stop=name)))
        activations = []
        for node in reversed(network.nodes):
            slot = self.pending.pop(node.name, None)
            if slot is None:
                continue
            if node.activation:
                activations.append(node.name)
                arrival = arrival_of(network, node.inputs[0])
                # Beyond the edges there are no lines.
                found = self._add(RowShape(replace(self.rows[slot].frame, clean=True), self.rows[slot].channels))
                self.steps.append(RelaxStep(slot, found, node.name))
                self._send(arrival, found)
            else:
                self._affine(node, slot)
        slot = self.pending.pop(network.input, None)
        if slot is not None:
            self._end(network.input, slot)
        if self.entry is None:
            raise NoPassError
        plan = Plan(self.plan.grid, before)
        weights = tuple(dict.fromkeys(self.weights))
        return Program(
            self.target,
            self.plan.grid,
            self.places,
            plan,
            stops,
            self.rows,
            self.steps,
            tuple(activations),
            weights,
            self.entry,
        )

    def _prefix(self) -> tuple[tuple[str, ...], dict[str, frames.Seen]]:
        """The first activations before the target, and frames up to them."""
        network = self.network
        seen, stops = {self.target}, []
        for node in reversed(network.nodes):
            if node.name not in seen:
                continue
            if node.activation:
                stops.append(node.name)
                continue
            if not node.affine or network.input in node.inputs:
                raise NoPassError
            seen.update(node.inputs)
        before = frames.between(network, self.target, frozenset(stops), self.places)
        for name, frame in before.items():
            # Rows that all places share are the same at the edges, too.
            if not self.places:
                continue
            if frame != "rows" and frame.whole:
                raise NoPassError
            if name in stops:
                continue
            node, scale = network[name], network[name].of(Scale)
            if frame == "rows" or not (node.of(Conv2d) or scale or node.of(Add)):
                raise NoPassError
            if not (frame.clean or frame.inside(self.plan.grid)) or (scale and not channelwise(scale)):
                raise NoPassError
        return tuple(stops), before

    def _add(self, rows: RowShape) -> int:
        self.rows.append(rows)
        return len(self.rows) - 1

    def _affine(self, node: Node, slot: int) -> None:
        network, scale = self.network, node.of(Scale)
        if (add := node.of(Add)) and all(sign == 1 for sign in add.signs):
            self._settled(node)
            for name in node.inputs:
                self._send(name, slot)
        elif convolution := node.of(Conv2d):
            self._settled(node)
            self._convolve(node, convolution, slot)
        elif node.of(Linear) and len(node.shape) == 1:
            self._settled(node)
            self._multiply(node, slot)
        elif scale and diagonal_to_input(network, node):
            self._end(node.name, slot)
        elif scale and channelwise(scale) and folds(network, node):
            # What stands behind a convolution alone goes into its weights.
            self._settled(node)
            self._send(node.inputs[0], slot)
        else:
            raise NoPassError

    def _settled(self, node: Node) -> None:
        """Its bias goes into the lines behind it, or there is none."""
        assert node.affine
        if node.affine.bias(torch.zeros((), device="cpu")) is not None and node.name not in settled(self.network):
            raise NoPassError

    def _convolve(self, node: Node, op: Conv2d, slot: int) -> None:
        rows, g = self.rows[slot], op.geometry
        frame = rows.frame
        if g.groups != 1 or g.dilation[1] != 1 or not (frame.clean or frame.inside(self.plan.grid)):
            raise NoPassError
        self.weights.append(node.name)
        channels, *image = op.input_shapes[0]
        before = frame.back(op.kernel, g)
        if not frame.whole:
            seen = Frame((image[0], image[1]), before.size, before.stride, before.offset, clean=False)
            found = self._add(RowShape(seen, channels))
            self.steps.append(ConvolutionStep(slot, found, node.name, g, (0, 0)))
        else:
            # Pixels of the image that no window reads lie beyond what the transpose gives.
            size = pair(min(n, m - p) for n, m, p in zip(image, before.size, g.padding, strict=True))
            seen = Frame((image[0], image[1]), size, (0, 0), (0, 0), whole=True)
            found = self._add(RowShape(seen, channels))
            self.steps.append(ConvolutionStep(slot, found, node.name, g, (g.padding[0], g.padding[1])))
        self._send(node.inputs[0], found)

    def _multiply(self, node: Node, slot: int) -> None:
        self.weights.append(node.name)
        name = node.inputs[0]
        shape = self.network.shape_of(name)
        if name != self.network.input and self.network[name].of(Reshape):
            name = self.network[name].inputs[0]
            shape = self.network.shape_of(name)
        if len(shape) not in (1, 3):
            raise NoPassError
        image = (1, 1) if len(shape) == 1 else (shape[1], shape[2])
        found = self._add(RowShape(frames.whole(image), shape[0]))
        self.steps.append(MatrixStep(slot, found, node.name))
        self._send(name, found)

    def _end(self, name: str, slot: int) -> None:
        if self.entry not in (None, name):
            raise NoPassError
        self.entry = name
        self.steps.append(RelaxStep(slot, None, None))

    def _send(self, name: str, slot: int) -> None:
        """Hand rows to a node in the frame that it expects, where branches meet their sum."""
        wanted = self.plan.frames.get(name, "rows")
        if len(self.network.shape_of(name)) == 1:
            wanted = frames.whole((1, 1))
        if name == self.network.input and wanted == "rows" and self.rows[slot].frame.whole:
            wanted = self.rows[slot].frame  # a matrix reads the image
        if wanted == "rows":
            raise NoPassError
        slot = self._adapted(slot, wanted)
        if name in self.pending:
            first = self._taken(self.pending[name])
            slot = self._taken(slot)
            frame = self.rows[slot].frame
            clean = frame.clean and self.rows[first].frame.clean
            found = self._add(RowShape(replace(frame, clean=clean), self.rows[slot].channels))
            self.steps.append(SumStep(first, found, slot))
            slot = found
        self.pending[name] = slot

    def _adapted(self, slot: int, wanted: Frame) -> int:
        rows = self.rows[slot]
        seen = rows.frame
        if (seen.offset, seen.size, seen.whole) == (wanted.offset, wanted.size, wanted.whole):
            return slot
        slot = self._taken(slot)
        if wanted.whole and not seen.whole:
            found = self._add(RowShape(replace(wanted, clean=True), rows.channels))
            self.steps.append(ImageStep(slot, found))
        else:
            (y, x), (top, left) = seen.offset, wanted.offset
            found = self._add(RowShape(replace(wanted, clean=seen.clean), rows.channels))
            self.steps.append(PaddingStep(slot, found, (y - top, x - left)))
        return found

    def _taken(self, slot: int) -> int:
        rows = self.rows[slot]
        if rows.stop is None:
            return slot
        found = self._add(RowShape(rows.frame, rows.channels))
        self.steps.append(SelectionStep(slot, found))
        return found


def _refuse() -> Frame:
    raise NoPassError
