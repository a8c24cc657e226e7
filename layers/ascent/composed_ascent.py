"""Dual ascent on some of an example's neurons: what `DualAscent` runs on a CPU where that takes less work than sweeps.

The crossing neurons are kept and the stable ones composed away, or all are kept that are not dead, with nothing
composed: either gives every example its own small matrices. A compiled kernel takes the problems of an example through
all of their iterations in cache (`composed_ascent.c`). The iterates are those of `layer_ascent` and of the matrix-free
sweeps, to rounding: a stable neuron has nothing to choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import torch

from optrelax.layers.ascent.example_matrices import ExampleMatrices, Examples, kernels, padding
from optrelax.layers.ascent.layer_ascent import by_example
from optrelax.layers.batched import join
from optrelax.layers.composition import AffineBlocks, KeptNeurons, kept_neurons
from optrelax.layers.network_solver import Points
from optrelax.layers.problems import DualPoint, Problems
from optrelax.memory_counts import within_solve
from optrelax.networks.graph import Network
from optrelax.networks.ops import Linear, flatten_from

if TYPE_CHECKING:
    from optrelax.layers.ascent.dual_ascent import DualAscent

_USUAL = 12  # iterations that most problems take
_CACHE = 4 * 2**20  # bytes of an example's matrices that double the cost of a multiply-add
_DENSE, _SPARSE = 1.15, 6.0  # what a multiply-add of the network's own sweeps costs, in those of the kernel
_BYTES = 256 * 2**20  # for the matrices of the examples in flight


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
    nodes = [network[name] for name in names if name != network.input]
    return sum((_DENSE if node.of(Linear) else _SPARSE) * node.affine.cost() for node in nodes if node.affine)


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
        return ExampleMatrices(given, starts, keep, blocks).run(options)
    order, ends = given.of.argsort(stable=True), torch.bincount(given.of, minlength=given.count).cumsum(0)
    parts = []
    for start in range(0, given.count, size):
        stop = min(start + size, given.count)
        index = order[int(ends[start - 1]) if start else 0 : int(ends[stop - 1])]
        of = given.of[index] - start
        first = torch.searchsorted(of, torch.arange(stop - start, device=of.device))
        part = Examples(problems.select(index), first, of)
        parts.append(ExampleMatrices(part, [s.select(index) for s in starts], keep, blocks).run(options))
    return join(parts).select(order.argsort())


def _examples_at_once(options: DualAscent, given: Examples, keep: KeptNeurons, blocks: AffineBlocks) -> int:
    """Examples whose matrices, and what their rows are pulled through, fit the memory."""
    problems, network = given.problems, given.problems.network
    masks = [kept_neurons(h.select(given.first), keep) for h in problems.hulls.values()]
    kept = [int(flatten_from(mask, 1).sum(1).max()) for mask in masks]
    inputs, each, every = problems.center[0].numel(), int(given.of.bincount().max()), sum(kept)
    ops = problems.wanted if problems.hulls.keys() - blocks.dense else problems.hulls
    widest = max(math.prod(network.shape_of(name)) for name in ops)
    copies = 2 if inputs % padding() else 1
    # Of the first activation the rows are the network's own; those of one are pulled back at a time.
    entries: float = max(kept[1:], default=0) * 2 * widest + every * every
    if keep == "crossing":
        entries += copies * sum(kept[1:]) * inputs
    entries += each * ((3 + copies) * inputs + 8 * every + 2 * widest)
    most = (options.max_bytes or _room(given)) / (entries * problems.rows.element_size())
    return max(1, int(min(most, given.count)))
