"""Dual ascent layer by layer: what `DualAscent` runs over boxes where all activations have one line above.

An iteration is two products a layer, with the matrices of a chain of linear layers or by the network's own ops; all
else is one pass a layer and direction, compiled (`ascent.c`) or eager with the same results. Of a chain the averaged
pre-activations of the first layer are kept beside the averaged inputs, so that the primal point is checked without a
product with the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.layers.ascent.layer_maps import LayerMaps, MatrixMaps, NetworkMaps
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
class Layers:
    """A network's activations up to the target in order, the affine maps between them, and R objectives."""

    problems: Problems
    names: tuple[str, ...]
    maps: LayerMaps
    constants: tuple[Tensor, ...]
    """Of each layer's pre-activations, [n_t]."""
    c: Tensor
    """On what the maps end in, [R, m]."""
    offset: Tensor
    """[R]."""


def layers_of(problems: Problems) -> Layers | None:
    """The problems by layers; None for regions that are no box, and hulls not of a ReLU's kind."""
    hulls = problems.hulls
    wanted = [node for node in problems.network.nodes if node.name in problems.wanted]
    if not hulls or problems.count == 0 or not problems.boxed:
        return None
    if not all(h.origin and h.above1 is None for h in hulls.values()):
        return None
    if not all(node.affine or (node.name in hulls and len(node.inputs) == 1) for node in wanted):
        return None
    ops = [node.affine for node in wanted if node.affine]
    if all(len(node.inputs) == 1 for node in wanted) and all(
        isinstance(op, Linear) or op.diagonal or op.cost() == 0 for op in ops
    ):
        return _chain(problems)
    names = tuple(node.name for node in wanted if not node.affine)
    maps = NetworkMaps(problems, names)
    constants, reached = maps.constants()
    c = flatten_from(problems.rows, 1).contiguous()
    return Layers(problems, names, maps, tuple(constants), c, c @ reached)


def _chain(problems: Problems) -> Layers:
    """Of linear layers, each reading the one before: their matrices, what lies between composed into them."""
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
    return Layers(problems, names, MatrixMaps(weights), tuple(constants), c[0][:, last].contiguous(), offset)


class LayerAscent:
    """Problems on their way; what is finished leaves."""

    def __init__(self, options: DualAscent, given: Layers, starts: Sequence[DualPoint]) -> None:
        self.options, self.given = options, given
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
        sizes = [len(m) for m in self.given.constants]
        new = self.center.new_empty
        self.A: list[Tensor] = [self.c] * len(sizes)
        self.nu, self.y = ([new(count, n) for n in sizes] for _ in range(2))
        self.corner = new(count, self.center.shape[1])
        self.value = new(count)

    def _sweep(self, step: int) -> None:
        """Evaluate the weights, keep the best, take the minimiser into the averages, and step."""
        net = self.given
        self._pull([layer.w for layer in self.layers])
        rates = rates_of(self.options, step)
        better = self.passes.corner(self.a, rates.average, self.corner, self.v, self.value, self.best)

        def forward(t: int, p: Tensor) -> Tensor:
            mean = self.p if t == 0 and net.maps.one_matrix else None
            self.passes.forward(t, p, net.constants[t], self.A[t], self.layers[t], self.y[t], mean, better, rates)
            return self.y[t]

        net.maps.on(self.corner, forward)

    def _pull(self, weights: Sequence[Tensor]) -> None:
        """Objectives pulled back to the input: coefficients of every layer and of the input, constants into `value`."""
        net, before = self.given, self.offset

        def back(t: int, coefficients: Tensor) -> Tensor:
            nonlocal before
            self.A[t] = coefficients
            self.passes.backward(t, coefficients, weights[t], net.constants[t], self.nu[t], before, self.value)
            before = self.value
            return self.nu[t]

        self.a = net.maps.back(self.c, back)

    def _check(self, step: int) -> Tensor:
        """Evaluate the averaged primal point; which problems are finished."""
        net = self.given

        def primal(t: int, p: Tensor) -> Tensor:
            self.passes.primal(t, p, net.constants[t], self.layers[t].on_lower, self.y[t])
            return self.y[t]

        values = net.maps.on(self.v, primal, self.p if net.maps.one_matrix else None)
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
        return [flatten_from(start.alpha[name], 1).contiguous() for name in self.given.names]

    def _bound(self, weights: Sequence[Tensor]) -> Tensor:
        """The bound at these weights, [R]."""
        self._pull(weights)
        best = torch.full_like(self.value, -torch.inf)
        self.passes.corner(self.a, 0.0, self.corner, self.v, self.value, best)
        return best

    def _points(self) -> Points:
        problems = self.given.problems
        shapes = {name: problems.hulls[name].free.shape for name in self.given.names}
        layers = dict(zip(self.given.names, self.found, strict=True))
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


def part(given: Layers, index: Tensor | slice) -> Layers:
    """Some of the problems."""
    return replace(given, problems=given.problems.select(index), c=given.c[index], offset=given.offset[index])
