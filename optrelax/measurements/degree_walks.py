"""Bounds whose degrees are tracked: the three ways of a relaxation's bounds through a network, op by op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from optrelax.domains.zonotope_rows import frontier
from optrelax.measurements.degree_lines import LineDegrees, NeuronBounds, Sides
from optrelax.measurements.rationals import Ratio
from optrelax.measurements.tracked import Tracked, Values
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.graph import Network, Node
from optrelax.networks.walks import carried_back
from optrelax.regions import InputBox
from optrelax.relaxations import Relaxation, name_of
from optrelax.relaxations.base import LineRelaxation, Loosen

__all__ = ["DegreeWalk", "LinearMap", "TrackedBounds"]


@dataclass(frozen=True, slots=True)
class LinearMap:
    """An affine op as matrices [out, in], one an input, and a bias [out], entries tracked."""

    matrices: tuple[Tracked, ...]
    bias: Tracked


@dataclass(frozen=True, slots=True)
class TrackedBounds:
    """Pre-activation bounds of every activation, and lower bounds [k] of rows [k, outputs] of the output."""

    preactivation: Mapping[str, NeuronBounds]
    rows: Callable[[Values], Tracked]
    forward: bool = True
    """Whether pre-activation bounds are carried forward: of rows pulled back, too much would cancel unseen."""


@dataclass(slots=True, kw_only=True)
class DegreeWalk(LineDegrees):
    """One example's walks through the graph."""

    network: Network
    region: InputBox
    linear: Mapping[str, LinearMap]
    kinked: Mapping[str, PiecewiseLinear]

    def bounds(self, relaxation: Relaxation) -> TrackedBounds:
        """The bounds of a relaxation; ValueError for one whose bounds come about in no way that is known here."""
        found = relaxation.propagated(self)
        if found is None:
            raise ValueError(f"step_degrees: has no rule for {name_of(relaxation)}")
        return found

    def intervals(self, loosen: Loosen | None) -> TrackedBounds:
        before, ends = self._intervals(loosen)
        return TrackedBounds(before, partial(self._folded, {name: (None, *pair) for name, pair in ends.items()}))

    def hybrid(self, relaxation: LineRelaxation) -> TrackedBounds:
        before, state = self._hybrid(relaxation)
        return TrackedBounds(before, partial(self._folded, state))

    def lines(self, relaxation: LineRelaxation) -> TrackedBounds:
        lines, ends = self._lines(relaxation)
        rows = partial(self._substituted, self.network.output, lines=lines, ends=ends)
        return TrackedBounds(ends, rows, forward=False)

    def _input(self) -> tuple[Tracked, Tracked]:
        low, high = (t[0].flatten().cpu().numpy() for t in (self.region.lower, self.region.upper))
        return self.constant(low), self.constant(high)

    def _parts(self, node: Node) -> list[tuple[Tracked, str]]:
        return list(zip(self.linear[node.name].matrices, node.inputs, strict=True))

    def _ends(self, node: Node, ends: Mapping[str, tuple[Tracked, Tracked]]) -> tuple[Tracked, Tracked]:
        """Least and greatest value of an affine op between the ends of what it reads."""
        bias, parts = self.linear[node.name].bias, self._parts(node)
        low = self.plus(bias, *(self.least(m, *ends[i]) for m, i in parts))
        negated = self.plus(self.minus(bias), *(self.least(self.minus(m), *ends[i]) for m, i in parts))
        return low, self.minus(negated)

    def _intervals(self, loosen: Loosen | None) -> tuple[dict[str, NeuronBounds], dict[str, tuple[Tracked, Tracked]]]:
        """Pre-activation bounds, and both ends of every node's value."""
        found = {self.network.input: self._input()}
        before: dict[str, NeuronBounds] = {}
        for node in self.network:
            if node.name in self.linear:
                found[node.name] = self._ends(node, found)
            else:
                l, u = self._loosened(loosen, *found[node.inputs[0]])
                before[node.name] = NeuronBounds(l, u)
                found[node.name] = (self.image(self.kinked[node.name], l), self.image(self.kinked[node.name], u))
        return before, found

    def _loosened(self, loosen: Loosen | None, l: Tracked, u: Tracked) -> tuple[Tracked, Tracked]:
        """Ends moved outward by a constant, or by what the grid leaves: affine in the end between grid lines."""
        if loosen is None:
            return l, u
        low, high = loosen(torch.from_numpy(l.value), torch.from_numpy(u.value))
        one = self.constant(np.ones_like(l.value))
        return Tracked(low.numpy(), self.plus(l, one).ratio), Tracked(high.numpy(), self.plus(u, one).ratio)

    def _hybrid(
        self, relaxation: LineRelaxation
    ) -> tuple[dict[str, NeuronBounds], dict[str, tuple[Tracked | None, Tracked, Tracked]]]:
        """Pre-activation bounds; of every node's value the input's coefficients [n, pixels] and an interval's ends."""
        pixels = len(self.region.lower.flatten())
        zero = self.constant(np.zeros(pixels))
        state = {self.network.input: (self.constant(np.eye(pixels)), zero, zero)}
        before: dict[str, NeuronBounds] = {}
        for node in self.network:
            if node.name in self.linear:
                low, high = self._ends(node, {name: (l, u) for name, (_, l, u) in state.items()})
                state[node.name] = (self.plus(*(self.matmul(m, state[i][0]) for m, i in self._parts(node))), low, high)
            else:
                a, low, high = state[node.inputs[0]]
                ends = NeuronBounds(
                    self.plus(self.least(a, *self._input()), low),
                    self.minus(self.plus(self.least(self.minus(a), *self._input()), self.minus(high))),
                )
                before[node.name] = ends
                (slope, below), (_, above) = self.sides(relaxation, self.kinked[node.name], ends)
                column = Tracked(slope.value[:, None], slope.ratio[:, None])
                moved = (self.plus(self.scaled(slope, low), below), self.plus(self.scaled(slope, high), above))
                state[node.name] = (self.scaled(column, a), *moved)
        return before, dict(state)

    def _folded(self, state: Mapping[str, tuple[Tracked | None, Tracked, Tracked]], rows: Values) -> Tracked:
        """Rows folded into the last affine ops, at the worst of what the frontier holds."""
        stops, terms, noise = frontier(self.network), [], []

        def step(node: Node, a: Tracked) -> Iterable[tuple[str, Tracked]] | None:
            if node.name in stops:
                return None
            terms.append(self.apply(a, self.linear[node.name].bias))
            return [(name, self.matmul(a, matrix)) for matrix, name in self._parts(node)]

        for name, a in carried_back(self.network, {self.network.output: self.constant(rows)}, step, self.plus).items():
            coefficients, low, high = state[name]
            terms.append(self.least(a, low, high))
            if coefficients is not None:
                noise.append(self.matmul(a, coefficients))
        if noise:
            terms.append(self.least(self.plus(*noise), *self._input()))
        return self.plus(*terms)

    def _lines(self, relaxation: LineRelaxation) -> tuple[dict[str, Sides], dict[str, NeuronBounds]]:
        """Both lines, and the pre-activation bounds, of every activation."""
        given = self._given(relaxation)
        intervals = self._intervals(None)[0]
        lines: dict[str, Sides] = {}
        ends: dict[str, NeuronBounds] = {}
        for node in self.network.activations:
            source = node.inputs[0]
            if given is not None:
                ends[node.name] = given[node.name]
            elif source in self.network.exact_intervals:
                ends[node.name] = intervals[node.name]
            else:
                eye = np.eye(math.prod(node.shape))
                low = self._substituted(source, eye, lines, ends)
                ends[node.name] = NeuronBounds(low, self.minus(self._substituted(source, -eye, lines, ends)))
            lines[node.name] = self.sides(relaxation, self.kinked[node.name], ends[node.name])
        return lines, ends

    def _given(self, relaxation: Relaxation) -> Mapping[str, NeuronBounds] | None:
        """Pre-activation bounds by the relaxation's part; None where it finds its own."""
        for part in relaxation.parts:
            found = self.bounds(part)
            if not found.forward:
                raise ValueError(f"step_degrees: has no rule for pre-activation bounds by {name_of(part)}")
            return found.preactivation
        return None

    def _substituted(
        self, target: str, rows: Values, lines: Mapping[str, Sides], ends: Mapping[str, NeuronBounds]
    ) -> Tracked:
        """Back-substitution: [k].

        Its value is that of the network in which each activation is the line that the sign of its coefficient chose,
        at the worst corner of the region; walked forwards, so that a chord met at its own end is seen to be exact.
        """
        found = [self._at_corner(target, row, lines, ends) for row in rows]
        ratio = np.empty(len(found), dtype=object)
        ratio[:] = [r for _, r in found]
        return Tracked(np.array([v for v, _ in found]), ratio)

    def _at_corner(
        self, target: str, row: Values, lines: Mapping[str, Sides], ends: Mapping[str, NeuronBounds]
    ) -> tuple[float, Ratio | None]:
        coefficients = self._coefficients(target, row, lines)
        low, high = self._input()
        at_input = coefficients.get(self.network.input, np.zeros_like(low.value))
        values = {self.network.input: self.chosen(at_input > 0, low, high)}
        wanted = self.network.ancestors(target)
        for node in self.network:
            if node.name not in wanted:
                continue
            if node.name in self.linear:
                parts = [self.apply(matrix, values[name]) for matrix, name in self._parts(node)]
                values[node.name] = self.plus(self.linear[node.name].bias, *parts)
            else:
                below = coefficients[node.name] > 0
                values[node.name] = self._on_lines(node, values[node.inputs[0]], below, lines, ends)
        if target not in values:
            return float(row @ values[self.network.input].value), Ratio(0)
        # A row of constants leaves degrees alone but for what it does not read.
        out = self.apply(self.constant(row[None]), values[target])
        return float(out.value[0]), out.ratio[0]

    def _coefficients(self, target: str, row: Values, lines: Mapping[str, Sides]) -> dict[str, Values]:
        """The row's coefficient at the value of every node before the target, numbers only."""
        found: dict[str, Values] = {}

        def step(node: Node, a: Values) -> Iterable[tuple[str, Values]]:
            found[node.name] = a
            if node.name in self.linear:
                return [(name, a @ matrix.value) for matrix, name in self._parts(node)]
            lower, upper = lines[node.name]
            return [(node.inputs[0], a * np.where(a > 0, lower[0].value, upper[0].value))]

        return found | carried_back(self.network, {target: row}, step)

    def _on_lines(
        self,
        node: Node,
        z: Tracked,
        below: NDArray[np.bool_],
        lines: Mapping[str, Sides],
        ends: Mapping[str, NeuronBounds],
    ) -> Tracked:
        """The chosen line of each neuron at z."""
        (slope0, intercept0), (slope1, intercept1) = lines[node.name]
        slope, intercept = self.chosen(below, slope0, slope1), self.chosen(below, intercept0, intercept1)
        value = slope.value * z.value + intercept.value
        ratio = np.empty(len(value), dtype=object)
        for i in range(len(value)):
            ratio[i] = self.on_line(self.kinked[node.name], z, slope, intercept, ends[node.name], i)
        return Tracked(value, ratio)
