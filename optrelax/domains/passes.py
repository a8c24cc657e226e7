"""Back-substitution through convolutions planned once: a list of compiled steps, run on some rows at a time.

The rules of `backsubstitution` and `windows` keep every coefficient of a target's rows until its gradient has been
taken: gigabytes, which the machine hands out page by page. Here the same products are made for as many rows as fit a
small workspace, and made again for the gradient, which is written by hand. A row is any neuron of the target, of any
example: all of a map, or those that matter. To nearest, on a CPU with a compiler, for convolutions without groups; what
has no step here is left to the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains import backsubstitution, frames
from optrelax.domains.backsubstitution import Enclosure
from optrelax.domains.frames import Frame, Plan
from optrelax.domains.lines import Lines
from optrelax.kernels import window_step
from optrelax.kernels.convolutions import ConvGeometry, Pair
from optrelax.kernels.relax_step import least_over_box, relax_step
from optrelax.kernels.window_step import gather, scatter, spread
from optrelax.networks.activations import Activation, Line
from optrelax.networks.graph import Graph, Network, Node
from optrelax.networks.ops import Add, Affine, Conv2d, Linear, Reshape, Scale
from optrelax.regions import InputBox, Region

WORKSPACE = 2**22
"""Bytes of coefficients that are alive at once, a thread: about its second cache. One row is the least."""

DEPTH = 3
"""Convolutions on the way at least: through fewer, making few coefficients again costs more than it saves."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Coefficients on their way: one window a row."""

    frame: Frame
    channels: int
    stop: str | None = None
    """Given by the caller: rows that several neurons share."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.frame.size, self.channels)

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Relax:
    """Through an activation; or, without one, into the box of the input."""

    source: int
    to: int | None
    activation: str | None


@dataclass(frozen=True, slots=True)
class _Convolve:
    """Through the transpose of a convolution, of whose reach `corner` says what is kept."""

    source: int
    to: int
    weight: str
    geometry: ConvGeometry
    corner: Pair


@dataclass(frozen=True, slots=True)
class _Multiply:
    """Through a matrix."""

    source: int
    to: int
    weight: str


@dataclass(frozen=True, slots=True)
class _Take:
    """Shared rows, one a neuron."""

    source: int
    to: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A window as part of a greater one, at `corner`; of the whole image (None) where its place says."""

    source: int
    to: int
    corner: Pair | None


@dataclass(frozen=True, slots=True)
class _Sum:
    """Where branches meet."""

    source: int
    other: int
    to: int


_Step = _Relax | _Convolve | _Multiply | _Take | _Place | _Sum


class _NoPassError(Exception):
    """The network has something on the way that no step here does."""


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
    rows: list[_Rows]
    steps: list[_Step]
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    entry: str
    """Node at which rows end in the box: the input, or what diagonal ops make of it."""
    layout: dict[bool, tuple[list[int], list[int], int]] = field(default_factory=dict)

    def lay_out(self, gradient: bool) -> tuple[list[int], list[int], int]:
        """Offsets, in numbers a row, of coefficients and of their gradients, and how many there are in all."""
        if gradient not in self.layout:
            self.layout[gradient] = _lay_out(self.rows, self.steps, gradient)
        return self.layout[gradient]

    @property
    def depth(self) -> int:
        """Convolutions on the way."""
        return sum(isinstance(step, _Convolve) for step in self.steps)

    @property
    def weighed(self) -> dict[str, _Rows]:
        """Rows at each activation: the shape of weights that a row has of its own there."""
        met = [(step.activation, step.source) for step in self.steps if isinstance(step, _Relax)]
        return {name: self.rows[source] for name, source in met if name is not None}

    @property
    def shared(self) -> int:
        """Numbers of one row before the first activations."""
        return sum(rows.numbers for rows in self.rows if rows.stop is not None)

    def numbers(self, gradient: bool) -> int:
        """Numbers alive at once, of one row."""
        return self.lay_out(gradient)[2]


def at_once(found: Program, like: Tensor, room: float, gradient: bool) -> int:
    """Rows that the workspace holds; one is the least."""
    most = int(min(room, WORKSPACE * torch.get_num_threads()))
    return max(1, most // (found.numbers(gradient) * like.element_size()))


def bytes_taken(found: Program, n: int, given: int, size: int) -> tuple[int, int]:
    """Bytes of n rows that are kept for a gradient, and of those alive beside them at once.

    given: shared rows before the first activations; size: of a number.
    """
    gradient = torch.is_grad_enabled()
    each = found.numbers(gradient) * size
    arena, most = n * each, WORKSPACE * torch.get_num_threads()
    shared = given * size * found.shared
    kept = 2 * size * n + shared
    if gradient and arena <= most:
        return kept + arena, shared
    return kept, shared + min(arena, max(each, most))


_PROGRAMS: WeakKeyDictionary[Graph, dict[str, Program | None]] = WeakKeyDictionary()


def program(network: Network, target: str, depth: int | None = None) -> Program | None:
    """The steps for rows of a node; None where the rules have to do it, or do it as fast.

    depth: convolutions on the way at least; None: `DEPTH`.
    Kept as long as the graph, which is another one as soon as the network is.
    """
    known = _PROGRAMS.setdefault(network.graph, {})
    if target not in known:
        try:
            known[target] = _Planner(network, target).program()
        except _NoPassError:
            known[target] = None
    found = known[target]
    return found if found is not None and found.depth >= (DEPTH if depth is None else depth) else None


def available(region: Region) -> bool:
    """Whether the compiled steps work on this region: boxes of numbers they know."""
    return isinstance(region, InputBox) and window_step.kernels().supports(region.lower) and region.shape[0] > 0


class _Planner:
    """Walks from a target to the input once, and writes down the steps."""

    def __init__(self, network: Network, target: str) -> None:
        self.network, self.target = network, target
        plan = frames.plan(network, target)
        self.plan = frames.plan_rows(network, target) if plan is None else plan
        self.places = plan is not None
        self.rows: list[_Rows] = []
        self.steps: list[_Step] = []
        self.pending: dict[str, int] = {}
        self.weights: list[str] = []
        self.entry: str | None = None

    def program(self) -> Program:
        network = self.network
        stops, before = self._prefix()
        for name in stops:
            frame = before[name]
            if not isinstance(frame, Frame):
                frame = frames.whole((1, 1)) if len(network.shape_of(name)) == 1 else _refuse()
            self._send(name, self._add(_Rows(frame, network.shape_of(name)[0], stop=name)))
        activations = []
        for node in reversed(network.nodes):
            slot = self.pending.pop(node.name, None)
            if slot is None:
                continue
            if isinstance(node.op, Activation):
                activations.append(node.name)
                arrival = arrival_of(network, node.inputs[0])
                # Beyond the edges there are no lines.
                found = self._add(_Rows(replace(self.rows[slot].frame, clean=True), self.rows[slot].channels))
                self.steps.append(_Relax(slot, found, node.name))
                self._send(arrival, found)
            else:
                self._affine(node, slot)
        slot = self.pending.pop(network.input, None)
        if slot is not None:
            self._end(network.input, slot)
        if self.entry is None:
            raise _NoPassError
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
            if isinstance(node.op, Activation):
                stops.append(node.name)
                continue
            if not isinstance(node.op, Affine) or network.input in node.inputs:
                raise _NoPassError
            seen.update(node.inputs)
        before = frames.between(network, self.target, frozenset(stops), self.places)
        for name, frame in before.items():
            # Rows that all places share are the same at the edges, too.
            if not self.places:
                continue
            if isinstance(frame, Frame) and frame.whole:
                raise _NoPassError
            if name in stops:
                continue
            op = network[name].op
            if not isinstance(frame, Frame) or not isinstance(op, (Conv2d, Scale, Add)):
                raise _NoPassError
            if not (frame.clean or frame.inside(self.plan.grid)) or (isinstance(op, Scale) and not _channelwise(op)):
                raise _NoPassError
        return tuple(stops), before

    def _add(self, rows: _Rows) -> int:
        self.rows.append(rows)
        return len(self.rows) - 1

    def _affine(self, node: Node, slot: int) -> None:
        network, op = self.network, node.op
        if isinstance(op, Add) and all(sign == 1 for sign in op.signs):
            self._settled(node)
            for name in node.inputs:
                self._send(name, slot)
        elif isinstance(op, Conv2d):
            self._settled(node)
            self._convolve(node, op, slot)
        elif isinstance(op, Linear) and len(op.shape) == 1:
            self._settled(node)
            self._multiply(node, slot)
        elif isinstance(op, Scale) and _diagonal_to_input(network, node):
            self._end(node.name, slot)
        elif isinstance(op, Scale) and _channelwise(op) and folds(network, node):
            # What stands behind a convolution alone goes into its weights.
            self._settled(node)
            self._send(node.inputs[0], slot)
        else:
            raise _NoPassError

    def _settled(self, node: Node) -> None:
        """Its bias goes into the lines behind it, or there is none."""
        assert isinstance(node.op, Affine)
        if node.op.bias(torch.zeros(())) is not None and node.name not in settled(self.network):
            raise _NoPassError

    def _convolve(self, node: Node, op: Conv2d, slot: int) -> None:
        rows, g = self.rows[slot], op.geometry
        frame = rows.frame
        if g.groups != 1 or g.dilation[1] != 1 or not (frame.clean or frame.inside(self.plan.grid)):
            raise _NoPassError
        self.weights.append(node.name)
        channels, *image = op.input_shapes[0]
        before = frame.back(op.kernel, g)
        if not frame.whole:
            seen = Frame((image[0], image[1]), before.size, before.stride, before.offset, clean=False)
            found = self._add(_Rows(seen, channels))
            self.steps.append(_Convolve(slot, found, node.name, g, (0, 0)))
        else:
            # Pixels of the image that no window reads lie beyond what the transpose gives.
            size = tuple(min(n, m - p) for n, m, p in zip(image, before.size, g.padding, strict=True))
            seen = Frame((image[0], image[1]), size, (0, 0), (0, 0), whole=True)  # type: ignore[arg-type]
            found = self._add(_Rows(seen, channels))
            self.steps.append(_Convolve(slot, found, node.name, g, g.padding))
        self._send(node.inputs[0], found)

    def _multiply(self, node: Node, slot: int) -> None:
        self.weights.append(node.name)
        name = node.inputs[0]
        shape = self.network.shape_of(name)
        if name != self.network.input and isinstance(self.network[name].op, Reshape):
            name = self.network[name].inputs[0]
            shape = self.network.shape_of(name)
        if len(shape) not in (1, 3):
            raise _NoPassError
        image = (1, 1) if len(shape) == 1 else (shape[1], shape[2])
        found = self._add(_Rows(frames.whole(image), shape[0]))
        self.steps.append(_Multiply(slot, found, node.name))
        self._send(name, found)

    def _end(self, name: str, slot: int) -> None:
        if self.entry not in (None, name):
            raise _NoPassError
        self.entry = name
        self.steps.append(_Relax(slot, None, None))

    def _send(self, name: str, slot: int) -> None:
        """Hand rows to a node in the frame that it expects, where branches meet their sum."""
        wanted = self.plan.frames.get(name)
        if len(self.network.shape_of(name)) == 1:
            wanted = frames.whole((1, 1))
        if name == self.network.input and not isinstance(wanted, Frame) and self.rows[slot].frame.whole:
            wanted = self.rows[slot].frame  # a matrix reads the image
        if not isinstance(wanted, Frame):
            raise _NoPassError
        slot = self._adapted(slot, wanted)
        if name in self.pending:
            first = self._taken(self.pending[name])
            slot = self._taken(slot)
            frame = self.rows[slot].frame
            clean = frame.clean and self.rows[first].frame.clean
            found = self._add(_Rows(replace(frame, clean=clean), self.rows[slot].channels))
            self.steps.append(_Sum(first, slot, found))
            slot = found
        self.pending[name] = slot

    def _adapted(self, slot: int, wanted: Frame) -> int:
        rows = self.rows[slot]
        seen = rows.frame
        if (seen.offset, seen.size, seen.whole) == (wanted.offset, wanted.size, wanted.whole):
            return slot
        slot = self._taken(slot)
        corner: Pair | None = None
        if not wanted.whole or seen.whole:
            corner = tuple(p - q for p, q in zip(seen.offset, wanted.offset, strict=True))  # type: ignore[assignment]
        found = self._add(_Rows(replace(wanted, clean=seen.clean or corner is None), rows.channels))
        self.steps.append(_Place(slot, found, corner))
        return found

    def _taken(self, slot: int) -> int:
        rows = self.rows[slot]
        if rows.stop is None:
            return slot
        found = self._add(_Rows(rows.frame, rows.channels))
        self.steps.append(_Take(slot, found))
        return found


def _refuse() -> Frame:
    raise _NoPassError


# --- what shapes alone do not tell: folded ops ---


def _channelwise(op: Scale) -> bool:
    """Whether every pixel of a channel is scaled and shifted alike."""
    parts = (op.factor(torch.zeros(())), None if op.bias(torch.zeros(())) is None else op.bias(torch.zeros(())))
    if len(op.shape) == 1:
        return True
    return all(t is None or t.dim() < 3 or _constant_over_pixels(t) for t in parts)


def _constant_over_pixels(t: Tensor) -> bool:
    # An expanded dimension has stride 0.
    return all(n == 1 or step == 0 for n, step in zip(t.shape[-2:], t.stride()[-2:], strict=True))


def _diagonal_to_input(network: Network, node: Node) -> bool:
    """Whether diagonal ops alone lead from the input here."""
    while isinstance(node.op, Scale):
        if node.inputs[0] == network.input:
            return True
        node = network[node.inputs[0]]
    return False


def folds(network: Network, node: Node) -> bool:
    """Whether a scale stands behind a convolution or a matrix that nobody else reads."""
    source = node.inputs[0]
    if source == network.input or len(network.readers[source]) > 1 or not isinstance(node.op, Scale):
        return False
    return isinstance(network[source].op, (Conv2d, Linear))


def arrival_of(network: Network, source: str) -> str:
    """The node at which rows arrive from the activation behind `source`: scales before it go into its lines."""
    while source != network.input:
        node = network[source]
        if not isinstance(node.op, Scale) or _diagonal_to_input(network, node) or len(network.readers[source]) > 1:
            break
        source = node.inputs[0]
    return source


def _biased(network: Network, name: str) -> Iterator[tuple[Node, Node | None]]:
    """Ops whose bias goes into the lines behind `name`, each with the scale that goes into its weights."""
    if name == network.input or len(network.readers[name]) > 1:
        return
    node = network[name]
    if isinstance(node.op, (Conv2d, Linear)):
        yield node, None
    elif isinstance(node.op, Scale) and folds(network, node) and not _diagonal_to_input(network, node):
        yield network[node.inputs[0]], node
    elif isinstance(node.op, Add):
        if node.op.bias(torch.zeros(())) is not None:
            yield node, None
        for part in node.inputs:
            yield from _biased(network, part)


def settled(network: Network) -> frozenset[str]:
    """Nodes whose bias goes into lines."""
    found = set()
    for node in network.activations:
        for pair in _biased(network, arrival_of(network, node.inputs[0])):
            found |= {op.name for op in pair if op is not None}
    return frozenset(found)


def _weight(network: Network, name: str, like: Tensor) -> Tensor:
    """Weight of a convolution or matrix with the scale behind it; a matrix behind a map reads channels last."""
    node = network[name]
    op = node.op
    assert isinstance(op, (Conv2d, Linear))
    w = op.weight(like)
    reading = network.readers.get(name, ())
    if len(reading) == 1 and folds(network, reading[0]) and _folded(network, reading[0]):
        scale = reading[0].op
        assert isinstance(scale, Scale)
        factor = scale.factor(like)
        if factor is not None:
            w = w * _channels(factor, w.shape[0]).reshape(-1, *[1] * (w.dim() - 1))
    if isinstance(op, Conv2d):
        return w
    source = node.inputs[0]
    if source != network.input and isinstance(network[source].op, Reshape):
        shape = network.shape_of(network[source].inputs[0])
        if len(shape) == 3:
            w = w.unflatten(1, shape).permute(0, 2, 3, 1).flatten(1)
    return w


def _folded(network: Network, scale: Node) -> bool:
    """Whether a scale goes into the weights before it: else it goes into the lines behind it."""
    name = scale.name
    while len(reading := network.readers.get(name, ())) == 1:
        if isinstance(reading[0].op, Activation):
            return False
        if not isinstance(reading[0].op, Scale):
            return True
        name = reading[0].name
    return True


def _channels(t: Tensor, n: int) -> Tensor:
    """A number a channel, of a tensor that broadcasts to [n, ...] and is alike in all pixels: [n]."""
    if t.dim() <= 1:
        return t.expand(n)
    return t.flatten(t.dim() - 2)[..., 0].reshape(-1).expand(n)


class LineMaps(dict[str, Enclosure]):
    """Lines of each activation by its name; as maps they are made once for all targets behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._maps: dict[str, tuple[Tensor, ...]] = {}

    def maps(self, network: Network, name: str) -> tuple[Tensor, ...]:
        """Both lines in the value at which rows arrive: slope, intercept, slope, intercept [batch, h, w, c]."""
        if name not in self._maps:
            lines = self[name]
            assert isinstance(lines, Lines)
            self._maps[name] = tuple(t.contiguous() for t in _lines(network, network[name], lines))
        return self._maps[name]


class MixedMaps:
    """Two lower lines and an upper one of each activation by its name: rows have weights of their own between the two.

    Weight 0 is the first lower line, 1 the second.
    constant: whether the gradient is wanted in the weights and the upper lines alone: the lower lines, and the network,
    are constants then.
    """

    def __init__(self, constant: bool) -> None:
        self.constant = constant
        self._lines: dict[str, tuple[Lines, Lines]] = {}
        self._maps: dict[str, tuple[Tensor, ...]] = {}

    def add(self, name: str, first: Line, second: Line, above: Line) -> None:
        """The lines of an activation: slope and intercept [batch, *shape] each."""
        self._lines[name] = (Lines(*first, *above), Lines(*second, *above))

    def maps(self, network: Network, name: str) -> tuple[Tensor, ...]:
        """As `LineMaps.maps`; then slope and intercept of the second lower line less the first's."""
        if name not in self._maps:
            first, second = (_lines(network, network[name], lines) for lines in self._lines[name])
            below = (*first[:2], second[0] - first[0], second[1] - first[1])
            ls, li, ds, di = (t.detach() for t in below) if self.constant else below
            self._maps[name] = tuple(t.contiguous() for t in (ls, li, *first[2:], ds, di))
        return self._maps[name]


def _lines(network: Network, node: Node, lines: Lines) -> tuple[Tensor, ...]:
    """Lines in the value at which rows arrive, without biases that nobody else reads; channels last, [batch, h, w, c].

    s (f z + b) + t = (s f) z + (s b + t): a map's worth of work instead of one more pass over the rows.
    """
    ls, li, us, ui = lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept
    source, arrival = node.inputs[0], arrival_of(network, node.inputs[0])
    while source != arrival:
        scale = network[source].op
        assert isinstance(scale, Scale)
        ls, li, us, ui = _through(ls, li, us, ui, scale.factor(ls), scale.bias(ls))
        source = network[source].inputs[0]
    total: Tensor | None = None
    for op, scaled in _biased(network, arrival):
        assert isinstance(op.op, Affine)
        b = op.op.bias(ls)
        if scaled is not None:
            assert isinstance(scaled.op, Scale)
            factor, shift = scaled.op.factor(ls), scaled.op.bias(ls)
            b = b if b is None or factor is None else b * factor
            b = shift if b is None else (b if shift is None else b + shift)
        total = b if total is None else (total if b is None else total + b)
    ls, li, us, ui = _through(ls, li, us, ui, None, total)
    return tuple(_channels_last(t) for t in (ls, li, us, ui))


def _through(
    ls: Tensor, li: Tensor, us: Tensor, ui: Tensor, factor: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if shift is not None:
        li, ui = li + ls * shift, ui + us * shift
    if factor is not None:
        ls, us = ls * factor, us * factor
    return ls, li, us, ui


def _channels_last(t: Tensor) -> Tensor:
    """[batch, n] or [batch, c, h, w] -> [batch, h, w, c]."""
    return t[:, None, None] if t.dim() == 2 else t.permute(0, 2, 3, 1)


def _lay_out(rows: Sequence[_Rows], steps: Sequence[_Step], gradient: bool) -> tuple[list[int], list[int], int]:
    """Where coefficients lie: each as long as a later step reads it, backward too where there is a gradient."""
    end = 2 * len(steps)
    born: dict[tuple[int, bool], int] = {}
    last: dict[tuple[int, bool], int] = {}

    def use(slot: int | None, time: int, back: bool = False) -> None:
        if slot is not None and (rows[slot].stop is None or back):
            born[slot, back] = min(time, born.get((slot, back), time))
            last[slot, back] = max(time, last.get((slot, back), time))

    for i, step in enumerate(steps):
        for slot in (step.source, step.to, step.other if isinstance(step, _Sum) else None):
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
    return offsets[False], offsets[True], most


# --- running ---


@dataclass(frozen=True, slots=True)
class Neurons:
    """Rows of a program: where each stands, and which of the shared rows before the first activations it is."""

    place: Tensor
    """Example and place in the grid, [n, 3], int64."""
    which: Tensor
    """[n], int64: into the flat rows given to `lower_bounds`."""

    @property
    def count(self) -> int:
        """n."""
        return self.which.shape[0]

    def part(self, some: slice) -> tuple[Tensor, Tensor]:
        """Place and which of some rows."""
        return self.place[some], self.which[some]

    def of_each(self, constant: Tensor) -> Tensor:
        """A number a shared row, [*, k], as one a neuron: [n]."""
        return constant.reshape(-1)[self.which]


@dataclass(frozen=True, slots=True)
class EveryNeuron:
    """All of them: example, place, shared row; nothing is listed beforehand."""

    batch: int
    places: Tensor
    """[places, 2], int64."""
    k: int
    """Shared rows."""

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.batch * self.places.shape[0] * self.k

    def part(self, some: slice) -> tuple[Tensor, Tensor]:
        """Place and which of some rows."""
        index = torch.arange(some.start, some.stop, device=self.places.device)
        window, which = index // self.k, index % self.k
        example, place = window // self.places.shape[0], window % self.places.shape[0]
        return torch.cat([example[:, None], self.places[place]], 1), which

    def of_each(self, constant: Tensor) -> Tensor:
        """A number a shared row, [*, k], as one a neuron: [n]."""
        return constant.reshape(1, self.k).expand(self.batch * self.places.shape[0], -1).reshape(-1)


def units(found: Program, shape: Sequence[int]) -> int:
    """Entries of a target that rows of its own tell apart: channels of a map, or all."""
    return shape[0] if found.windows else math.prod(shape)


def unit_rows(found: Program, shape: Sequence[int], like: Tensor) -> Tensor:
    """One row up and one down a channel of a map, or an entry of another target, as `lower_bounds` takes them."""
    n = units(found, shape)
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    rows = torch.cat([eye, -eye])
    return rows.reshape(1, 2 * n, 1, 1, n) if found.windows else rows.reshape(1, 2 * n, *shape)


def every_neuron(found: Program, rows: Tensor, batch: int) -> EveryNeuron:
    """Unit rows of every entry of a target: example, place, side, channel."""
    return EveryNeuron(batch, found.before.places(rows.device)[0], rows.shape[1])


def some_neurons(found: Program, wanted: Tensor) -> tuple[Neurons, tuple[Tensor, ...]]:
    """Both unit rows of the entries of a target that are wanted, [batch, *shape], bool; and where these are.

    Neighbours stay together, so that they read the same lines.
    """
    shape = wanted.shape[1:]
    n = units(found, shape)
    if found.windows:
        example, y, x, entry = wanted.permute(0, 2, 3, 1).nonzero(as_tuple=True)
        index: tuple[Tensor, ...] = (example, entry, y, x)
    else:
        example, entry = wanted.flatten(1).nonzero(as_tuple=True)
        index = wanted.nonzero(as_tuple=True)
        y = x = torch.zeros_like(example)
    place = torch.stack([example, y, x], 1).repeat_interleave(2, 0)
    return Neurons(place, torch.stack([entry, entry + n], 1).flatten()), index


def seen_by(found: Program, name: str, maps: Tensor, neurons: Neurons) -> Tensor:
    """What each row sees of its example's map at an activation: [batch, *shape] -> [n, high, wide, channels]."""
    return _seen(_channels_last(maps).contiguous(), found.weighed[name].frame, neurons.place)


def on_maps(found: Program, name: str, windows: Tensor, neurons: Neurons) -> Tensor:
    """Windows [n, high, wide, channels] on maps of their own, 0 elsewhere: [n, channels, *image]."""
    frame = found.weighed[name].frame
    if not frame.whole:
        corners = frame.corners(neurons.place[:, 1:])[:, None].contiguous()
        windows = scatter(windows[:, None].contiguous(), corners, frame.image, windows.shape[0])
    return windows.permute(0, 3, 1, 2)


def rows_of_examples(given: int, k: int, batch: int, device: torch.device) -> Neurons:
    """Rows [given, k, ...] in their target's own shape, for every example; given: the batch, or 1 for all."""
    place = torch.zeros(batch * k, 3, dtype=torch.int64, device=device)
    place[:, 0] = torch.arange(batch, device=device).repeat_interleave(k)
    return Neurons(place, torch.arange(given * k, device=device).repeat(batch if given == 1 else 1))


def lower_bounds(
    found: Program,
    network: Network,
    rows: Tensor,
    neurons: Neurons | EveryNeuron,
    region: Region,
    lines: Mapping[str, Enclosure] | MixedMaps,
    room: float = math.inf,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Lower bound of each neuron's row over its example's region: [n].

    rows: as `backsubstitution.pull` takes them at the target, [batch or 1, k, ...]; flat over both they are what
    `neurons.which` counts.  room: bytes of coefficients alive at once, where that is less than the workspace.
    weights: with `MixedMaps` for lines, of each row at each activation, [n, high, wide, channels] as `weighed` says.
    Sound: yes, to nearest; weights in [0, 1].  Gradient: as `substitute`, and in the weights.
    """
    assert isinstance(region, InputBox), "asked before by `available`"
    assert isinstance(lines, LineMaps | MixedMaps), "lines that are made once for all targets"
    walk = backsubstitution.pull(
        network,
        found.target,
        rows,
        rows.shape[0],
        {},
        stop=frozenset(found.stops),
        plan=found.before,
        places=torch.zeros(1, 1, 2, dtype=torch.int64) if found.windows else None,
    )
    given: list[Tensor] = []
    shapes = {rows.stop: rows.shape for rows in found.rows}
    given += [walk.stops[name].reshape(-1, *shapes[name]) for name in found.stops]
    for name in found.activations:
        given += lines.maps(network, name)
    constant = isinstance(lines, MixedMaps) and lines.constant
    matrices = [_weight(network, name, region.lower) for name in found.weights]
    given += [t.detach() if constant else t for t in matrices]
    if weights is not None:
        given += [weights[name] for name in found.activations]
    center, radius = region.center, region.radius
    low, high = region.lower, region.upper
    if found.entry != network.input:
        for op in _diagonals(network, found.entry):
            center, radius = op.apply(center), op.absolute(radius)
        low, high = center - radius, center + radius
    given += [_channels_last(low), _channels_last(high)]
    bound: Tensor = _Pass.apply(found, neurons, room, weights is not None, *(t.contiguous() for t in given))
    return bound + neurons.of_each(walk.constant)


def _diagonals(network: Network, name: str) -> list[Affine]:
    ops: list[Affine] = []
    while name != network.input:
        op = network[name].op
        assert isinstance(op, Affine)
        ops.insert(0, op)
        name = network[name].inputs[0]
    return ops


class _Given:
    """The tensors of a call by name."""

    def __init__(self, found: Program, given: Sequence[Any], mixed: bool) -> None:
        n, each = len(found.stops), _maps_each(mixed)
        self.stops = dict(zip(found.stops, given[:n], strict=True))
        self.lines: dict[str | None, Sequence[Any]] = {}
        for i, name in enumerate(found.activations):
            self.lines[name] = given[n + each * i : n + each * (i + 1)]
        n += each * len(found.activations)
        self.weights = dict(zip(found.weights, given[n : n + len(found.weights)], strict=True))
        n += len(found.weights)
        self.own: dict[str | None, Any] = dict(zip(found.activations, given[n:-2], strict=True)) if mixed else {}
        self.lines[None] = (None, given[-2], None, given[-1])


def _maps_each(mixed: bool) -> int:
    """Maps of an activation's lines."""
    return 6 if mixed else 4


class _Pass(torch.autograd.Function):
    """Keeps what it was given; coefficients are made again."""

    @staticmethod
    def forward(
        ctx: Any, found: Program, neurons: Neurons | EveryNeuron, room: float, mixed: bool, *given: Tensor
    ) -> Tensor:
        ctx.found, ctx.neurons, ctx.room, ctx.mixed = found, neurons, room, mixed
        like, n = given[0], neurons.count
        constant = like.new_zeros(n)
        # All rows at once are kept for the gradient.
        keep = any(ctx.needs_input_grad) and room == math.inf and at_once(found, like, room, gradient=True) >= n
        run = _Run(found, neurons, given, room, mixed, gradient=keep)
        ctx.kept = keep
        # As a saved tensor, so that who drops those and computes them again drops this.
        ctx.save_for_backward(*given, *([run.arena] if keep else []))
        for part in run.parts(n):
            run.forward(part, constant[part])
        return constant

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, neurons, saved = ctx.found, ctx.neurons, ctx.saved_tensors
        given = saved[: len(ctx.needs_input_grad) - 4]
        need, mixed = ctx.needs_input_grad[4:], ctx.mixed
        if torch.is_grad_enabled():  # to be differentiated again
            # Of each tensor by itself: some were computed from others, and that part of the gradient is not ours.
            fresh = [t.view_as(t) for t in given]
            wanted = [t for t, needed in zip(fresh, need, strict=True) if needed]
            again = torch.autograd.grad(_eager(found, neurons, fresh, mixed), wanted, grad, create_graph=True)
            taken = iter(again)
            return None, None, None, None, *(next(taken) if needed else None for needed in need)
        grad = grad.contiguous()
        totals = [torch.zeros_like(t) if needed else None for t, needed in zip(given, need, strict=True)]
        _together(found, totals, given, mixed)
        n = neurons.count
        # Gradients are written over coefficients: only the first backward pass finds them.
        kept, ctx.kept = ctx.kept, False
        arena = saved[-1] if len(saved) > len(given) else None
        run = _Run(found, neurons, given, ctx.room, mixed, gradient=True, arena=arena)
        to = _Given(found, totals, mixed)
        for part in run.parts(n):
            if not kept:
                run.forward(part, grad.new_zeros(part.stop - part.start))
            run.backward(part, grad[part], to)
        return None, None, None, None, *(t if needed else None for t, needed in zip(totals, need, strict=True))


def _together(found: Program, totals: list[Tensor | None], given: Sequence[Tensor], mixed: bool) -> None:
    """The kernel adds up both slopes or none, and both intercepts; of rows with weights a side's lines or none."""
    groups = ((0, 1, 4, 5), (2, 3)) if mixed else ((0, 2), (1, 3))
    first, each = len(found.stops), _maps_each(mixed)
    taken = [[first + each * i + j for j in group] for i in range(len(found.activations)) for group in groups]
    for group in (*taken, [len(given) - 2, len(given) - 1]):
        if any(totals[i] is not None for i in group):
            for i in group:
                totals[i] = torch.zeros_like(given[i]) if totals[i] is None else totals[i]


class _Run:
    """One workspace, and some rows at a time in it."""

    def __init__(
        self,
        found: Program,
        neurons: Neurons | EveryNeuron,
        given: Sequence[Tensor],
        room: float,
        mixed: bool,
        gradient: bool,
        arena: Tensor | None = None,
    ) -> None:
        self.found, self.neurons, self.given, self.gradient = found, neurons, _Given(found, given, mixed), gradient
        like = given[0]
        self.dtype = like.dtype
        self.offsets, self.gradients, self.each = found.lay_out(gradient)
        n = neurons.count
        self.count = max(
            1, min(n, int(min(room, WORKSPACE * torch.get_num_threads())) // (self.each * like.element_size()))
        )
        # `data`: what is written here is nobody's to watch.
        self.arena = like.new_empty(self.count * self.each) if arena is None else arena.data
        self.turned: dict[str, Tensor] = {}
        self.back: dict[str, Tensor] = {}
        for name, w in self.given.weights.items():
            if w.dim() == 4:
                out, into, kh, kw = w.shape
                self.turned[name] = w.permute(2, 0, 3, 1).reshape(kh, out, kw * into).contiguous()
                if gradient:
                    self.back[name] = w.permute(2, 3, 1, 0).reshape(kh, kw * into, out).contiguous()

    def parts(self, n: int) -> Iterator[slice]:
        for start in range(0, n, self.count):
            yield slice(start, min(n, start + self.count))

    def _at(self, slot: int, n: int, back: bool = False) -> Tensor:
        """The coefficients of a slot, or their gradient: [n, h, w, c]."""
        rows = self.found.rows[slot]
        if rows.stop is not None and not back:
            given: Tensor = self.given.stops[rows.stop]
            return given
        first = (self.gradients if back else self.offsets)[slot] * self.count
        return self.arena[first : first + n * rows.numbers].view(n, *rows.shape)

    def _corners(self, slot: int, place: Tensor) -> Tensor:
        frame = self.found.rows[slot].frame
        return frame.corners(place[:, 1:])[:, None].contiguous()

    def _frame(self, slot: int) -> tuple[int, ...]:
        rows = self.found.rows[slot]
        frame = rows.frame
        if frame.whole:
            return (*rows.shape, *frame.size, 0, 0, 0, 0)
        return (*rows.shape, *frame.image, *frame.stride, *frame.offset)

    def forward(self, part: slice, constant: Tensor) -> None:
        """Coefficients of some rows; their bounds are added to `constant`."""
        n = part.stop - part.start
        place, which = self.neurons.part(part)
        call = window_step.kernels().call
        for step in self.found.steps:
            a = self._at(step.source, n)
            shared = which if self.found.rows[step.source].stop is not None else None
            to = None if step.to is None else self._at(step.to, n)
            if isinstance(step, _Relax):
                lines, weights = _mixed_lines(self.given, step.activation, part)
                given = (place, shared, a, *lines, *weights, to, constant)
                call("relax", self.dtype, n, *self._frame(step.source), *given)
                continue
            assert to is not None
            if isinstance(step, _Convolve):
                weight = self.given.weights[step.weight]
                sizes = _sizes(a, weight, step, to)
                call("spread", self.dtype, n, *sizes, a, self.turned[step.weight], to)
            elif isinstance(step, _Multiply):
                torch.mm(a.flatten(1), self.given.weights[step.weight], out=to.view(n, -1))
            elif isinstance(step, _Take):
                torch.index_select(a, 0, which, out=to)
            elif isinstance(step, _Sum):
                torch.add(a, self._at(step.other, n), out=to)
            elif step.corner is None:
                size = self.found.rows[step.to].frame.size
                to.copy_(scatter(a[:, None], self._corners(step.source, place), size, n))
            else:
                to.zero_()
                _inside(to, step.corner, a.shape).copy_(a)

    def backward(self, part: slice, column: Tensor, to: _Given) -> None:
        """Gradients of some rows, added to those of everything given."""
        n = part.stop - part.start
        place, which = self.neurons.part(part)
        call = window_step.kernels().call
        seen: set[int] = set()
        for step in reversed(self.found.steps):
            a = self._at(step.source, n)
            stop = self.found.rows[step.source].stop
            grad = None if step.to is None else self._at(step.to, n, back=True)
            for slot in (step.source, step.other) if isinstance(step, _Sum) else (step.source,):
                own = self._at(slot, n, back=True)
                found = own if slot not in seen else torch.empty_like(own)
                if isinstance(step, _Relax):
                    lines, weights = _mixed_lines(self.given, step.activation, part)
                    sums, to_weights = _mixed_lines(to, step.activation, part)
                    shared = which if stop is not None else None
                    given = (place, shared, a, *lines, *weights, grad, column, found, *sums, *to_weights)
                    call("relax_back", self.dtype, n, *self._frame(slot), *given)
                elif isinstance(step, _Convolve):
                    assert grad is not None
                    weight = self.given.weights[step.weight]
                    into = to.weights[step.weight]
                    turned = None if into is None else into.new_zeros(self.turned[step.weight].shape)
                    sizes = _sizes(a, weight, step, grad)
                    call("back", self.dtype, n, *sizes, a, grad, self.back[step.weight], found, turned)
                    if into is not None and turned is not None:
                        kh, out, run = turned.shape
                        into += turned.view(kh, out, weight.shape[3], run // weight.shape[3]).permute(1, 3, 0, 2)
                elif isinstance(step, _Multiply):
                    assert grad is not None
                    weight, into = self.given.weights[step.weight], to.weights[step.weight]
                    torch.mm(grad.view(n, -1), weight.mT, out=found.view(n, -1))
                    if into is not None:
                        into.addmm_(a.flatten(1).mT, grad.view(n, -1))
                elif isinstance(step, (_Sum, _Take)):
                    assert grad is not None
                    found.copy_(grad)
                elif step.corner is None:
                    assert grad is not None
                    size = self.found.rows[slot].frame.size
                    found.copy_(gather(grad, self._corners(slot, place), size)[:, 0])
                else:
                    assert grad is not None
                    found.copy_(_inside(grad, step.corner, a.shape))
                if slot in seen:
                    own += found
                seen.add(slot)
        for slot, rows in enumerate(self.found.rows):
            if rows.stop is not None and (total := to.stops[rows.stop]) is not None:
                total.index_add_(0, which, self._at(slot, n, back=True))


def _mixed_lines(given: _Given, activation: str | None, part: slice) -> tuple[Sequence[Any], Sequence[Any]]:
    """Both lines; and the weights of some rows, with what the second lower line is more."""
    lines, own = given.lines[activation], given.own.get(activation)
    return lines[:4], (None if own is None else own[part], *(lines[4:] or (None, None)))


def _sizes(a: Tensor, weight: Tensor, step: _Convolve, to: Tensor) -> tuple[int, ...]:
    out, into, kh, kw = weight.shape
    g = step.geometry
    return (*a.shape[1:3], out, into, kh, kw, *g.stride, g.dilation[0], *step.corner, *to.shape[1:3])


def _inside(t: Tensor, corner: Pair, shape: Sequence[int]) -> Tensor:
    """The part of windows [n, h, w, c] that begins at a pixel and has another window's shape."""
    (top, left), (_, high, wide, _) = corner, shape
    return t[:, top : top + high, left : left + wide]


def _eager(found: Program, neurons: Neurons | EveryNeuron, tensors: Sequence[Tensor], mixed: bool) -> Tensor:
    """The same by operations that can be differentiated again."""
    given = _Given(found, tensors, mixed)
    place, which = neurons.part(slice(0, neurons.count))
    example = place[:, 0]
    kept: dict[int, Tensor] = {}
    constant = tensors[0].new_zeros(neurons.count)
    for step in found.steps:
        rows = found.rows[step.source]
        a = kept[step.source] if rows.stop is None else given.stops[rows.stop][which]
        if isinstance(step, _Relax):
            lines = [None if t is None else _seen(t, rows.frame, place) for t in given.lines[step.activation]]
            if step.activation in given.own:
                own = given.own[step.activation]
                slope, intercept = (lines[i] + own * lines[i + 4] for i in (0, 1))
                lines = [slope, intercept, *lines[2:4]]
            if step.to is None:
                low, high = lines[1], lines[3]
                assert low is not None
                assert high is not None
                constant = constant + least_over_box(a[:, None], low, high)[:, 0]
                continue
            pulled, more = relax_step(a[:, None], Lines(*lines))  # type: ignore[arg-type]
            constant = constant + more[:, 0]
            kept[step.to] = pulled[:, 0]
        elif isinstance(step, _Convolve):
            size = found.rows[step.to].frame.size
            kept[step.to] = spread(a, given.weights[step.weight], step.geometry, step.corner, size)
        elif isinstance(step, _Multiply):
            kept[step.to] = (a.flatten(1) @ given.weights[step.weight]).view(-1, *found.rows[step.to].shape)
        elif isinstance(step, _Take):
            kept[step.to] = a
        elif isinstance(step, _Sum):
            kept[step.to] = a + kept[step.other]
        elif step.corner is None:
            corners = rows.frame.corners(place[:, 1:])[:, None]
            kept[step.to] = scatter(a[:, None], corners, found.rows[step.to].frame.size, example.shape[0])
        else:
            (top, left), (tall, wide) = step.corner, found.rows[step.to].frame.size
            below, right = tall - top - a.shape[1], wide - left - a.shape[2]
            kept[step.to] = F.pad(a, (0, 0, left, right, top, below))
    return constant


def _seen(maps: Tensor, frame: Frame, place: Tensor) -> Tensor:
    """Each row's window of its example's map: [n, h, w, c]."""
    own = maps[place[:, 0]]
    return own if frame.whole else gather(own, frame.corners(place[:, 1:])[:, None], frame.size)[:, 0]
