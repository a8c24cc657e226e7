"""Exactly the verdict of LP-ALL on every image, at a fraction of its cost.

An image is certified by LP-ALL iff the exact layerwise triangle LP proves every margin positive. A certified image
needs no tighter bound and an attacked one can have none, so cheap stages decide what they can; what is left is
bracketed: dual values give outer pre-activation bounds, primal values inner ones, and the exact LP lies between. A
margin whose outer LP is positive is certified by LP-ALL; one with a point of the inner polytope at a margin <= 0 is
not; anything between is solved more exactly, and counted as undecided if it stays there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from optrelax.certification.attacks import PGD, Attack, find_counterexamples
from optrelax.domains import interval
from optrelax.enclosures import Bounds, ordered
from optrelax.layers.ascent.dual_ascent import DualAscent
from optrelax.layers.evaluation import solved
from optrelax.layers.hulls import HullLines, hull_lines
from optrelax.layers.interior_point import InteriorPoint
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems
from optrelax.layers.starts import chord_start, crown_start
from optrelax.layers.sweeps import backward_sweep
from optrelax.networks.graph import Network, Node
from optrelax.regions import InputBox
from optrelax.relaxations import Box, Crown, FastLin, Intersect

__all__ = ["Cascade", "Stage"]

Solver = DualAscent | InteriorPoint

# Values nearer to 0 than this are decided by nobody: float64 sweeps err by some 1e-13 of the values they add.
_AMBIGUOUS = 1e-9


class Stage(IntEnum):
    """Which stage decided an image, and how."""

    MISCLASSIFIED = 0
    CLOSED_FORM = 1
    """Certified by CROWN or Fast-Lin."""
    ATTACKED = 2
    LP_LAST = 3
    """Certified by the triangle LP on closed-form pre-activation bounds."""
    LP_ALL = 4
    """Certified by the layerwise LP."""
    LP_ALL_REFUTED = 5
    """The layerwise LP has a feasible point with a margin <= 0: it cannot certify."""
    UNDECIDED = 6
    """The tolerance leaves it open; counted as not certified."""

    @property
    def certified(self) -> bool:
        """Whether LP-ALL certifies the image."""
        return self in (Stage.CLOSED_FORM, Stage.LP_LAST, Stage.LP_ALL)


@dataclass(frozen=True)
class Bracket:
    """Pre-activation bounds around the exact LP's: outer ones hold it, inner ones are attained in its polytope."""

    outer: Bounds
    inner_lower: Tensor
    inner_upper: Tensor


@dataclass(frozen=True)
class Pass:
    """How exactly neurons and margins are solved in one attempt."""

    neurons: Solver
    margins: Solver


def _passes() -> tuple[Pass, ...]:
    # Most images that LP-ALL cannot certify miss by far: coarse brackets refute them at half the cost.
    return (
        Pass(
            DualAscent(tol=3e-2, max_iterations=8, check_every=4, precision="float32"),
            DualAscent(tol=1e-5, max_iterations=48, threshold=0.0, precision="float32"),
        ),
        Pass(
            DualAscent(tol=1e-3, max_iterations=64, precision="float32"),
            DualAscent(tol=1e-5, max_iterations=96, threshold=0.0, precision="float32"),
        ),
        Pass(
            DualAscent(tol=1e-5, max_iterations=400, precision="float32"),
            DualAscent(tol=1e-6, max_iterations=400, precision="float32"),
        ),
        Pass(InteriorPoint(tol=1e-8), InteriorPoint(tol=1e-8)),
    )


class Cascade:
    """Decides images by LP-ALL, cheapest stage first.

    Sound: a certified image is certified by float64 duals.  Exact: the verdict is that of the exact layerwise LP
    wherever it is not UNDECIDED.
    """

    def __init__(self, network: Network, attack: Attack = PGD(restarts=1, steps=20)) -> None:  # noqa: B008, frozen
        self.network, self.attack = network.lowered, attack
        self.passes = _passes()
        self.closed_form = Intersect(Box(), FastLin(), Crown())

    def decide(self, x: Tensor, region: InputBox, rows: Tensor) -> Tensor:
        """Stage of every image: x [batch, *input_shape] in float64, rows [batch, k, *output_shape] -> [batch].

        All on the network's device.
        """
        with torch.no_grad():
            stage = torch.full((x.shape[0],), int(Stage.UNDECIDED), dtype=torch.int64, device=x.device)
            margins = (self.network(x).flatten(1)[:, None] * rows.flatten(2)).sum(2)
            stage[(margins <= 0).any(1)] = Stage.MISCLASSIFIED
            preactivation = self.closed_form.preactivation_bounds(self.network, region)
            lower = self._closed_margins(region, rows, preactivation)
            self._settle(stage, (lower > _AMBIGUOUS).all(1), Stage.CLOSED_FORM)
            self._attack(stage, region, rows)
            index = (stage == Stage.UNDECIDED).nonzero()[:, 0]
            lower = self._last(stage, index, region, rows, preactivation, lower)
            for attempt in self.passes:
                index = (stage == Stage.UNDECIDED).nonzero()[:, 0]
                if not len(index):
                    break
                self._all(stage, index, region, rows, preactivation, lower, attempt)
            return stage

    def _closed_margins(self, region: InputBox, rows: Tensor, bounds: Mapping[str, Bounds]) -> Tensor:
        """The better of CROWN's and Fast-Lin's bound on these pre-activation bounds, [batch, k]."""
        batch, k = rows.shape[:2]
        example = torch.arange(batch, device=rows.device).repeat_interleave(k)
        problems = self._problems(self.network.output, rows.flatten(0, 1), region, bounds, example)
        starts = self._starts(bounds, self.network.output, example)
        values = [backward_sweep(problems, start).value for start in starts]
        return torch.maximum(*values).reshape(batch, k)

    def _settle(self, stage: Tensor, which: Tensor, verdict: Stage) -> None:
        stage[(stage == Stage.UNDECIDED) & which] = verdict

    def _attack(self, stage: Tensor, region: InputBox, rows: Tensor) -> None:
        index = (stage == Stage.UNDECIDED).nonzero()[:, 0]
        if len(index):
            with torch.enable_grad():
                found = find_counterexamples(
                    self.network, region.select(index), rows[index].flatten(2), self.attack
                ).found
            stage[index[found]] = Stage.ATTACKED

    def _last(
        self,
        stage: Tensor,
        index: Tensor,
        region: InputBox,
        rows: Tensor,
        preactivation: Mapping[str, Bounds],
        lower: Tensor,
    ) -> Tensor:
        """LP-LAST on the margins that closed forms leave open; returns the best lower bounds so far."""
        example, row = (lower[index] <= _AMBIGUOUS).nonzero(as_tuple=True)
        example = index[example]
        bounds = dict(preactivation)
        problems = self._problems(self.network.output, rows[example, row], region, bounds, example)
        solver = DualAscent(tol=1e-4, max_iterations=48, threshold=0.0, precision="float32")
        answer = solved(solver, problems, self._starts(bounds, self.network.output, example))
        lower = lower.clone()
        lower[example, row] = torch.maximum(lower[example, row], answer.lower)
        certified = torch.zeros_like(stage, dtype=torch.bool)
        certified[index] = (lower[index] > _AMBIGUOUS).all(1)
        self._settle(stage, certified, Stage.LP_LAST)
        return lower

    def _all(
        self,
        stage: Tensor,
        index: Tensor,
        region: InputBox,
        rows: Tensor,
        preactivation: Mapping[str, Bounds],
        lower: Tensor,
        attempt: Pass,
    ) -> None:
        """LP-ALL on some images: bracket every hidden neuron, then the open margins."""
        region, rows = region.select(index), rows[index]
        given = {name: Bounds(b.lower[index], b.upper[index]) for name, b in preactivation.items()}
        brackets = self._bracket(region, given, attempt.neurons)
        example, row = (lower[index] <= _AMBIGUOUS).nonzero(as_tuple=True)
        bounds = {name: b.outer for name, b in brackets.items()}
        problems = self._problems(self.network.output, rows[example, row], region, bounds, example)
        answer = solved(attempt.margins, problems, self._starts(bounds, self.network.output, example))
        attained = inner_objective(problems, answer.primal, brackets, example)
        positive = torch.ones(len(index), dtype=torch.bool, device=index.device)
        positive[example[answer.lower <= _AMBIGUOUS]] = False
        refuted = torch.zeros_like(positive)
        refuted[example[attained <= -_AMBIGUOUS]] = True
        stage[index[positive]] = Stage.LP_ALL
        stage[index[refuted & ~positive]] = Stage.LP_ALL_REFUTED

    def _bracket(self, region: InputBox, given: Mapping[str, Bounds], solver: Solver) -> dict[str, Bracket]:
        balls = interval.propagate(self.network, region).balls
        brackets: dict[str, Bracket] = {}
        for node in self.network.activations:
            source, before = node.inputs[0], given[node.name]
            if source in self.network.exact_intervals:
                exact = balls[source].bounds
                brackets[node.name] = Bracket(exact, exact.lower, exact.upper)
            else:
                brackets[node.name] = self._neurons(region, node, before, brackets, solver)
        return brackets

    def _neurons(
        self, region: InputBox, node: Node, before: Bounds, brackets: Mapping[str, Bracket], solver: Solver
    ) -> Bracket:
        """Both LPs of every crossing neuron: dual values outside, objectives of inner points inside."""
        assert node.activation
        lower, upper = before.lower.flatten(1).clone(), before.upper.flatten(1).clone()
        inner_lower, inner_upper = upper.clone(), lower.clone()
        example, neuron = node.activation.crossing(lower, upper).nonzero(as_tuple=True)
        if len(example):
            source = node.inputs[0]
            shape = self.network.shape_of(source)
            rows = lower.new_zeros(len(example), math.prod(shape))
            rows.scatter_(1, neuron[:, None], 1.0)
            both, twice = torch.cat([rows, -rows]).reshape(-1, *shape), example.repeat(2)
            bounds = {name: b.outer for name, b in brackets.items()}
            problems = self._problems(source, both, region, bounds, twice)
            answer = solved(solver, problems, self._starts(bounds, source, twice))
            low, high = answer.lower.chunk(2)
            tight = ordered(torch.maximum(lower[example, neuron], low), torch.minimum(upper[example, neuron], -high))
            lower[example, neuron], upper[example, neuron] = tight.lower, tight.upper
            low, high = inner_objective(problems, answer.primal, brackets, twice).chunk(2)
            inner_lower[example, neuron], inner_upper[example, neuron] = low, -high
        shape = before.lower.shape
        return Bracket(
            Bounds(lower.reshape(shape), upper.reshape(shape)), inner_lower.reshape(shape), inner_upper.reshape(shape)
        )

    def _problems(
        self, target: str, rows: Tensor, region: InputBox, bounds: Mapping[str, Bounds], example: Tensor
    ) -> Problems:
        hulls = {name: h.select(example) for name, h in self._hulls(bounds, target).items()}
        return Problems(self.network, target, rows, region.select(example), hulls, example)

    def _hulls(self, bounds: Mapping[str, Bounds], target: str) -> dict[str, HullLines]:
        wanted = self.network.ancestors(target)
        return {
            node.name: hull_lines(node.op, bounds[node.name])
            for node in self.network.activations
            if node.name in wanted
        }

    def _starts(self, bounds: Mapping[str, Bounds], target: str, example: Tensor) -> list[DualPoint]:
        hulls = self._hulls(bounds, target)
        crown = crown_start(self.network, bounds, hulls)
        return [crown.select(example), chord_start(self.network, hulls, crown).select(example)]


def inner_objective(problems: Problems, point: PrimalPoint, brackets: Mapping[str, Bracket], example: Tensor) -> Tensor:
    """Objective of a point of the exact LP's polytope near `point`: an upper bound of the exact LP's value, [R].

    Each value lies between the activation itself, which every hull holds, and the chord over the inner bounds, which
    lies below the exact LP's chord wherever it exceeds the activation (for a convex one).
    """
    network = problems.network
    values = {network.input: point.x}
    for node in network.nodes:
        if node.name not in problems.wanted:
            continue
        inputs = [values[name] for name in node.inputs]
        if node.affine:
            values[node.name] = node.op.apply(*inputs)
            continue
        assert node.activation
        low = node.op(inputs[0])
        bracket = brackets[node.name]
        l, u = bracket.inner_lower[example], bracket.inner_upper[example]
        usable = node.op.crossing(l, u) & node.op.chord_above
        width = torch.where(usable, u - l, 1.0)
        slope = (node.op(u) - node.op(l)) / width
        chord = node.op(l) + slope * (inputs[0] - l)
        high = torch.where(usable, torch.maximum(low, chord), low)
        values[node.name] = torch.lerp(low, high, point.tau[node.name])
    return torch.linalg.vecdot(problems.rows.flatten(1), values[problems.target].flatten(1))
