"""The search of `AlphaCrown`: parameters of every row that is bounded, moved by gradients that are written by hand.

Rows are those of the specification and, up and down, of every hidden neuron that crosses. Where compiled passes take
them (`domains.passes`), a row has parameters for the window that it sees; elsewhere for whole activations, in sweeps
of `layers.problems`. What is optimised is a list of `Parameter`: a new kind is one more entry with its own range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.domains import interval, passes
from optrelax.domains.passes import MixedMaps, Neurons, Program
from optrelax.enclosures import Bounds, ordered
from optrelax.layers.ascent.schedule import FIRST, SECOND, tiny
from optrelax.layers.problems import (
    DualPoint,
    HullLines,
    Problems,
    Weights,
    backward_sweep,
    crown_start,
    dual_value,
    hull_lines,
)
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Preactivation

if TYPE_CHECKING:
    from optrelax.layers.alpha_crown import AlphaCrown

_OUTPUT = "output of the network"


@dataclass(slots=True)
class Parameter:
    """One kind of number that rows choose at an activation, in [low, high]: [rows, ...]."""

    kind: str
    """"alpha": weight between the two lower lines; "beta": between the upper ones, where there are two."""
    node: str
    value: Tensor
    low: float = 0.0
    high: float = 1.0
    best: Tensor = field(init=False)
    moment: Tensor = field(init=False)
    square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.value
        self.moment, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def keep(self, better: Tensor) -> None:
        """Remember the values of some rows."""
        mask = better.reshape(-1, *[1] * (self.value.dim() - 1))
        self.best = torch.where(mask, self.value, self.best)

    def climb(self, grad: Tensor, step: float, correction: float) -> None:
        """A step of Adam."""
        self.moment.lerp_(grad, 1 - FIRST)
        self.square.mul_(SECOND).addcmul_(grad, grad, value=1 - SECOND)
        size = (self.square * correction).sqrt_().add_(tiny(grad.dtype))
        self.value = torch.addcdiv(self.value, self.moment, size, value=step).clamp_(self.low, self.high)

    def select(self, rows: Tensor) -> Parameter:
        """Of some rows."""
        found = Parameter(self.kind, self.node, self.value[rows], self.low, self.high)
        found.best, found.moment, found.square = self.best[rows], self.moment[rows], self.square[rows]
        return found


@dataclass(slots=True)
class BoundedRows:
    """Rows of one node, of any examples, and what each of them chooses."""

    node: str
    neurons: Neurons
    """Example and place of each row, and which it is of the rows that its node is given."""
    index: tuple[Tensor, ...]
    """Of hidden neurons, two rows each: example and entry in the activation."""
    program: Program | None
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def example(self) -> Tensor:
        """Of each row."""
        return self.neurons.place[:, 0]

    def values(self, kind: str) -> Weights:
        """Parameters of one kind, by activation."""
        return {p.node: p.value for p in self.parameters if p.kind == kind}

    def whole(self) -> DualPoint:
        """Weights of all neurons, whatever the rows see of them."""
        alpha, beta = self.values("alpha"), self.values("beta")
        if self.program is not None:
            alpha = {name: passes.on_maps(self.program, name, t, self.neurons) for name, t in alpha.items()}
        return DualPoint(alpha, beta)

    def select(self, mask: Tensor, renumbered: Tensor) -> BoundedRows:
        """Rows of some examples, which get new numbers."""
        rows = mask[self.example].nonzero()[:, 0]
        place = self.neurons.place[rows]
        place[:, 0] = renumbered[place[:, 0]]
        index = self.index
        if index:
            own = mask[index[0]]
            index = (renumbered[index[0][own]], *(t[own] for t in index[1:]))
        parameters = [p.select(rows) for p in self.parameters]
        return BoundedRows(self.node, Neurons(place, self.neurons.which[rows]), index, self.program, parameters)


class SlopeSearch:
    """Everything that is bounded of a batch of examples."""

    def __init__(self, network: Network, region: Region, given: Preactivation, rows: Tensor | None) -> None:
        self.network, self.region = network, region.detach()
        self.given = {name: Bounds.known(b.lower.detach(), b.upper.detach()) for name, b in given.items()}
        self.rows = None if rows is None else rows.detach()
        self.searching = False
        hulls = {n.name: hull_lines(n.op, self.given[n.name]) for n in network.activations}
        crown = crown_start(network, self.given, hulls)
        self.targets: dict[str, BoundedRows] = {}
        known = interval.exact_nodes(network, region)
        for node in network.activations:
            source, b = node.inputs[0], self.given[node.name]
            if source in known:
                continue
            assert isinstance(node.op, Activation)
            crossing = node.op.crossing(b.lower, b.upper)
            if bool(crossing.any()):
                self.targets[node.name] = self._started(self._hidden(source, crossing), crown)
        if rows is not None:
            self.targets[_OUTPUT] = self._started(self._output(rows), crown)

    # --- what is bounded ---

    def _program(self, target: str) -> Program | None:
        """Compiled steps for rows with weights of their own."""
        if not passes.available(self.region):
            return None
        found = passes.program(self.network, target, depth=0)
        if found is None or (found.windows and target == self.network.output):
            return None
        ops = [self.network[name].op for name in found.activations]
        return found if all(op.chord_above and op.origin_below for op in ops) else None  # type: ignore[union-attr]

    def _hidden(self, source: str, crossing: Tensor) -> BoundedRows:
        program = self._program(source)
        if program is not None:
            neurons, index = passes.some_neurons(program, crossing)
            return BoundedRows(source, neurons, index, program)
        example, entry = crossing.flatten(1).nonzero(as_tuple=True)
        n = math.prod(crossing.shape[1:])
        place = torch.zeros(2 * len(example), 3, dtype=torch.int64, device=example.device)
        place[:, 0] = example.repeat_interleave(2)
        neurons = Neurons(place, torch.stack([entry, entry + n], 1).flatten())
        return BoundedRows(source, neurons, crossing.nonzero(as_tuple=True), None)

    def _output(self, rows: Tensor) -> BoundedRows:
        output, batch = self.network.output, self.region.shape[0]
        neurons = passes.rows_of_examples(rows.shape[0], rows.shape[1], batch, self.region.device)
        return BoundedRows(output, neurons, (), self._program(output))

    def _started(self, target: BoundedRows, crown: DualPoint) -> BoundedRows:
        """With CROWN's choice for every row."""
        program, wanted = target.program, self.network.ancestors(target.node)
        for kind, part in (("alpha", crown.alpha), ("beta", crown.beta)):
            for name, t in part.items():
                if program is not None and name in program.activations:
                    target.parameters.append(Parameter(kind, name, passes.seen_by(program, name, t, target.neurons)))
                elif program is None and name in wanted:
                    target.parameters.append(Parameter(kind, name, t[target.example]))
        return target

    # --- bounding ---

    def evaluate(
        self, region: Region, given: Preactivation, rows: Tensor | None, outward: bool
    ) -> tuple[Preactivation, Tensor | None]:
        """Bounds of every layer at the parameters, and of the rows; differentiable."""
        bounds: Preactivation = {}
        hulls: dict[str, HullLines] = {}
        lines = MixedMaps(constant=self.searching)

        def value(target: BoundedRows, rows: Tensor) -> Tensor:
            if target.program is None or outward:
                found = self._swept(target, rows, region, bounds, hulls, outward)
            else:
                found = passes.lower_bounds(
                    target.program, self.network, rows, target.neurons, region, lines, weights=target.values("alpha")
                )
            # What overflows is no bound.
            return torch.where(found.detach().isfinite(), found, -torch.inf)

        for node in self.network.activations:
            before, target = given[node.name], self.targets.get(node.name)
            if target is not None:
                unit = self._unit(target, before, outward)
                before = self._tightened(before, target.index, value(target, unit))
            bounds[node.name] = before
            hulls[node.name] = h = hull_lines(node.op, before)
            if h.above1 is None:
                lines.add(node.name, h.below0, h.below1, h.above0)
        if rows is None:
            return bounds, None
        return bounds, value(self.targets[_OUTPUT], rows).reshape(region.shape[0], rows.shape[1])

    def _unit(self, target: BoundedRows, before: Bounds, outward: bool) -> Tensor:
        """Rows up and down, as the way that they take wants them."""
        if target.program is not None and not outward:
            return passes.unit_rows(target.program, before.lower.shape[1:], before.lower)
        n = math.prod(before.lower.shape[1:])
        flat = before.lower.new_zeros(len(target.example), n)
        at = target.index[0] * 0  # entries of the neurons in their flat activation
        for t, size in zip(target.index[1:], before.lower.shape[1:], strict=True):
            at = at * size + t
        sign = flat.new_tensor([1.0, -1.0]).repeat(len(at))
        flat[torch.arange(len(flat), device=flat.device), at.repeat_interleave(2)] = sign
        return flat.reshape(1, -1, *before.lower.shape[1:])

    def _swept(
        self,
        target: BoundedRows,
        rows: Tensor,
        region: Region,
        bounds: Preactivation,
        hulls: Mapping[str, HullLines],
        outward: bool,
    ) -> Tensor:
        """By sweeps through whole activations: every region, activation and rounding."""
        wanted, example = self.network.ancestors(target.node), target.example
        flat = rows.flatten(0, 1)
        if target.node == self.network.output and not target.index:
            flat = flat[target.neurons.which]
        picked = {name: h.select(example) for name, h in hulls.items() if name in wanted}
        problems = Problems(self.network, target.node, flat, region.select(example), picked)
        dual = self._shaped(target.whole(), picked)
        if not outward:
            return backward_sweep(problems, dual).value
        before = {n: Bounds.known(b.lower[example], b.upper[example]) for n, b in bounds.items() if n in wanted}
        return dual_value(problems, dual, "outward", before)

    def _shaped(self, dual: DualPoint, hulls: Mapping[str, HullLines]) -> DualPoint:
        """Weights in the shapes of their activations; where rows see nothing any will do."""
        alpha = {}
        for name, h in hulls.items():
            t = dual.alpha.get(name)
            alpha[name] = torch.zeros_like(h.below0[0]) if t is None else t.reshape(h.free.shape)
        return replace(dual, alpha=alpha)

    def _tightened(self, before: Bounds, index: tuple[Tensor, ...], value: Tensor) -> Bounds:
        """The better of known bounds and those found for some neurons, up and down."""
        low, high = value.view(-1, 2).unbind(1)
        floor, ceiling = before.lower[index], before.upper[index]
        if self.searching:
            # At the start both agree to rounding, and the slopes of a bound that loses get no gradient: near ties go
            # to the optimised bound, sound as well.
            slack = 1e-6 * (ceiling - floor)
            floor, ceiling = floor - slack, ceiling + slack
        tight = ordered(torch.where(low >= floor, low, floor), torch.where(-high <= ceiling, -high, ceiling))
        return Bounds.known(before.lower.index_put(index, tight.lower), before.upper.index_put(index, tight.upper))

    # --- climbing ---

    def ascend(self, options: AlphaCrown) -> None:
        """Adam on every parameter at once; of each example the best set met is kept."""
        if options.iterations == 0 or not any(t.parameters for t in self.targets.values()):
            return
        self.searching = True
        climb = _Climb(self)
        for n in range(options.iterations + 1):
            score = climb.step(options, n)
            if score is None:
                break
        self.searching = False
        for target in self.targets.values():
            for p in target.parameters:
                p.value = p.best


class _Climb:
    """The examples that are still moving."""

    def __init__(self, search: SlopeSearch) -> None:
        self.search = search
        self.top: Tensor | None = None

    def step(self, options: AlphaCrown, n: int) -> Tensor | None:
        """Bounds at the parameters of now, and a step; None at the end."""
        search = self.search
        moving = [(t, p) for t in search.targets.values() for p in t.parameters]
        last = n == options.iterations
        with torch.set_grad_enabled(not last):
            leaves = [p.value.requires_grad_(not last) for _, p in moving]
            found, lower = search.evaluate(search.region, search.given, search.rows, False)
            score = self._score(found, lower)
            total = score.sum()
        now = score.detach()
        better = torch.ones_like(now, dtype=torch.bool) if self.top is None else now > self.top
        self.top = now if self.top is None else torch.maximum(now, self.top)
        grads: Sequence[Tensor | None] = ()
        if total.requires_grad:
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        for (target, p), leaf in zip(moving, leaves, strict=True):
            p.value = leaf.detach()
            p.keep(better[target.example])
        if not grads:
            return None
        step = options.step * options.decay**n / (1 - FIRST ** (n + 1))
        for (_, p), grad in zip(moving, grads, strict=True):
            if grad is not None:
                p.climb(grad, step, 1 / (1 - SECOND ** (n + 1)))
        return now

    def _score(self, found: Preactivation, lower: Tensor | None) -> Tensor:
        """What is maximised, an example: its lower bounds, or without rows its tightness everywhere."""
        if lower is not None:
            return lower.sum(1)
        widths = [found[name].width.flatten(1).sum(1) for name in self.search.targets]
        return -torch.stack(widths).sum(0) if widths else self.search.region.like.new_zeros(self.search.region.shape[0])
