"""Dual ascent on the dense matrices of a chain of layers: what `DualAscent` runs on fully connected networks.

An iteration is two products a layer; all else is one pass a layer and direction, compiled (`ascent.c`) or eager with
the same results. The averaged pre-activations of the first layer are kept beside the averaged inputs, so that the
primal point is checked without a product with the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.layers.ascent.schedule import finished
from optrelax.layers.ascent.schedule import rates as rates_of
from optrelax.layers.ascent.vector_passes import Layer, LayerLines, passes
from optrelax.layers.composition import Composition
from optrelax.layers.network_solver import Points
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems
from optrelax.networks.ops import Linear, flatten_from

if TYPE_CHECKING:
    from optrelax.layers.ascent.dual_ascent import DualAscent


@dataclass(frozen=True)
class Chain:
    """A network's layers up to the target as matrices, each reading the one before, and R objectives on the last."""

    problems: Problems
    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    """[n_t, n_(t-1)], n_(-1) the entries of an input."""
    constants: tuple[Tensor, ...]
    """[n_t]."""
    c: Tensor
    """[R, n_T]."""
    offset: Tensor
    """[R]."""


def chain(problems: Problems) -> Chain | None:
    """The problems as a chain; None for convolutions, other graphs and regions, hulls not of a ReLU's kind."""
    hulls = problems.hulls
    wanted = [node for node in problems.network.nodes if node.name in problems.wanted]
    ops = [node.affine for node in wanted if node.affine]
    if not hulls or problems.count == 0 or not problems.boxed or any(len(node.inputs) > 1 for node in wanted):
        return None
    if not all(isinstance(op, Linear) or op.diagonal or op.cost() == 0 for op in ops):
        return None
    if not all(h.origin and h.above1 is None for h in hulls.values()):
        return None
    composition = Composition(problems.select(torch.zeros(1, dtype=torch.int64, device=problems.rows.device)), "all")
    weights, constants = [], []
    values, reached = composition.values(torch.zeros_like(composition.problems.center))
    for t, slot in enumerate(composition.slots):
        on_input, on_values = composition.neurons(slot)
        weights.append((on_input if t == 0 else on_values[..., composition.slots[t - 1].span])[0].contiguous())
        constants.append(values[slot.name].flatten())
    _, c = composition.pull(problems.target, problems.rows[None])
    offset = flatten_from(problems.rows, 1) @ reached.flatten()
    names = tuple(slot.name for slot in composition.slots)
    last = composition.slots[-1].span
    return Chain(problems, names, tuple(weights), tuple(constants), c[0][:, last].contiguous(), offset)


class DenseAscent:
    """Problems on their way; what is finished leaves."""

    def __init__(self, options: DualAscent, given: Chain, starts: Sequence[DualPoint]) -> None:
        self.options, self.chain = options, given
        problems = given.problems
        device, count = problems.rows.device, problems.count
        first, self.example = by_example(problems)
        self.lines = [_lines(problems, name, first) for name in given.names]
        lower, upper = (flatten_from(t[first], 1) for t in (problems.box.lower, problems.box.upper))
        self.center, self.radius = (lower + upper) * 0.5, (upper - lower) * 0.5
        self.live = torch.arange(count, device=device)
        new = given.c.new_zeros
        d = self.center.shape[1]
        self.v, self.best_v = new(count, d), new(count, d)
        self.p = new(count, len(given.constants[0]))
        self.best, self.objective = new(count).fill_(-torch.inf), new(count).fill_(torch.inf)
        self.c, self.offset = given.c, given.offset
        self._prepare()
        self.layers = [Layer.at(w) for w in self._best_start(starts)]
        # Results of all problems; live ones are written back when they leave.
        self.found = [Layer.at(layer.w) for layer in self.layers]
        self.found_v = new(count, d)
        self.iterations = torch.zeros(count, dtype=torch.int64, device=device)

    def run(self) -> Points:
        """Both points of every problem."""
        options = self.options
        for step in range(options.max_iterations + 1):
            self._sweep(step)
            last = step == options.max_iterations
            if last or step % options.check_every == 0:
                done = self._check(step)
                if last or bool(done.all()):
                    break
                self._compact(done)
        self._store()
        return self._points()

    def _prepare(self) -> None:
        """Passes and buffers for the problems that are left."""
        count = len(self.live)
        self.passes = passes(self.example[self.live], self.lines, self.center, self.radius)
        sizes = [len(m) for m in self.chain.constants]
        new = self.center.new_empty
        # Of the last layer the coefficients are the objectives.
        self.A = [*(new(count, n) for n in sizes[:-1]), self.c]
        self.nu, self.y, self.before = ([new(count, n) for n in sizes] for _ in range(3))
        self.a, self.corner = (new(count, self.center.shape[1]) for _ in range(2))
        self.value = new(count)

    def _sweep(self, step: int) -> None:
        """Evaluate the weights, keep the best, take the minimiser into the averages, and step."""
        net = self.chain
        self._pull([layer.w for layer in self.layers])
        rates = rates_of(self.options, step)
        better = self.passes.corner(self.a, rates.average, self.corner, self.v, self.value, self.best)
        values = self.corner
        for t, layer in enumerate(self.layers):
            p = torch.mm(values, net.weights[t].mT, out=self.before[t])
            mean = self.p if t == 0 else None
            self.passes.forward(t, p, net.constants[t], self.A[t], layer, self.y[t], mean, better, rates)
            values = self.y[t]

    def _pull(self, weights: Sequence[Tensor]) -> None:
        """Objectives pulled back to the input: coefficients into the buffers, constants into `value`."""
        net, before = self.chain, self.offset
        for t in range(len(weights) - 1, -1, -1):
            self.passes.backward(t, self.A[t], weights[t], net.constants[t], self.nu[t], before, self.value)
            torch.mm(self.nu[t], net.weights[t], out=self.A[t - 1] if t else self.a)
            before = self.value

    def _check(self, step: int) -> Tensor:
        """Evaluate the averaged primal point; which problems are finished."""
        net, values = self.chain, self.v
        for t, layer in enumerate(self.layers):
            p = self.p if t == 0 else torch.mm(values, net.weights[t].mT, out=self.before[t])
            self.passes.primal(t, p, net.constants[t], layer.on_lower, self.y[t])
            values = self.y[t]
        objective = self.offset + torch.linalg.vecdot(self.c, values)
        better = (objective < self.objective).nonzero()[:, 0]
        self.objective[better] = objective[better]
        self.best_v[better] = self.v[better]
        for layer in self.layers:
            layer.best_on_lower[better] = layer.on_lower[better]
        self.iterations[self.live] = step
        return finished(self.options, self.best, self.objective)

    def _compact(self, done: Tensor) -> None:
        """Let finished problems leave once they are a fifth of the batch."""
        if 5 * int(done.sum()) < len(done):
            return
        self._store()
        keep = (~done).nonzero()[:, 0]
        self.live, self.layers = self.live[keep], [layer.select(keep) for layer in self.layers]
        kept = (self.v, self.best_v, self.p, self.best, self.objective, self.c, self.offset)
        self.v, self.best_v, self.p, self.best, self.objective, self.c, self.offset = (t[keep] for t in kept)
        self._prepare()

    def _store(self) -> None:
        """Write the live problems' results back."""
        for found, layer in zip(self.found, self.layers, strict=True):
            found.best[self.live] = layer.best
            found.best_on_lower[self.live] = layer.best_on_lower
        self.found_v[self.live] = self.best_v

    def _best_start(self, starts: Sequence[DualPoint]) -> list[Tensor]:
        """Problem by problem the weights of the start with the greatest bound, layer by layer."""
        best, value = self._weights(starts[0]), self._bound(self._weights(starts[0]))
        for other in starts[1:]:
            weights = self._weights(other)
            found = self._bound(weights)
            better = (found > value).to(value)[:, None]
            best = [w.lerp(o, better) for w, o in zip(best, weights, strict=True)]
            value = torch.maximum(value, found)
        return best

    def _weights(self, start: DualPoint) -> list[Tensor]:
        return [flatten_from(start.alpha[name], 1).contiguous() for name in self.chain.names]

    def _bound(self, weights: Sequence[Tensor]) -> Tensor:
        """The bound at these weights, [R]."""
        self._pull(weights)
        best = torch.full_like(self.value, -torch.inf)
        self.passes.corner(self.a, 0.0, self.corner, self.v, self.value, best)
        return best

    def _points(self) -> Points:
        problems = self.chain.problems
        shapes = {name: problems.hulls[name].free.shape for name in self.chain.names}
        layers = dict(zip(self.chain.names, self.found, strict=True))
        alpha = {name: layers[name].best.reshape(shape) for name, shape in shapes.items()}
        tau = {name: (1 - layers[name].best_on_lower).reshape(shape) for name, shape in shapes.items()}
        primal = PrimalPoint(self.found_v.reshape(problems.region.shape), tau)
        return Points(DualPoint(alpha, {}), primal, self.iterations)


def by_example(problems: Problems) -> tuple[Tensor, Tensor]:
    """One problem of each example [E], and the example of each problem [R]."""
    every = torch.arange(problems.count, device=problems.rows.device)
    if problems.example is None:
        return every, every
    _, example = problems.example.unique(return_inverse=True)
    first = every.new_zeros(int(example.max()) + 1).index_copy_(0, example, every)
    return first, example


def _lines(problems: Problems, name: str, first: Tensor) -> LayerLines:
    h = problems.hulls[name]
    flat, steep, slope, intercept = (
        flatten_from(t[first], 1).contiguous() for t in (h.below0[0], h.below1[0], *h.above0)
    )
    return LayerLines(flat, steep - flat, slope, intercept)


def part(given: Chain, index: Tensor) -> Chain:
    """Some of the problems."""
    return replace(given, problems=given.problems.select(index), c=given.c[index], offset=given.offset[index])
