"""Dual ascent on some of an example's neurons: what `DualAscent` runs on a CPU where that takes less work than sweeps.

The crossing neurons are kept and the stable ones composed away, or all are kept that are not dead, with nothing
composed: either gives every example its own small matrices. A compiled kernel takes the problems of an example through
all of their iterations in cache (`composed_ascent.c`). The iterates are those of `dense_ascent` and of the matrix-free
sweeps, to rounding: a stable neuron has nothing to choose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.kernels import native
from optrelax.layers.ascent.dense_ascent import by_example
from optrelax.layers.ascent.schedule import FIRST, MARGIN, SECOND, tiny
from optrelax.layers.batched import join
from optrelax.layers.composition import AffineBlocks, Composition, KeptNeurons, NeuronSlots, kept_neurons
from optrelax.layers.network_solver import Points
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems
from optrelax.memory_counts import within_solve
from optrelax.networks.graph import Network
from optrelax.networks.ops import Affine, Linear, flatten_from

if TYPE_CHECKING:
    from optrelax.layers.ascent.dual_ascent import DualAscent

_USUAL = 12  # iterations that most problems take
_CACHE = 4 * 2**20  # bytes of an example's matrices that double the cost of a multiply-add
_DENSE, _SPARSE = 1.15, 6.0  # what a multiply-add of the network's own sweeps costs, in those of the kernel
_BYTES = 256 * 2**20  # for the matrices of the examples in flight


_SIGNATURES = (
    "ascend*(E, R, K, d, layers, direct, starts, most, check_every, room_size, double step, double decay, "
    "double floor, double tol, double threshold, double first_memory, double second_memory, double tiny, "
    "int64 first[layers], int64 count[E * layers], int64 back[layers], int64 ahead[layers], int64 begin[E + 1], "
    "int64 rows[E * K], *M[direct], radius[E * d], N[E * K * K], m[E * K], flat[E * K], spread[E * K], slope[E * K], "
    "intercept[E * K], c_v[R * d], c_y[R * K], offset[R], start[starts * R * K], room[room_size], int64 index[], "
    "w[R * K], on_lower[R * K], v[R * d], int64 iterations[R])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled ascent, or why there is none."""
    return native.build(Path(__file__).with_name("composed_ascent.c"), *_SIGNATURES)


@functools.cache
def _padding() -> int:
    """Rows are padded to a multiple of so many numbers."""
    return kernels().constant("PADDING")


@dataclass(frozen=True)
class Examples:
    """Which problems belong together: `first` [E] one problem of each example, `of` [R] the example of each problem."""

    problems: Problems
    first: Tensor
    of: Tensor

    @property
    def count(self) -> int:
        """E."""
        return len(self.first)


def examples(problems: Problems) -> Examples | None:
    """The problems by example; None where the kernel cannot take them: other devices, types, regions and hulls."""
    hulls = problems.hulls
    if not hulls or problems.count == 0 or not problems.boxed or not kernels().supports(problems.rows):
        return None
    if not all(h.origin and h.above1 is None for h in hulls.values()):
        return None
    return Examples(problems, *by_example(problems))


def plan(given: Examples, iterations: int, blocks: AffineBlocks) -> KeptNeurons | None:
    """Which neurons to keep so that rows and iterations take the fewest multiply-adds; None where sweeps take fewer."""
    problems, network = given.problems, given.problems.network
    inputs = problems.center[0].numel()
    sweeps = 2 * min(iterations + 1, _USUAL) * problems.count / given.count

    def kept(keep: KeptNeurons) -> dict[str, float]:
        masks = {name: kept_neurons(h.select(given.first), keep) for name, h in problems.hulls.items()}
        return {name: float(mask.sum()) / given.count for name, mask in masks.items()}

    crossing, alive = kept("crossing"), kept("alive")
    few, many = sum(crossing.values()), sum(alive.values())
    rows = sum(n * _cost(network, _behind(network, blocks, name)) for name, n in crossing.items())
    reads = {name: sum(alive.get(s, inputs) for s in blocks.sources[name]) for name in alive}

    def rate(kept: float) -> float:
        """Of a multiply-add of the kernel: matrices that leave the cache cost more."""
        return 0.9 + kept * (inputs + 2 * kept) * problems.rows.element_size() / _CACHE

    costs: dict[KeptNeurons | None, float] = {
        "crossing": rows + sweeps * few * (few / 2 + inputs) * rate(few),
        "alive": sweeps * sum(n * reads[name] for name, n in alive.items()) * rate(many),
        None: sweeps * _cost(network, problems.wanted),
    }
    # Of convolutions: others take no more room than their weights.
    written_out = sum(blocks.entries(name) for name in problems.hulls.keys() - blocks.dense)
    if written_out * problems.rows.element_size() > _room(given):
        return None
    return min(costs, key=lambda keep: costs[keep])


def _room(given: Examples) -> int:
    """Bytes for matrices: what layers count a problem for beyond its own lines and box, see NetworkLayer."""
    problems = given.problems
    hidden = sum(h.free[0].numel() for h in problems.hulls.values())
    each = within_solve().of(inputs=problems.center[0].numel(), hidden=hidden)
    counted = problems.count * each * problems.rows.element_size()
    return min(_BYTES, counted)


def _behind(network: Network, blocks: AffineBlocks, name: str) -> frozenset[str]:
    """What the rows of an activation's pre-activation are pulled through: all behind the activations it reads."""
    sources = blocks.sources[name] - {network.input}
    return frozenset().union(*(network.ancestors(source) for source in sources))


def _cost(network: Network, names: Set[str]) -> float:
    """Multiply-adds of these nodes, as the kernel would take as long for."""
    ops = [network[name].op for name in names if name != network.input]
    return sum((_DENSE if isinstance(op, Linear) else _SPARSE) * op.cost() for op in ops if isinstance(op, Affine))


def solve(options: DualAscent, problems: Problems, starts: Sequence[DualPoint]) -> Points | None:
    """Both points of every problem; None where the sweeps of all neurons are for it."""
    given = examples(problems)
    if given is None:
        return None
    blocks = AffineBlocks(problems.network, problems.rows)
    keep = plan(given, options.max_iterations, blocks)
    if keep is None:
        return None
    size = _examples_at_once(options, given, keep, blocks)
    if size >= given.count and bool((given.of.diff() >= 0).all()):
        return _Chunk(given, starts, keep, blocks).run(options)
    order, ends = given.of.argsort(stable=True), torch.bincount(given.of, minlength=given.count).cumsum(0)
    parts = []
    for start in range(0, given.count, size):
        stop = min(start + size, given.count)
        index = order[int(ends[start - 1]) if start else 0 : int(ends[stop - 1])]
        of = given.of[index] - start
        first = torch.searchsorted(of, torch.arange(stop - start, device=of.device))
        part = Examples(problems.select(index), first, of)
        parts.append(_Chunk(part, [s.select(index) for s in starts], keep, blocks).run(options))
    return join(parts).select(order.argsort())


def _examples_at_once(options: DualAscent, given: Examples, keep: KeptNeurons, blocks: AffineBlocks) -> int:
    """Examples whose matrices, and what their rows are pulled through, fit the memory."""
    problems, network = given.problems, given.problems.network
    masks = [kept_neurons(h.select(given.first), keep) for h in problems.hulls.values()]
    kept = [int(flatten_from(mask, 1).sum(1).max()) for mask in masks]
    inputs, each, every = problems.center[0].numel(), int(given.of.bincount().max()), sum(kept)
    ops = problems.wanted if problems.hulls.keys() - blocks.dense else problems.hulls
    widest = max(math.prod(network.shape_of(name)) for name in ops)
    copies = 2 if inputs % _padding() else 1
    # Of the first activation the rows are the network's own; those of one are pulled back at a time.
    entries: float = max(kept[1:], default=0) * 2 * widest + every * every
    if keep == "crossing":
        entries += copies * sum(kept[1:]) * inputs
    entries += each * ((3 + copies) * inputs + 8 * every + 2 * widest)
    most = (options.max_bytes or _room(given)) / (entries * problems.rows.element_size())
    return max(1, int(min(most, given.count)))


class _Chunk:
    """The matrices of some examples and their problems, as the kernel reads them."""

    def __init__(self, given: Examples, starts: Sequence[DualPoint], keep: KeptNeurons, blocks: AffineBlocks) -> None:
        problems, network, self.of = given.problems, given.problems.network, given.of
        self.problems, self.starts, self.blocks = problems, starts, blocks
        single = problems.select(given.first)
        self.composition = composition = Composition(single, keep, blocks)
        self.counts = torch.bincount(given.of, minlength=given.count)
        E, K = given.count, composition.width
        self.center, self.radius = flatten_from(single.center, 1), _padded(flatten_from(single.radius, 1))
        values, reached = composition.values(single.center)
        self.rows = self.of.new_zeros(E, K)
        """Which row of its layer's matrix each neuron's is."""
        self.matrices: list[Tensor] = []
        """A layer's rows for the inputs, [rows, d]."""
        self.N, self.m = problems.rows.new_zeros(E, K, K), problems.rows.new_zeros(E, K)
        self.lines = [problems.rows.new_zeros(E, K) for _ in range(4)]
        for slot in composition.slots:
            if slot.first == slot.last:
                self.matrices.append(self.radius)  # of no neuron
                continue
            at, h = slot.span, single.hulls[slot.name]
            self.m[:, at] = slot.gather(values[slot.name])
            flat, steep, slope, intercept = (slot.gather(t) for t in (h.below0[0], h.below1[0], *h.above0))
            for to, found in zip(self.lines, (flat, steep - flat, slope, intercept), strict=True):
                to[:, at] = found
            if set(blocks.sources[slot.name]) == {network.input}:  # the network's own matrix, for all examples
                M, index = _padded(flatten_from(blocks.matrices(slot.name)[network.input], 1)), slot.index
            else:
                on_input, self.N[:, at] = composition.neurons(slot)
                if not self.reads(slot, network.input):
                    on_input = on_input[:1, :1]  # zeros
                M = _padded(on_input)
                index = torch.arange(M.shape[:-1].numel(), device=M.device).reshape(M.shape[:-1])
                index = index.expand(E, slot.last - slot.first)
            self.matrices.append(M)
            self.rows[:, at] = index
        # Objectives, as many an example as its problems at most.
        before = self.counts.cumsum(0) - self.counts
        lane = (self.of, torch.arange(problems.count, device=self.of.device) - before[self.of])
        rows = problems.rows.new_zeros(E, int(self.counts.max()), *problems.rows.shape[1:])
        rows[lane] = problems.rows
        c_v, c_y = composition.pull(problems.target, rows)
        self.c_v, self.c_y = _padded(c_v[lane]), c_y[lane].contiguous()
        self.offset = torch.linalg.vecdot(flatten_from(problems.rows, 1), flatten_from(reached[self.of], 1))

    def reads(self, slot: NeuronSlots, source: str) -> bool:
        """Whether an activation may read another's values, or the input, with nothing kept between them."""
        network = self.problems.network
        if self.composition.keep == "crossing":
            return source == network.input or source in network.ancestors(network[slot.name].inputs[0])
        return source in self.blocks.sources[slot.name]

    def _reach(self) -> tuple[list[int], list[int], int]:
        """First slots that each one reads, last one that reads it, itself for none; and how many may read the input."""
        slots = self.composition.slots
        reads = [[s for s in range(t) if self.reads(slot, slots[s].name)] for t, slot in enumerate(slots)]
        back = [min(of, default=t) for t, of in enumerate(reads)]
        ahead = [max((s for s, of in enumerate(reads) if t in of), default=t) for t in range(len(slots))]
        direct = [t for t, slot in enumerate(slots) if self.reads(slot, self.problems.network.input)]
        return back, ahead, direct[-1] + 1

    def run(self, options: DualAscent) -> Points:
        """Every problem to its end."""
        slots, like = self.composition.slots, self.c_v
        R, E, K, d = len(self.of), len(self.counts), self.composition.width, like.shape[1]
        first = self.of.new_tensor([slot.first for slot in slots])
        back, ahead, direct = self._reach()
        real = torch.stack([slot.real.sum(1) for slot in slots], 1).contiguous()
        begin = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        start = torch.cat([self._kept(s) for s in self.starts])
        w, on_lower, v = like.new_empty(R, K), like.new_empty(R, K), like.new_empty(R, d)
        iterations = self.of.new_empty(R)
        threads = torch.get_num_threads()
        k = -(-K // _padding()) * _padding()
        size = kernels().constant("SLOTS") * (13 * k + 3 * d) + 2 * k * k + 5 * k
        room, index = like.new_empty(threads, size), begin.new_empty(threads, 4 * K + len(slots) + 1)
        flat, spread, slope, intercept = self.lines
        kernels().call(
            "ascend",
            like.dtype,
            E=E,
            R=R,
            K=K,
            d=d,
            layers=len(slots),
            direct=direct,
            starts=len(self.starts),
            first=first,
            count=real,
            begin=begin,
            rows=self.rows,
            M=self.matrices,
            N=self.N,
            m=self.m,
            flat=flat,
            spread=spread,
            slope=slope,
            intercept=intercept,
            c_v=self.c_v,
            c_y=self.c_y,
            offset=self.offset,
            start=start,
            radius=self.radius,
            room_size=size,
            room=room,
            index=index,
            w=w,
            on_lower=on_lower,
            v=v,
            back=self.of.new_tensor(back),
            ahead=self.of.new_tensor(ahead),
            iterations=iterations,
            most=options.max_iterations,
            check_every=options.check_every,
            step=options.step,
            decay=options.decay,
            floor=options.floor,
            tol=MARGIN * options.tol,
            threshold=math.nan if options.threshold is None else float(options.threshold),
            first_memory=FIRST,
            second_memory=SECOND,
            tiny=tiny(like.dtype),
        )
        return self._points(w, on_lower, v, iterations)

    def _kept(self, start: DualPoint) -> Tensor:
        """Weights of the kept neurons, [R, K]."""
        parts = [
            flatten_from(start.alpha[slot.name], 1).gather(1, slot.index[self.of]) for slot in self.composition.slots
        ]
        return torch.cat(parts, 1)

    def _points(self, w: Tensor, on_lower: Tensor, v: Tensor, iterations: Tensor) -> Points:
        alpha, tau = {}, {}
        for slot in self.composition.slots:
            index, real = slot.index[self.of], slot.real[self.of]
            given = flatten_from(self.starts[0].alpha[slot.name], 1)
            # Padding names neurons that do not cross: they stay as they were.
            mine = torch.where(real, w[:, slot.span], given.gather(1, index))
            shape = self.problems.hulls[slot.name].free.shape
            alpha[slot.name] = given.scatter(1, index, mine).reshape(shape)
            share = torch.where(real, 1 - on_lower[:, slot.span], 0)
            tau[slot.name] = torch.zeros_like(given).scatter_(1, index, share).reshape(shape)
        x = self.center[self.of] + v[:, : self.center.shape[1]]
        return Points(DualPoint(alpha, {}), PrimalPoint(x.reshape(self.problems.region.shape), tau), iterations)


def _padded(rows: Tensor) -> Tensor:
    """Contiguous, with zeros behind the last dimension up to a whole number of vectors."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _padding())).contiguous()
