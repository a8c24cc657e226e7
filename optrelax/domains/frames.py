"""Frames: which part of each map the rows of a neuron see, planned back from the map that the neuron stands in.

A neuron of a convolutional map reads a window of every map before it, a neuron one place to the right the window one
stride to the right. So its rows are small images, of one size for all places; the frame says where they lie. Once a
window would hold as many entries as its map, the rows become whole images; behind an op that has no rule here they are
rows of any op. Everything about a walk that shapes alone decide is decided here, before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from optrelax.domains.rules import find_rule, rule
from optrelax.kernels.convolutions import ConvGeometry, Pair, pair
from optrelax.kernels.window_step import extent
from optrelax.memory import Pull
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.images import AveragePool2d, Conv2d
from optrelax.networks.ops import Add, Reshape, Scale, Shape
from optrelax.networks.views import Concatenate


@dataclass(frozen=True, slots=True)
class Frame:
    """Windows of a map [c, high, wide]: the one of place p begins at pixel p * stride + offset, at an edge below 0."""

    image: Pair
    size: Pair
    stride: Pair = (1, 1)
    offset: Pair = (0, 0)
    clean: bool = True
    """Whether coefficients beyond the map's edges are 0; else they mean nothing."""
    whole: bool = False
    """One window for all places: the map itself, of every row of an example."""

    def inside(self, grid: Pair) -> bool:
        """Whether no window of a grid of places leaves the map."""
        numbers = zip(self.image, self.size, self.stride, self.offset, grid, strict=True)
        return self.whole or all(o >= 0 and (g - 1) * s + o + k <= n for n, k, s, o, g in numbers)

    def corners(self, places: Tensor) -> Tensor:
        """First pixel of each place's window: places [batch or 1, count, 2] -> the same."""
        sides = zip(places.unbind(-1), self.stride, self.offset, strict=True)
        return torch.stack([place * stride + offset for place, stride, offset in sides], -1)

    def back(self, kernel: Pair, g: ConvGeometry) -> Frame:
        """The frame of a convolution's input map, its image not known yet; the padding moves it."""
        stride = pair(s * t for s, t in zip(self.stride, g.stride, strict=True))
        offset = pair(o * t - p for o, t, p in zip(self.offset, g.stride, g.padding, strict=True))
        return Frame((0, 0), extent(self.size, kernel, g), stride, offset, clean=False, whole=self.whole)


def whole(image: Pair) -> Frame:
    """The map itself."""
    return Frame(image, image, (0, 0), (0, 0), whole=True)


Seen = Frame | Literal["rows"]
"""Where a node's coefficients lie: windows or whole images, channels last, or rows in the node's own shape."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Frames of every node between a map and the input."""

    grid: Pair
    """High and wide: places of the map that the rows start from."""
    frames: Mapping[str, Seen]

    def places(self, device: torch.device) -> Tensor:
        """Every place of the grid: [1, places, 2]."""
        axes = [torch.arange(n, device=device) for n in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 2)


def plan(network: Network, target: str) -> Plan | None:
    """Frames for the rows of every neuron of a map; None where the target is no map or has no window to see."""
    if not _is_map(network, target):
        return None
    shape = network.shape_of(target)
    return Plan((shape[1], shape[2]), _walk(network, target, Frame((shape[1], shape[2]), (1, 1))))


def plan_rows(network: Network, target: str) -> Plan:
    """Frames for rows that begin in a node's own shape: whole images through convolutions."""
    return Plan((1, 1), _walk(network, target, "rows"))


def between(network: Network, target: str, stops: frozenset[str], windows: bool) -> dict[str, Seen]:
    """Frames from a target to the nodes of `stops` only: of the rows of its neurons, or of rows in its own shape.

    Windows stay windows there, whatever they outgrow, so that all places share their rows.
    """
    shape = network.shape_of(target)
    return _walk(network, target, Frame((shape[1], shape[2]), (1, 1)) if windows else "rows", stops)


def _walk(network: Network, target: str, first: Seen, stops: frozenset[str] | None = None) -> dict[str, Seen]:
    frames: dict[str, Seen] = {target: first}
    for node in reversed(network.nodes):
        seen = frames.get(node.name)
        if seen is None or (stops is not None and node.name in stops):
            continue
        step = find_rule(node.op, Frame)
        for name in node.inputs:
            shape = network.shape_of(name)
            found: Seen = "rows"
            if seen != "rows":
                assert step is not None
                before: Frame = step(node.op, seen)
                fixed = stops is not None and not before.whole
                found = replace(before, image=(shape[1], shape[2])) if fixed else _within(before, shape)
            elif node.of(Reshape) and _is_map(network, name):
                found = whole((shape[1], shape[2]))
            if name != network.input and not _windowed(network[name]):
                found = "rows"
            frames[name] = found if name not in frames else _joined(frames[name], found)
    return frames


def _is_map(network: Network, name: str) -> bool:
    """Whether a node's value is a map of more than one pixel, that an op with windows gives."""
    shape = network.shape_of(name)
    if name == network.input or len(shape) != 3 or shape[1] * shape[2] < 2:
        return False
    return _windowed(network[name])


def _windowed(node: Node) -> bool:
    """Whether rows go through a node as windows; maps that are joined have to be joined along their channels."""
    joined = node.of(Concatenate)
    return find_rule(node.op, Frame) is not None and (joined is None or joined.dim == 0)


def _within(frame: Frame, shape: Shape) -> Frame:
    """The frame on a map of this shape, which it may have outgrown."""
    image = shape[1], shape[2]
    if frame.whole or math.prod(frame.size) >= math.prod(image):
        return whole(image)
    return replace(frame, image=image)


def _joined(a: Seen, b: Seen) -> Seen:
    """The frame where two branches meet."""
    if a == "rows" or b == "rows":
        return "rows"
    if a.whole or b.whole or a.stride != b.stride:
        return whole(a.image)
    first = [min(p, q) for p, q in zip(a.offset, b.offset, strict=True)]
    last = [max(p + m, q + n) for p, m, q, n in zip(a.offset, a.size, b.offset, b.size, strict=True)]
    size = pair(n - m for m, n in zip(first, last, strict=True))
    joined = Frame(a.image, size, a.stride, pair(first), a.clean and b.clean)
    return whole(a.image) if math.prod(size) >= math.prod(a.image) else joined


@rule(Conv2d, domain=Frame)
def _convolution(op: Conv2d, frame: Frame) -> Frame:
    return frame.back(op.kernel, op.geometry)


@rule(AveragePool2d, domain=Frame)
def _average(op: AveragePool2d, frame: Frame) -> Frame:
    return frame.back(op.kernel, op.geometry)


@rule(Scale, domain=Frame)
def _scale(op: Scale, frame: Frame) -> Frame:
    return frame


@rule(Add, domain=Frame)
def _add(op: Add, frame: Frame) -> Frame:
    return frame


@rule(Concatenate, domain=Frame)
def _concatenate(op: Concatenate, frame: Frame) -> Frame:
    return frame


@rule(Activation, domain=Frame)
def _activation(op: Activation, frame: Frame) -> Frame:
    return replace(frame, clean=True)  # lines are 0 beyond the edges


def pull(network: Network, found: Plan, batch: int, rows: int, *, outward: bool) -> Pull:
    """Numbers that one row of one place takes, a batch of them, among `rows` of its place.

    Until the first activation the places share their rows; there each place takes windows of the lines.
    """
    kept = passing = 0
    apart = False
    for node in reversed(network.nodes):
        seen = found.frames.get(node.name)
        if seen is None:
            continue
        own = batch * entries(node.shape, seen) if apart else 0
        apart = apart or node.activation
        made = batch * sum(entries(network.shape_of(n), found.frames[n]) for n in node.inputs) if apart else 0
        if node.activation and seen != "rows" and not seen.whole:
            kept += 4 * made // rows
        kept += own
        passing = max(passing, own + 2 * made + (own + made if outward else 0))
    return Pull(kept + batch * entries(network.input_shape, found.frames.get(network.input, "rows")), passing)


def cost(network: Network, found: Plan) -> int:
    """Multiply-adds of one row of one place."""
    total = 0
    for node in network.nodes:
        seen = found.frames.get(node.name)
        if seen is not None and node.affine and (each := node.affine.cost()):
            total += each * entries(node.shape, seen) // math.prod(node.shape)
    return total


def entries(shape: tuple[int, ...], seen: Seen) -> int:
    """Numbers of one row of one place at a node of this shape."""
    return shape[0] * math.prod(seen.size) if seen != "rows" else math.prod(shape)
