"""Degrees of a bound as a rational function of a step along a line in weight space, op by op.

The paper's algebraic view of sensitivity (arXiv 2102.06700, section 4.3): Box and hBox give polynomials of as many
degrees as there are affine layers, relaxations by chords ratios whose degrees grow with every crossing neuron.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optrelax.analysis import Net, prepare, prepare_rows
from optrelax.domains.zonotope import frontier
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.measurements.rationals import Ratio
from optrelax.measurements.tracked import Arithmetic, Tracked, Values
from optrelax.measurements.weight_lines import MovingWeights, Weights, moving, random_direction
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import Affine
from optrelax.networks.walks import carried_back
from optrelax.regions import InputBox, Region, require_box
from optrelax.relaxations import Box, Crown, DeepZ, FastLin, HBox, Relaxation, name_of, resolve
from optrelax.relaxations.zonotopes import Bands

__all__ = ["LARGEST", "step_degrees"]

LARGEST = 64
"""Most hidden neurons of a network whose degrees are propagated: every coefficient is tracked by itself."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """An affine op as matrices [out, in], one an input, and a bias [out], entries tracked."""

    matrices: tuple[Tracked, ...]
    bias: Tracked


_Sides = tuple[tuple[Tracked, Tracked], tuple[Tracked, Tracked]]
"""Slope and intercept of the line below and of the line above."""


@dataclass(frozen=True, slots=True)
class NeuronBounds:
    """Pre-activation bounds of one node, [n] each."""

    l: Tracked
    u: Tracked


def step_degrees(
    net: Net, region: Region, spec: Tensor, relaxation: Relaxation | str, *, seed: int = 0
) -> list[tuple[int, int]]:
    """Degrees of numerator and denominator of each row's lower bound in t, where the weights are w + t d.

    Between switches a bound is a ratio of two polynomials in t; its degrees hold for almost every direction d in which
    all parameters move, on the piece that the weights as they are lie on. Where terms cancel beyond what is tracked (a
    chord met at its end, one denominator of both ends) they are upper bounds.

    Args:
        net: of at most LARGEST hidden neurons.
        region: one example.
        spec: [k, outputs] or [1, k, outputs].
        relaxation: one whose bounds are rational in the weights.
        seed: of the direction that tells moving entries.

    Returns:
        A pair a row; (n, 0) is a polynomial of degree n.

    Raises:
        ValueError: for a relaxation whose bounds are not rational (soft, LPs) or unknown, for more than one example or
            a larger network.
        UnsupportedOpError: for ops besides affine ones and activations of one kink.

    Example:
        >>> net, region = ox.models.fc(2, 4, 2, seed=0), ox.LinfBall(torch.zeros(1, 2), eps=0.1)
        >>> ox.step_degrees(net, region, torch.eye(2), "box")  # two affine layers
        [(2, 0), (2, 0)]
    """
    resolved = resolve(relaxation)
    network, flat, batch = prepare(net, region)
    if flat.shape[0] != 1:
        raise ValueError(f"step_degrees: wants one example, got {flat.shape[0]}")
    _require_small(network)
    rows = prepare_rows(network, spec, flat, batch)
    with moving(network) as weights, torch.no_grad():
        way = random_direction(weights.origin, torch.Generator().manual_seed(seed), "step_degrees")
        walk = _Walk(
            network=network,
            region=require_box("step_degrees", flat, "measure_sensitivity takes any ball").to(torch.float64),
            linear=_linear(network, weights, way),
        )
        found = walk.rows(resolved, rows[0].flatten(1).double().cpu().numpy())
    return [walk.factors.pair(ratio) for ratio in found.ratio]


def _require_small(network: Network) -> None:
    problems = []
    for node in network:
        if not isinstance(node.op, Affine) and not (isinstance(node.op, PiecewiseLinear) and len(node.op.kinks) == 1):
            problems.append(Problem(node.path, type(node.op).__name__, "has no rule for degrees"))
    if problems:
        raise UnsupportedOpError(problems, "affine ops and activations of one kink")
    hidden = sum(math.prod(node.shape) for node in network.activations)
    if hidden > LARGEST:
        raise ValueError(f"step_degrees: takes networks of at most {LARGEST} hidden neurons, got {hidden}")


def _linear(network: Network, weights: MovingWeights, way: Weights) -> dict[str, _Linear]:
    """Every affine op as matrices, and which of their entries move; ValueError where one is not affine in the step."""
    at = []
    for t in (0.0, 0.5, 1.0):
        weights.move(way, t)
        at.append({node.name: _dense(node.op) for node in network if isinstance(node.op, Affine)})
    weights.move(way, 0.0)
    found = {}
    for name in at[0]:
        parts = []
        for start, middle, end in zip(*(step[name] for step in at), strict=True):
            if not np.allclose(middle - start, (end - start) / 2, rtol=1e-9, atol=1e-12):
                raise ValueError(f"step_degrees: {network[name].path} is not affine in its parameters")
            ratio = np.full(start.shape, None, dtype=object)
            ratio[(start != 0) | (end != 0)] = Ratio(0)
            ratio[start != end] = Ratio(1)
            parts.append(Tracked(start, ratio))
        found[name] = _Linear(tuple(parts[:-1]), parts[-1])
    return found


def _dense(op: Affine) -> list[Values]:
    """Matrices [out, in] of each input, then the bias [out]."""
    n = math.prod(op.shape)
    eye = torch.eye(n, dtype=torch.float64).reshape(n, *op.shape)
    parts = [part.reshape(n, -1).numpy().copy() for part in op.transpose(eye)]
    b = op.bias(eye)
    bias = np.zeros(n) if b is None else b.expand(op.shape).reshape(-1).numpy().copy()
    return [*parts, bias]


@dataclass(slots=True, kw_only=True)
class _Walk(Arithmetic):
    """One example's walk through the graph."""

    network: Network
    region: InputBox
    linear: Mapping[str, _Linear]

    def rows(self, relaxation: Any, rows: Values) -> Tracked:
        """Lower bounds of rows [k, outputs] of the output: [k]."""
        if type(relaxation) is Box:
            return self._folded(rows, {name: (None, *ends) for name, ends in self._intervals(relaxation)[1].items()})
        if type(relaxation) is HBox:
            return self._folded(rows, self._hybrid(relaxation)[1])
        if type(relaxation) is DeepZ:
            relaxation = Bands(lines_of=relaxation)
        if isinstance(relaxation, (Crown, FastLin, Bands)):
            lines, ends = self._lines(relaxation)
            return self._substituted(self.network.output, rows, lines, ends)
        raise ValueError(f"step_degrees: has no rule for {name_of(relaxation)}")

    def _input(self) -> tuple[Tracked, Tracked]:
        low, high = (t[0].flatten().cpu().numpy() for t in (self.region.lower, self.region.upper))
        return self.constant(low), self.constant(high)

    def _parts(self, node: Node) -> list[tuple[Tracked, str]]:
        return list(zip(self.linear[node.name].matrices, node.inputs, strict=True))

    def _intervals(self, relaxation: Box) -> tuple[dict[str, NeuronBounds], dict[str, tuple[Tracked, Tracked]]]:
        """Pre-activation bounds, and both ends of every node's value."""
        found = {self.network.input: self._input()}
        before: dict[str, NeuronBounds] = {}
        for node in self.network:
            if isinstance(node.op, Affine):
                bias, parts = self.linear[node.name].bias, self._parts(node)
                low = self.plus(bias, *(self.least(m, *found[i]) for m, i in parts))
                high = self.minus(
                    self.plus(self.minus(bias), *(self.least(self.minus(m), *found[i]) for m, i in parts))
                )
                found[node.name] = (low, high)
            else:
                l, u = self._loosened(relaxation, *found[node.inputs[0]])
                before[node.name] = NeuronBounds(l, u)
                found[node.name] = (self._image(node.op, l), self._image(node.op, u))
        return before, found

    def _loosened(self, relaxation: Box, l: Tracked, u: Tracked) -> tuple[Tracked, Tracked]:
        """Ends moved outward by a constant, or by what the grid leaves: affine in the end between grid lines."""
        if relaxation.omega == 0:
            return l, u
        low, high = relaxation._loosen(torch.from_numpy(l.value), torch.from_numpy(u.value))
        one = self.constant(np.ones_like(l.value))
        return Tracked(low.numpy(), self.plus(l, one).ratio), Tracked(high.numpy(), self.plus(u, one).ratio)

    def _image(self, op: Any, end: Tracked) -> Tracked:
        """A monotone activation's value at an end."""
        if not op.monotone:
            raise ValueError(f"step_degrees: has no rule for {op.name} under box")
        slope, intercept = (t.numpy() for t in op.piece(torch.from_numpy(end.value)))
        return self.plus(self.scaled(self.constant(slope), end), self.constant(intercept))

    def _hybrid(
        self, relaxation: HBox
    ) -> tuple[dict[str, NeuronBounds], dict[str, tuple[Tracked | None, Tracked, Tracked]]]:
        """Pre-activation bounds; of every node's value the input's coefficients [n, pixels] and an interval's ends."""
        pixels = len(self.region.lower.flatten())
        zero = self.constant(np.zeros(pixels))
        state = {self.network.input: (self.constant(np.eye(pixels)), zero, zero)}
        before: dict[str, NeuronBounds] = {}
        for node in self.network:
            if isinstance(node.op, Affine):
                bias, parts = self.linear[node.name].bias, [(m, state[i]) for m, i in self._parts(node)]
                low = self.plus(bias, *(self.least(m, b, h) for m, (_, b, h) in parts))
                high = self.minus(
                    self.plus(self.minus(bias), *(self.least(self.minus(m), b, h) for m, (_, b, h) in parts))
                )
                state[node.name] = (self.plus(*(self.matmul(m, a) for m, (a, _, _) in parts)), low, high)
            else:
                a, low, high = state[node.inputs[0]]
                ends = NeuronBounds(
                    self.plus(self.least(a, *self._input()), low),
                    self.minus(self.plus(self.least(self.minus(a), *self._input()), self.minus(high))),
                )
                before[node.name] = ends
                (slope, below), (_, above) = self._sides(relaxation, node.op, ends)
                column = Tracked(slope.value[:, None], slope.ratio[:, None])
                moved = (self.plus(self.scaled(slope, low), below), self.plus(self.scaled(slope, high), above))
                state[node.name] = (self.scaled(column, a), *moved)
        return before, dict(state)

    def _folded(self, rows: Values, state: Mapping[str, tuple[Tracked | None, Tracked, Tracked]]) -> Tracked:
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

    def _lines(self, relaxation: Any) -> tuple[dict[str, _Sides], dict[str, NeuronBounds]]:
        """Both lines, and the pre-activation bounds, of every activation."""
        given = None if relaxation.preactivation is None else self._preactivation(relaxation.preactivation)
        intervals = self._intervals(Box())[0]
        lines: dict[str, _Sides] = {}
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
            lines[node.name] = self._sides(relaxation, node.op, ends[node.name])
        return lines, ends

    def _preactivation(self, relaxation: Any) -> dict[str, NeuronBounds]:
        if type(relaxation) is Box:
            return self._intervals(relaxation)[0]
        if type(relaxation) is HBox:
            return self._hybrid(relaxation)[0]
        raise ValueError(f"step_degrees: has no rule for pre-activation bounds by {name_of(relaxation)}")

    def _sides(self, relaxation: Any, op: Any, before: NeuronBounds) -> _Sides:
        """Degrees of the relaxation's own lines, read off their numbers: constant slopes, or parts of the chord's."""
        l, u = (torch.from_numpy(end.value) for end in (before.l, before.u))
        lines = relaxation.lines(op, l, u)
        sides = []
        chords: dict[int, Ratio] = {}  # one factor a neuron: both of its lines share it
        for slope, intercept in (
            (lines.lower_slope, lines.lower_intercept),
            (lines.upper_slope, lines.upper_intercept),
        ):
            slopes = np.empty(len(l), dtype=object)
            intercepts = np.empty(len(l), dtype=object)
            for i in range(len(l)):
                ends = before.l.ratio[i], before.u.ratio[i]
                slopes[i] = self._slope(relaxation, op, float(slope[i]), float(l[i]), float(u[i]), ends, chords, i)
                intercepts[i] = self._intercept(op, float(slope[i]), slopes[i], float(intercept[i]), l[i], u[i], ends)
            sides.append((Tracked(slope.numpy(), slopes), Tracked(intercept.numpy(), intercepts)))
        return sides[0], sides[1]

    def _slope(
        self,
        relaxation: Any,
        op: Any,
        slope: float,
        l: float,
        u: float,
        ends: tuple[Ratio | None, Ratio | None],
        chords: dict[int, Ratio],
        place: int,
    ) -> Ratio | None:
        if slope == 0:
            return None
        if slope in op.slopes:
            return Ratio(0)
        chord = float(op.chord_slope(torch.tensor([l], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)))
        share = slope / chord
        kappas = {1.0, getattr(getattr(relaxation, "lines_of", relaxation), "kappa", 1.0)}
        if not any(math.isclose(share, kappa, rel_tol=1e-12) for kappa in kappas):
            raise ValueError(f"step_degrees: the lines of {name_of(relaxation)} are not rational in the bounds")
        if place not in chords:
            chords[place] = self.factors.share(ends[1] or Ratio(0), ends[0] or Ratio(0))
        return chords[place]

    def _intercept(
        self,
        op: Any,
        slope: float,
        ratio: Ratio | None,
        intercept: float,
        l: Tensor,
        u: Tensor,
        ends: tuple[Ratio | None, Ratio | None],
    ) -> Ratio | None:
        """f(v) - slope v at the end or kink v where the line touches."""
        if intercept == 0:
            return None
        points = [(torch.tensor(k, dtype=torch.float64), None if k == 0 else Ratio(0)) for k in op.kinks]
        points += [(l, ends[0]), (u, ends[1])]
        for v, degree in points:
            value = float(op(v))
            if not math.isclose(value - slope * float(v), intercept, rel_tol=1e-9, abs_tol=1e-12):
                continue
            image = float(op.piece(v[None] if v.dim() == 0 else v)[0]), float(op.piece(v[None])[1])
            constant = None if image[1] == 0 else Ratio(0)
            if ratio is not None and ratio.denominator:
                straight = degree if image[0] != 0 else None
                return self.factors.add([self.factors.multiply(ratio, degree), straight, constant])
            return self.factors.add([degree if image[0] != slope else None, constant])
        raise ValueError(f"step_degrees: a line of {op.name} touches it at no end or kink")

    def _substituted(
        self, target: str, rows: Values, lines: Mapping[str, _Sides], ends: Mapping[str, NeuronBounds]
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
        self, target: str, row: Values, lines: Mapping[str, _Sides], ends: Mapping[str, NeuronBounds]
    ) -> tuple[float, Ratio | None]:
        coefficients = self._coefficients(target, row, lines)
        low, high = self._input()
        at_input = coefficients.get(self.network.input, np.zeros_like(low.value))
        values = {self.network.input: self.chosen(at_input > 0, low, high)}
        wanted = self.network.ancestors(target)
        for node in self.network:
            if node.name not in wanted:
                continue
            if isinstance(node.op, Affine):
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

    def _coefficients(self, target: str, row: Values, lines: Mapping[str, _Sides]) -> dict[str, Values]:
        """The row's coefficient at the value of every node before the target, numbers only."""
        found: dict[str, Values] = {}

        def step(node: Node, a: Values) -> Iterable[tuple[str, Values]]:
            found[node.name] = a
            if isinstance(node.op, Affine):
                return [(name, a @ matrix.value) for matrix, name in self._parts(node)]
            lower, upper = lines[node.name]
            return [(node.inputs[0], a * np.where(a > 0, lower[0].value, upper[0].value))]

        return found | carried_back(self.network, {target: row}, step)

    def _on_lines(
        self,
        node: Node,
        z: Tracked,
        below: NDArray[np.bool_],
        lines: Mapping[str, _Sides],
        ends: Mapping[str, NeuronBounds],
    ) -> Tracked:
        """The chosen line of each neuron at z."""
        (slope0, intercept0), (slope1, intercept1) = lines[node.name]
        slope, intercept = self.chosen(below, slope0, slope1), self.chosen(below, intercept0, intercept1)
        value = slope.value * z.value + intercept.value
        ratio = np.empty(len(value), dtype=object)
        for i in range(len(value)):
            ratio[i] = self._on_line(node.op, z, slope, intercept, ends[node.name], i)
        return Tracked(value, ratio)

    def _on_line(
        self, op: Any, z: Tracked, slope: Tracked, intercept: Tracked, ends: NeuronBounds, i: int
    ) -> Ratio | None:
        touched = []
        for end in (ends.l, ends.u):
            at = float(end.value[i])
            if _close(slope.value[i] * at + intercept.value[i], float(op(torch.tensor(at, dtype=torch.float64)))):
                image = self._image(op, Tracked(end.value[i : i + 1], end.ratio[i : i + 1])).ratio[0]
                touched.append((at, end.ratio[i], image))
        for at, _, image in touched:
            if _close(float(z.value[i]), at):
                # Equal numbers at generic weights are equal functions: the line meets the activation here.
                return image
        if touched and slope.ratio[i] is not None and slope.ratio[i].denominator:
            # f(v) + slope (z - v): the intercept by itself would hide what cancels.
            _, end_ratio, image = touched[0]
            run = self.factors.add([z.ratio[i], end_ratio])
            return self.factors.add([image, self.factors.multiply(slope.ratio[i], run)])
        return self.factors.add([self.factors.multiply(slope.ratio[i], z.ratio[i]), intercept.ratio[i]])


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-12)
