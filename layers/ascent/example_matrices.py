"""The small matrices of examples as the compiled ascent reads them (`composed_ascent.c`), and their solve."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.kernels import native
from optrelax.kernels.signatures import Argument
from optrelax.layers.ascent.schedule import FIRST, MARGIN, SECOND, tiny
from optrelax.layers.composition import AffineBlocks, Composition, KeptNeurons, NeuronSlots
from optrelax.layers.network_solver import Points
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems
from optrelax.networks.ops import flatten_from

if TYPE_CHECKING:
    from optrelax.layers.ascent.dual_ascent import DualAscent


_SIGNATURES = (
    "ascend*(E, R, K, d, layers, direct, starts, most, check_every, room_size, double step, double decay, "
    "double floor, double tol, double threshold, double first_memory, double second_memory, double tiny, "
    "int64 first[layers], int64 count[E * layers], int64 back[layers], int64 ahead[layers], int64 begin[E + 1], "
    "int64 rows[E * K], *M[direct], radius[E * d], N[E * K * K], m[E * K], flat[E * K], spread[E * K], slope[E * K], "
    "intercept[E * K], c_v[R * d], c_y[R * K], offset[R], start[starts * R * K], room[threads * room_size], "
    "int64 index[threads * (4 * K + layers + 1)], w[R * K], on_lower[R * K], v[R * d], int64 iterations[R])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled ascent, or why there is none."""
    return native.build(Path(__file__).with_name("composed_ascent.c"), *_SIGNATURES)


@functools.cache
def padding() -> int:
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


class ExampleMatrices:
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
        like, R, K, d = self.c_v, len(self.of), self.composition.width, self.c_v.shape[1]
        w, on_lower, v = like.new_empty(R, K), like.new_empty(R, K), like.new_empty(R, d)
        iterations = self.of.new_empty(R)
        start = torch.cat([self._kept(s) for s in self.starts])
        flat, spread, slope, intercept = self.lines
        kernels().call(
            "ascend",
            like.dtype,
            starts=len(self.starts),
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
            w=w,
            on_lower=on_lower,
            v=v,
            iterations=iterations,
            **self._sizes(),
            **_schedule(options, like.dtype),
        )
        return self._points(w, on_lower, v, iterations)

    def _sizes(self) -> dict[str, Argument]:
        """How many there are of what, which layers read which, and room to work in."""
        slots, K, d = self.composition.slots, self.composition.width, self.c_v.shape[1]
        back, ahead, direct = self._reach()
        threads, k = torch.get_num_threads(), -(-K // padding()) * padding()
        size = kernels().constant("SLOTS") * (13 * k + 3 * d) + 2 * k * k + 5 * k
        return {
            "E": len(self.counts),
            "R": len(self.of),
            "K": K,
            "d": d,
            "layers": len(slots),
            "direct": direct,
            "first": self.of.new_tensor([slot.first for slot in slots]),
            "count": torch.stack([slot.real.sum(1) for slot in slots], 1).contiguous(),
            "back": self.of.new_tensor(back),
            "ahead": self.of.new_tensor(ahead),
            "begin": torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)]),
            "room_size": size,
            "room": self.c_v.new_empty(threads, size),
            "index": self.counts.new_empty(threads, 4 * K + len(slots) + 1),
        }

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
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % padding())).contiguous()


def _schedule(options: DualAscent, dtype: torch.dtype) -> dict[str, float]:
    """When an ascent stops and how it steps."""
    return {
        "most": options.max_iterations,
        "check_every": options.check_every,
        "step": options.step,
        "decay": options.decay,
        "floor": options.floor,
        "tol": MARGIN * options.tol,
        "threshold": math.nan if options.threshold is None else float(options.threshold),
        "first_memory": FIRST,
        "second_memory": SECOND,
        "tiny": tiny(dtype),
    }
