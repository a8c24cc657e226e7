"""The search of `AlphaCrown`: parameters of every row that is bounded, moved by gradients that are written by hand.

Rows are those of the specification and, up and down, of every hidden neuron that crosses. Where compiled passes take
them (`domains/passes`), a row has parameters for the window that it sees; elsewhere for whole activations, in sweeps
of `layers.problems`. What is optimised is a list of `Parameter`: a new kind is one more entry with its own range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax import memory
from optrelax.domains import interval
from optrelax.domains.passes import planning, running
from optrelax.domains.passes.line_maps import MixedMaps
from optrelax.domains.passes.neurons import Neurons, rows_of_examples
from optrelax.domains.passes.programs import Program
from optrelax.enclosures import Bounds, ordered
from optrelax.layers.ascent.schedule import FIRST, SECOND, tiny
from optrelax.layers.hulls import HullLines, hull_lines, hulls_at, mix, product_hull
from optrelax.layers.problems import DualPoint, Problems, Weights
from optrelax.layers.starts import crown_start
from optrelax.layers.sweeps import backward_sweep, dual_value
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Preactivation

if TYPE_CHECKING:
    from optrelax.layers.alpha_crown import AlphaCrown

_SIDES = {"below": -1.0, "above": 1.0}
_OUTPUT = "output of the network"


@dataclass(slots=True)
class Parameter:
    """One kind of number that rows choose at an activation, in [low, high]: [rows, ...]."""

    kind: str
    """"alpha": weight between the two lower lines or planes; "beta": between the upper ones, where there are two;
    "below", "above": where the line of a curved function touches it (`Activation.supporting`)."""
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
            alpha = {name: self.program.on_maps(name, t, self.neurons) for name, t in alpha.items()}
        return DualPoint(alpha, beta)

    def part(self, rows: Tensor) -> BoundedRows:
        """Some rows and their values."""
        parameters = [Parameter(p.kind, p.node, p.value[rows], p.low, p.high) for p in self.parameters]
        place, which = self.neurons.place[rows], self.neurons.which[rows]
        return BoundedRows(self.node, Neurons(place, which), self.index, self.program, parameters)

    def select(self, rows: Tensor, examples: Tensor, renumbered: Tensor) -> BoundedRows:
        """Some rows: those of some examples, which get new numbers."""
        place = self.neurons.place[rows]
        place[:, 0] = renumbered[place[:, 0]]
        index = self.index
        if index:
            own = examples[index[0]]
            index = (renumbered[index[0][own]], *(t[own] for t in index[1:]))
        parameters = [p.select(rows) for p in self.parameters]
        return BoundedRows(self.node, Neurons(place, self.neurons.which[rows]), index, self.program, parameters)


SWEPT = 12
"""Numbers a neuron and input that a row of a sweep takes: lines, coefficients and what a gradient keeps of them."""
SLID = 60
"""Likewise, of a curved function: its lines at a point of tangency of the row's own, on both sides."""
_LOT = 2**26
"""Bytes of the rows that are swept at once where nothing is kept of them."""


def swept_numbers(network: Network) -> int:
    """Numbers that one row of a sweep takes."""
    entries = memory.hidden_entries(network) + math.prod(network.input_shape)
    curved = sum(math.prod(node.shape) for node in network.activations if node.op.slides)
    return SWEPT * entries + SLID * curved


def lot(network: Network, region: Region) -> int:
    """Rows that are swept at once where nothing is kept of them."""
    return max(1, _LOT // (swept_numbers(network) * region.dtype.itemsize))


def windowed(network: Network, region: Region, target: str) -> Program | None:
    """Compiled steps for rows of a node that have weights of their own; None where sweeps do it."""
    if not planning.available(region):
        return None
    found = planning.program(network, target, depth=0)
    if found is None or (found.windows and target == network.output):
        return None
    ops = [network[name].op for name in found.activations]
    return found if all(op.chord_above and op.origin_below for op in ops) else None  # type: ignore[union-attr]


class SlopeSearch:
    """Everything that is bounded of a batch of examples."""

    def __init__(self, network: Network, region: Region, given: Preactivation, rows: Tensor | None) -> None:
        self.network, self.region = network, region.detach()
        self.given = {name: Bounds.known(b.lower.detach(), b.upper.detach()) for name, b in given.items()}
        self.rows = None if rows is None else rows.detach()
        self.searching = False
        crown = crown_start(network, self.given, hulls_at(network, self.given))
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

    def _hidden(self, source: str, crossing: Tensor) -> BoundedRows:
        program = windowed(self.network, self.region, source)
        if program is not None:
            neurons, index = program.some_neurons(crossing)
            return BoundedRows(source, neurons, index, program)
        example, entry = crossing.flatten(1).nonzero(as_tuple=True)
        n = math.prod(crossing.shape[1:])
        place = torch.zeros(2 * len(example), 3, dtype=torch.int64, device=example.device)
        place[:, 0] = example.repeat_interleave(2)
        neurons = Neurons(place, torch.stack([entry, entry + n], 1).flatten())
        return BoundedRows(source, neurons, crossing.nonzero(as_tuple=True), None)

    def _output(self, rows: Tensor) -> BoundedRows:
        output, batch = self.network.output, self.region.shape[0]
        neurons = rows_of_examples(rows.shape[0], rows.shape[1], batch, self.region.device)
        return BoundedRows(output, neurons, (), windowed(self.network, self.region, output))

    def _started(self, target: BoundedRows, crown: DualPoint) -> BoundedRows:
        """With CROWN's choice for every row."""
        program, wanted = target.program, self.network.ancestors(target.node)
        for kind, part in (("alpha", crown.alpha), ("beta", crown.beta)):
            for name, t in part.items():
                if program is not None and name in program.activations:
                    target.parameters.append(Parameter(kind, name, program.seen_by(name, t, target.neurons)))
                elif program is None and name in wanted:
                    target.parameters.append(Parameter(kind, name, t[target.example]))
        for node in self.network.activations:
            op, name = node.op, node.name
            for kind, sign in _SIDES.items() if op.slides and name in wanted else ():
                share = op.closest_share(self.given[name].lower, self.given[name].upper, sign)
                target.parameters.append(Parameter(kind, name, share[target.example]))
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
                found = running.lower_bounds(
                    target.program, self.network, rows, target.neurons, region, lines, weights=target.values("alpha")
                )
            # What overflows is no bound.
            return torch.where(found.detach().isfinite(), found, -torch.inf)

        for node in self.network.relaxed:
            if not isinstance(node.op, Activation):
                hulls[node.name] = product_hull(*(bounds[name] for name in node.inputs))
                continue
            before, target = given[node.name], self.targets.get(node.name)
            if target is not None:
                unit = self._unit(target, before, outward)
                before = self._tightened(before, target.index, value(target, unit))
            bounds[node.name] = before
            hulls[node.name] = h = hull_lines(node.op, before)
            if h.above1 is None:
                lines.add(node.name, h.below0, h.below1, h.above0)  # type: ignore[arg-type]
        if rows is None:
            return bounds, None
        return bounds, value(self.targets[_OUTPUT], rows).reshape(region.shape[0], rows.shape[1])

    def _unit(self, target: BoundedRows, before: Bounds, outward: bool) -> Tensor:
        """Rows up and down, as the way that they take wants them."""
        if target.program is not None and not outward:
            return target.program.unit_rows(before.lower.shape[1:], before.lower)
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
        picked = {name: h for name, h in hulls.items() if name in wanted}
        before = {name: b for name, b in bounds.items() if name in wanted}

        def some(rows: Tensor) -> Tensor:
            own = example[rows]
            lines = {name: h.select(own) for name, h in picked.items()}
            part = target.part(rows)
            dual = self._shaped(part.whole(), lines)
            lines = {name: self._slid(name, h, dual, part) for name, h in lines.items()}
            problems = Problems(self.network, target.node, flat[rows], region.select(own), lines)
            if not outward:
                return backward_sweep(problems, dual).value
            known = {n: Bounds.known(b.lower[own], b.upper[own]) for n, b in before.items()}
            return dual_value(problems, dual, "outward", known)

        size = len(example) if torch.is_grad_enabled() else lot(self.network, region)
        return torch.cat([some(rows) for rows in torch.arange(len(example), device=example.device).split(max(1, size))])

    def _slid(self, name: str, h: HullLines, dual: DualPoint, part: BoundedRows) -> HullLines:
        """Of a curved function the lines that touch it where each row says; its mixed lines where none do."""
        if name not in part.values("below"):
            return h
        op, (l, u) = self.network[name].op, h.before
        assert isinstance(op, Activation)
        found = []
        for kind, mixed in (
            ("below", mix(h.below0, h.below1, dual.alpha[name])),
            ("above", mix(h.above0, h.above1, dual.beta.get(name))),
        ):
            (slope, intercept), there = op.supporting(l, u, part.values(kind)[name], _SIDES[kind])
            found.append((torch.where(there, slope, mixed[0]), torch.where(there, intercept, mixed[1])))
        below, above = found
        return replace(h, below0=below, below1=below, above0=above, above1=None)

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
        if options.iterations and any(t.parameters for t in self.targets.values()):
            _Climb(self, options).run()
        for target in self.targets.values():
            for p in target.parameters:
                p.value = p.best

    def select(self, examples: Tensor) -> tuple[SlopeSearch, dict[str, Tensor]]:
        """Of some examples, a mask; and which rows of each target these are."""
        found = copy(self)
        renumbered = examples.cumsum(0) - 1
        found.region = self.region.select(examples)
        found.given = {name: Bounds.known(b.lower[examples], b.upper[examples]) for name, b in self.given.items()}
        rows = {name: examples[t.example].nonzero()[:, 0] for name, t in self.targets.items()}
        found.targets = {name: t.select(rows[name], examples, renumbered) for name, t in self.targets.items()}
        return found, rows


class _Climb:
    """The examples that are still moving, and what they reached."""

    def __init__(self, search: SlopeSearch, options: AlphaCrown) -> None:
        self.whole, self.options = search, options
        self.search, _ = search.select(
            torch.ones(search.region.shape[0], dtype=torch.bool, device=search.region.device)
        )
        self.search.searching = True
        self.rows = {name: torch.arange(len(t.example), device=t.example.device) for name, t in search.targets.items()}
        self.start = self.top = search.region.like.new_full((search.region.shape[0],), -torch.inf)
        self.waited = torch.zeros_like(self.top)

    def run(self) -> None:
        """All iterations, or until no example gains from them."""
        for n in range(self.options.iterations + 1):
            done = self._step(n)
            if bool(done.all()):
                break
            if int(done.sum()) * 5 >= len(done):  # copies cost as much as an iteration of a few
                self._leave(done)
        self._store()

    def _step(self, n: int) -> Tensor:
        """Bounds at the parameters of now, and a step; which examples are done."""
        options, search = self.options, self.search
        moving = [(t, p) for t in search.targets.values() for p in t.parameters]
        last = n == options.iterations
        with torch.set_grad_enabled(not last):
            leaves = [p.value.requires_grad_(not last) for _, p in moving]
            found, lower = search.evaluate(search.region, search.given, search.rows, False)
            score = self._score(found, lower)
            total = score.sum()
        grads: Sequence[Tensor | None] = ()
        if total.requires_grad:
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        better, done = self._judge(score.detach(), None if lower is None else lower.detach(), n)
        for (target, p), leaf in zip(moving, leaves, strict=True):
            p.value = leaf.detach()
            p.keep(better[target.example])
        if not grads:
            return torch.ones_like(done)
        step = options.step * options.decay**n / (1 - FIRST ** (n + 1))
        for (_, p), grad in zip(moving, grads, strict=True):
            if grad is not None:
                p.climb(grad, step, 1 / (1 - SECOND ** (n + 1)))
        return done

    def _judge(self, score: Tensor, lower: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """Which examples are better than ever, and which need no more."""
        options = self.options
        if n == 0:
            self.start = self.top = score
            return torch.ones_like(score, dtype=torch.bool), self._decided(lower, score)
        better = score > self.top
        gain = torch.where(better, score - self.top, 0.0)
        self.top = torch.where(better, score, self.top)
        # A bound that was infinite and is not has gained.
        idle = gain <= options.tol * (self.top - self.start)
        self.waited = torch.where(idle, self.waited + 1, 0.0)
        return better, self._decided(lower, score) | (self.waited >= options.patience)

    def _decided(self, lower: Tensor | None, score: Tensor) -> Tensor:
        if lower is None or self.options.threshold is None:
            return torch.zeros_like(score, dtype=torch.bool)
        return (lower > self.options.threshold).all(1)

    def _leave(self, done: Tensor) -> None:
        """Only the others go on."""
        self._store()
        self.search, rows = self.search.select(~done)
        self.rows = {name: own[rows[name]] for name, own in self.rows.items()}
        self.start, self.top, self.waited = (t[~done] for t in (self.start, self.top, self.waited))

    def _store(self) -> None:
        """What was reached, in the whole search."""
        for name, target in self.search.targets.items():
            for mine, p in zip(self.whole.targets[name].parameters, target.parameters, strict=True):
                mine.best = mine.best.index_copy(0, self.rows[name], p.best)

    def _score(self, found: Preactivation, lower: Tensor | None) -> Tensor:
        """What is maximised, an example: its lower bounds, or without rows its tightness everywhere."""
        if lower is not None:
            return lower.sum(1)
        widths = [found[name].width.flatten(1).sum(1) for name in self.search.targets]
        return -torch.stack(widths).sum(0)
