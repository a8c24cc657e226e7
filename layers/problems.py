"""A batch of triangle LPs of one network, one row each, and the sweeps every solver is made of.

Problem r: minimise rows[r] . value(target) over the input box and all hidden values, subject to the hull of every
activation. Dual point: weights alpha, beta in [0, 1] that mix the two hull lines below and above; the backward sweep
with coefficients A > 0 on the mixed lower line and A < 0 on the mixed upper line is a lower bound for every choice
(Wong and Kolter 2018; Salman et al. 2019). Primal point: an input x and, for every activation, the fraction tau of
the way from the hull's floor to its ceiling; the forward sweep through them is feasible for every x in the box and
tau in [0, 1], provided the pre-activation bounds are implied by the LP on the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from optrelax.activations import Activation
from optrelax.domains import backsubstitution, interval
from optrelax.enclosures import Bounds
from optrelax.graph import Network
from optrelax.lines import Lines, crown_lines, outward_lines
from optrelax.ops import Affine
from optrelax.regions import InputBox
from optrelax.rounding import Rounding

Weights = dict[str, Tensor]  # activation node -> [R, *shape]


@dataclass(frozen=True, slots=True)
class HullLines:
    """Two lines below and two above every neuron, [R or examples, *shape]; `above1` is None where there is one."""

    below0: tuple[Tensor, Tensor]
    below1: tuple[Tensor, Tensor]
    above0: tuple[Tensor, Tensor]
    above1: tuple[Tensor, Tensor] | None
    before: tuple[Tensor, Tensor]
    """The pre-activation bounds that the hull was taken at."""
    free: Tensor
    """Where the neuron crosses, so that its weights matter."""

    def map(self, change: Callable[[Tensor], Tensor]) -> HullLines:
        """The same lines with `change` applied to every tensor of numbers; `free` follows where shapes change."""

        def both(line: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return change(line[0]), change(line[1])

        above1 = None if self.above1 is None else both(self.above1)
        return HullLines(both(self.below0), both(self.below1), both(self.above0), above1, both(self.before), self.free)

    def select(self, index: Tensor) -> HullLines:
        """The lines of some of the problems."""
        return replace(self.map(lambda t: t[index]), free=self.free[index])


def hull_lines(activation: Activation, before: Bounds) -> HullLines:
    """The hull of one activation at its pre-activation bounds; differentiable in them."""
    hull = activation.hull(before.lower, before.upper)
    two = len(activation.kinks) == 2 or activation.slopes[0] > activation.slopes[1]
    free = activation.crossing(before.lower.detach(), before.upper.detach())
    return HullLines(
        hull.below[0], hull.below[1], hull.above[0], hull.above[1] if two else None, (before.lower, before.upper), free
    )


def mix(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The line between two: weight 0 the first, 1 the second."""
    if second is None or weight is None:
        return first
    return torch.lerp(first[0], second[0], weight), torch.lerp(first[1], second[1], weight)


@dataclass(frozen=True)
class Problems:
    """R linear programs of one network that share nothing but its weights."""

    network: Network
    target: str
    rows: Tensor
    """Objective on the target's value, [R, *target shape]."""
    lower: Tensor
    upper: Tensor
    """Input box, [R, *input shape]."""
    hulls: Mapping[str, HullLines]

    @property
    def count(self) -> int:
        """R."""
        return self.rows.shape[0]

    @cached_property
    def wanted(self) -> frozenset[str]:
        """Nodes that the target depends on."""
        return self.network.ancestors(self.target)

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Nodes that some activation behind the target depends on, the activations included."""
        found: set[str] = set()
        for node in self.network.activations:
            if node.name in self.wanted:
                found |= self.network.ancestors(node.name)
        return frozenset(found)

    def select(self, index: Tensor) -> Problems:
        """Some of the problems."""
        return replace(
            self,
            rows=self.rows[index],
            lower=self.lower[index],
            upper=self.upper[index],
            hulls={name: h.select(index) for name, h in self.hulls.items()},
        )

    def to(self, dtype: torch.dtype) -> Problems:
        """The same problems in another floating type."""
        if self.rows.dtype == dtype:
            return self

        return self._map(lambda t: t.to(dtype))

    def detach(self) -> Problems:
        """The same problems as constants."""
        return self._map(lambda t: t.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Problems:
        return replace(
            self,
            rows=change(self.rows),
            lower=change(self.lower),
            upper=change(self.upper),
            hulls={name: h.map(change) for name, h in self.hulls.items()},
        )


@dataclass(frozen=True, slots=True)
class DualPoint:
    """Mixing weights of every activation: alpha below, beta above (only where the hull has two lines above)."""

    alpha: Weights
    beta: Weights

    def select(self, index: Tensor) -> DualPoint:
        """The weights of some of the problems."""
        return DualPoint({n: a[index] for n, a in self.alpha.items()}, {n: b[index] for n, b in self.beta.items()})

    def to(self, dtype: torch.dtype) -> DualPoint:
        """The same weights in another floating type."""
        return DualPoint(
            {n: a.to(dtype) for n, a in self.alpha.items()}, {n: b.to(dtype) for n, b in self.beta.items()}
        )


@dataclass(frozen=True, slots=True)
class PrimalPoint:
    """An input of the box [R, *input shape] and the fraction tau [R, *shape] of every activation."""

    x: Tensor
    tau: Weights

    def select(self, index: Tensor) -> PrimalPoint:
        """The points of some of the problems."""
        return PrimalPoint(self.x[index], {n: t[index] for n, t in self.tau.items()})

    def to(self, dtype: torch.dtype) -> PrimalPoint:
        """The same points in another floating type."""
        return PrimalPoint(self.x.to(dtype), {n: t.to(dtype) for n, t in self.tau.items()})


@dataclass(frozen=True, slots=True)
class Backward:
    """Result of a backward sweep: the bound and the coefficients it met."""

    value: Tensor
    """Lower bound of each problem, [R]."""
    coefficients: Weights
    """A at the value of each activation, [R, *shape]."""
    input: Tensor
    """Coefficients of the input (its reduced costs), [R, *input shape]."""


def backward_sweep(problems: Problems, dual: DualPoint) -> Backward:
    """One pass from the target to the input: the dual value at these weights.

    Sound: yes, at every weight in [0, 1], to rounding.
    """
    network = problems.network
    pending = {problems.target: problems.rows}
    constant = problems.rows.new_zeros(problems.count)
    met: Weights = {}
    for node in reversed(network.nodes):
        if node.name not in pending:
            continue
        a = pending.pop(node.name)
        if isinstance(node.op, Affine):
            b = node.op.bias(a)
            if b is not None:
                constant = constant + _dot(a, b.expand(node.shape))
            for name, pulled in zip(node.inputs, node.op.transpose(a), strict=True):
                pending[name] = pending[name] + pulled if name in pending else pulled
            continue
        met[node.name] = a
        h = problems.hulls[node.name]
        below = mix(h.below0, h.below1, dual.alpha[node.name])
        above = mix(h.above0, h.above1, dual.beta.get(node.name))
        positive = a > 0
        constant = constant + _dot(a, torch.where(positive, below[1], above[1]))
        pulled = a * torch.where(positive, below[0], above[0])
        name = node.inputs[0]
        pending[name] = pending[name] + pulled if name in pending else pulled
    a = pending.get(network.input)
    if a is None:
        a = torch.zeros_like(problems.lower)
    corner = torch.where(a > 0, problems.lower, problems.upper)
    return Backward(constant + _dot(a, corner), met, a)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all but the first dimension: [R, *shape] and [R or none, *shape] -> [R]."""
    flat = a.reshape(a.shape[0], -1)
    if b.dim() == a.dim() - 1:
        return flat @ b.reshape(-1)
    return torch.linalg.vecdot(flat, b.reshape(b.shape[0], -1))


@dataclass(frozen=True, slots=True)
class Ascent:
    """The minimiser of the Lagrangian at a dual point, and the gradient of the dual value there."""

    x: Tensor
    alpha: Weights
    beta: Weights


def forward_sweep(problems: Problems, dual: DualPoint, back: Backward) -> Ascent:
    """One pass from the minimising corner to the target: the (super)gradient of the dual value in the weights."""
    network = problems.network
    x = torch.where(back.input > 0, problems.lower, problems.upper)
    values = {network.input: x}
    alpha: Weights = {}
    beta: Weights = {}
    for node in network.nodes:
        if node.name not in problems.hidden:
            continue
        if isinstance(node.op, Affine):
            values[node.name] = node.op.apply(*(values[name] for name in node.inputs))
            continue
        a, z, h = back.coefficients[node.name], values[node.inputs[0]], problems.hulls[node.name]
        below = mix(h.below0, h.below1, dual.alpha[node.name])
        above = mix(h.above0, h.above1, dual.beta.get(node.name))
        # Stable neurons have both lines equal: their gradient is 0 without a mask.
        spread = torch.addcmul(h.below1[1] - h.below0[1], h.below1[0] - h.below0[0], z)
        alpha[node.name] = a.clamp_min(0) * spread
        if h.above1 is not None:
            spread = torch.addcmul(h.above1[1] - h.above0[1], h.above1[0] - h.above0[0], z)
            beta[node.name] = a.clamp_max(0) * spread
        positive = a > 0
        values[node.name] = torch.addcmul(
            torch.where(positive, below[1], above[1]), torch.where(positive, below[0], above[0]), z
        )
    return Ascent(x, alpha, beta)


@dataclass(frozen=True, slots=True)
class Feasible:
    """Result of a primal sweep: a feasible point and its objective."""

    objective: Tensor
    """[R]."""
    before: Weights
    """Pre-activation of each activation."""
    after: Weights
    """Value of each activation."""


def primal_sweep(problems: Problems, point: PrimalPoint) -> Feasible:
    """Push a primal point through the hulls: feasible to rounding, its objective an upper bound of the LP's value."""
    network = problems.network
    values = {network.input: point.x}
    before: Weights = {}
    after: Weights = {}
    for node in network.nodes:
        if node.name not in problems.wanted:
            continue
        if isinstance(node.op, Affine):
            values[node.name] = node.op.apply(*(values[name] for name in node.inputs))
            continue
        z, h = values[node.inputs[0]], problems.hulls[node.name]
        low, high = floor_and_ceiling(h, z)
        values[node.name] = torch.lerp(low, high, point.tau[node.name])
        before[node.name], after[node.name] = z, values[node.name]
    return Feasible(_dot(problems.rows, values[problems.target]), before, after)


def floor_and_ceiling(h: HullLines, z: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the hull at pre-activation z."""
    low = torch.maximum(torch.addcmul(h.below0[1], h.below0[0], z), torch.addcmul(h.below1[1], h.below1[0], z))
    high = torch.addcmul(h.above0[1], h.above0[0], z)
    if h.above1 is not None:
        high = torch.minimum(high, torch.addcmul(h.above1[1], h.above1[0], z))
    return low, high


def crown_start(network: Network, preactivation: Mapping[str, Bounds], hulls: Mapping[str, HullLines]) -> DualPoint:
    """The weights that make the dual value CROWN's bound: the line of smaller area, per example."""
    alpha: Weights = {}
    beta: Weights = {}
    for node in network.activations:
        if node.name not in hulls:
            continue
        assert isinstance(node.op, Activation)
        b, h = preactivation[node.name], hulls[node.name]
        chosen = crown_lines(node.op, b.lower, b.upper)
        alpha[node.name] = _weight_of(chosen.lower_slope, chosen.lower_intercept, h.below0, h.below1)
        if h.above1 is not None:
            beta[node.name] = _weight_of(chosen.upper_slope, chosen.upper_intercept, h.above0, h.above1)
    return DualPoint(alpha, beta)


def chord_start(network: Network, hulls: Mapping[str, HullLines], start: DualPoint) -> DualPoint:
    """The weights whose lower slope is the chord's (Fast-Lin); upper weights as in `start`."""
    alpha: Weights = {}
    for name, h in hulls.items():
        spread = h.below1[0] - h.below0[0]
        wide = spread != 0
        weight = (h.above0[0] - h.below0[0]) / torch.where(wide, spread, 1.0)
        alpha[name] = torch.where(wide, weight, 0.0).clamp(0, 1)
    return DualPoint(alpha, start.beta)


def _weight_of(slope: Tensor, intercept: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    return ((slope == second[0]) & (intercept == second[1])).to(slope)


def lines_at(h: HullLines, alpha: Tensor, beta: Tensor | None) -> Lines:
    """The mixed lines, as back-substitution takes them."""
    return Lines(*mix(h.below0, h.below1, alpha), *mix(h.above0, h.above1, beta))


def dual_value(
    problems: Problems, dual: DualPoint, rounding: Rounding, preactivation: Mapping[str, Bounds] | None = None
) -> Tensor:
    """The bound that is reported for a dual point: [R].

    Sound: to nearest, up to rounding; outward, in real arithmetic, given outward pre-activation bounds [R, *shape].
    """
    if rounding == "nearest":
        return backward_sweep(problems, dual).value
    assert preactivation is not None
    region = InputBox(problems.lower, problems.upper)
    lines: dict[str, Lines | Bounds] = {}
    for name, h in problems.hulls.items():
        op = problems.network[name].op
        assert isinstance(op, Activation)
        mixed = lines_at(h, dual.alpha[name], dual.beta.get(name))
        b = preactivation[name]
        lines[name] = outward_lines(mixed, op, b.lower, b.upper)
    balls = interval.propagate(problems.network, region, rounding="outward").balls
    magnitude = backsubstitution.magnitudes(problems.network, balls)
    value = backsubstitution.substitute(
        problems.network, problems.target, problems.rows[:, None], region, lines, magnitude=magnitude
    )
    return value[:, 0]
