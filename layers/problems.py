"""A batch of triangle LPs of one network, one row each, and the sweeps every solver is made of.

Problem r: minimise rows[r] . value(target) over the input region and all hidden values, subject to the hull of every
activation. Dual point: weights alpha, beta in [0, 1] that mix the two hull lines below and above; the backward sweep
with coefficients A > 0 on the mixed lower line and A < 0 on the mixed upper line is a lower bound for every choice
(Wong and Kolter 2018; Salman et al. 2019). Primal point: an input x and, for every activation, the fraction tau of
the way from the hull's floor to its ceiling; the forward sweep through them is feasible for every x in the region and
tau in [0, 1], provided the pre-activation bounds are implied by the LP on the layers before. Bounds that the LP does
not imply are constraints of their own: they get multipliers in the dual point (`ends`), and a primal point counts
only where it keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from optrelax.domains import backsubstitution, interval
from optrelax.domains.lines import Lines, crown_lines, outward_lines
from optrelax.domains.rules import find_rule
from optrelax.enclosures import Bounds
from optrelax.layers.batched import Batched, Change
from optrelax.networks.activations import Activation, Hull, Line
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import Affine, flatten_from
from optrelax.networks.walks import carried_back, carried_on
from optrelax.regions import InputBox, Region
from optrelax.rounding import Rounding

Weights = dict[str, Tensor]  # activation node -> [R, *shape]


@dataclass(frozen=True, slots=True)
class HullLines(Batched):
    """Two lines below and two above every neuron, [R or examples, *shape]; `above1` is None where there is one."""

    below0: tuple[Tensor, Tensor]
    below1: tuple[Tensor, Tensor]
    above0: tuple[Tensor, Tensor]
    above1: tuple[Tensor, Tensor] | None
    before: tuple[Tensor, Tensor]
    """The pre-activation bounds that the hull was taken at."""
    free: Tensor
    """Where the neuron crosses, so that its weights matter."""
    origin: bool = False
    """Whether both lines below pass through the origin, as a ReLU's do: their intercepts need no work."""


def hull_lines(activation: Activation, before: Bounds) -> HullLines:
    """The hull of one activation at its pre-activation bounds; differentiable in them.

    Of bounds that are no numbers, so that nothing is known, the lines are none either: whatever is made of them is NaN.
    """
    hull = activation.hull(before.lower, before.upper)
    unknown = before.lower.detach().isnan() | before.upper.detach().isnan()
    if bool(unknown.any()):
        hull = Hull(*(tuple(_unknown_at(unknown, line) for line in side) for side in (hull.below, hull.above)))  # type: ignore[arg-type]
    free = activation.crossing(before.lower.detach(), before.upper.detach())
    above1 = None if activation.chord_above else hull.above[1]
    ends = (before.lower, before.upper)
    return HullLines(hull.below[0], hull.below[1], hull.above[0], above1, ends, free, activation.origin_below)


def _unknown_at(unknown: Tensor, line: Line) -> Line:
    slope, intercept = (torch.where(unknown, torch.nan, t) for t in line)
    return slope, intercept


def mix(first: Line, second: Line | None, weight: Tensor | None, origin: bool = False) -> Line:
    """The line between two: weight 0 the first, 1 the second; origin: both pass through it."""
    if second is None or weight is None:
        return first
    slope = torch.lerp(first[0], second[0], weight)
    return slope, first[1] if origin else torch.lerp(first[1], second[1], weight)


@dataclass(frozen=True)
class Problems(Batched):
    """R linear programs of one network that share nothing but its weights."""

    network: Network
    target: str
    rows: Tensor
    """Objective on the target's value, [R, *target shape]."""
    region: Region
    """Of every problem's inputs, [R, *input shape]."""
    hulls: Mapping[str, HullLines]
    example: Tensor | None = None
    """Which problems share box and hulls, [R]; None: nobody says."""

    @property
    def count(self) -> int:
        """R."""
        return self.rows.shape[0]

    @property
    def boxed(self) -> bool:
        """Whether the region is a box, which is what compiled ascents take."""
        return isinstance(self.region, InputBox)

    @cached_property
    def box(self) -> InputBox:
        """The box around the region."""
        return self.region.box()

    @cached_property
    def center(self) -> Tensor:
        """Midpoint of the box."""
        return self.box.center

    @cached_property
    def radius(self) -> Tensor:
        """Half width of the box."""
        return self.box.radius

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


@dataclass(frozen=True, slots=True)
class DualPoint(Batched):
    """Mixing weights of every activation: alpha below, beta above (only where the hull has two lines above)."""

    alpha: Weights
    beta: Weights
    ends: Weights = field(default_factory=dict)
    """Signed multipliers of the pre-activation bounds: positive of z <= u, negative of z >= l; missing: 0."""

    def combine(self, change: Change, *others: DualPoint) -> DualPoint:
        """As `Batched.combine`; multipliers that some of the points lack are 0 there."""
        names = {name for point in (self, *others) for name in point.ends}
        mine, *theirs = (point._with_ends(names) for point in (self, *others))
        return Batched.combine(mine, change, *theirs)

    def _with_ends(self, names: Set[str]) -> DualPoint:
        if names == self.ends.keys():
            return self
        return replace(self, ends={n: self.ends.get(n, torch.zeros_like(self.alpha[n])) for n in sorted(names)})


@dataclass(frozen=True, slots=True)
class PrimalPoint(Batched):
    """An input of the region [R, *input shape] and the fraction tau [R, *shape] of every activation."""

    x: Tensor
    tau: Weights


@dataclass(frozen=True, slots=True)
class Backward(Batched):
    """Result of a backward sweep: the bound and the coefficients it met."""

    value: Tensor
    """Lower bound of each problem, [R]."""
    coefficients: Weights
    """A at the value of each activation, [R, *shape]."""
    on_lower: Weights
    """1 where the coefficient took the lower line, 0 where it took the upper one."""
    input: Tensor
    """Coefficients of the input (its reduced costs), [R, *input shape]."""
    corner: Tensor
    """The point of the region that they choose, to rounding, [R, *input shape]: of a box a corner."""


def backward_sweep(problems: Problems, dual: DualPoint) -> Backward:
    """One pass from the target to the input: the dual value at these weights.

    Sound: yes, at every weight in [0, 1], to rounding.
    Choices are arithmetic on signs: torch.where takes some ten times as long on a CPU.
    """
    network = problems.network
    constant = problems.rows.new_zeros(problems.count)
    met: Weights = {}
    on_lower: Weights = {}

    def step(node: Node, a: Tensor) -> Iterable[tuple[str, Tensor]]:
        nonlocal constant
        if isinstance(node.op, Affine):
            b = node.op.bias(a)
            if b is not None:
                constant = constant + _dot(a, b.expand(node.shape))
            return zip(node.inputs, node.op.transpose(a), strict=True)
        h = problems.hulls[node.name]
        below = mix(h.below0, h.below1, dual.alpha[node.name], h.origin)
        above = mix(h.above0, h.above1, dual.beta.get(node.name))
        # relu, not clamp: its gradient is 0 at 0, so that a coefficient of 0 counts for the upper line alone.
        up = a.relu()
        down = a - up
        met[node.name], on_lower[node.name] = a, up.detach().sign()
        pulled = torch.addcmul(up * below[0], down, above[0])
        constant = constant + _dot(down, above[1])
        if not h.origin:
            constant = constant + _dot(up, below[1])
        if node.name in dual.ends:
            ends = dual.ends[node.name]
            # max(ends, 0) (z - u) + max(-ends, 0) (l - z) <= 0 for every admitted z.
            pulled = pulled + ends
            constant = constant - _dot(ends, torch.where(ends > 0, h.before[1], h.before[0]))
        return ((node.inputs[0], pulled),)

    pending = carried_back(network, {problems.target: problems.rows}, step)
    zero = problems.region.like.new_zeros(()).expand(problems.region.shape)
    a = pending.get(network.input, zero)
    if problems.boxed:
        corner = problems.center - torch.copysign(problems.radius, a)
        return Backward(constant + _dot(a, corner), met, on_lower, a, corner)
    least, corner = problems.region.attained(a[:, None])
    return Backward(constant + least[:, 0], met, on_lower, a, corner[:, 0])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all but the first dimension: [R, *shape] and [R or none, *shape] -> [R]."""
    flat = flatten_from(a, 1)
    if b.dim() == a.dim() - 1:
        return flat @ b.reshape(-1)
    return torch.linalg.vecdot(flat, flatten_from(b, 1))


@dataclass(frozen=True, slots=True)
class Ascent:
    """The (super)gradient of the dual value in the mixing weights."""

    alpha: Weights
    beta: Weights


def forward_sweep(problems: Problems, dual: DualPoint, back: Backward) -> Ascent:
    """One pass from the minimising corner through the lines that the coefficients took."""
    alpha: Weights = {}
    beta: Weights = {}

    def activate(node: Node, z: Tensor) -> Tensor:
        a, h = back.coefficients[node.name], problems.hulls[node.name]
        below = mix(h.below0, h.below1, dual.alpha[node.name], h.origin)
        above = mix(h.above0, h.above1, dual.beta.get(node.name))
        # Stable neurons have both lines equal: their gradient is 0 without a mask.
        alpha[node.name] = a.clamp_min(0) * _spread(h.below0, h.below1, z, h.origin)
        if h.above1 is not None:
            beta[node.name] = a.clamp_max(0) * _spread(h.above0, h.above1, z)
        low = below[0] * z if h.origin else torch.addcmul(below[1], below[0], z)
        return torch.lerp(torch.addcmul(above[1], above[0], z), low, back.on_lower[node.name])

    carried_on(problems.network, back.corner, problems.hidden, activate)
    return Ascent(alpha, beta)


def _spread(first: Line, second: Line, z: Tensor, origin: bool = False) -> Tensor:
    """Second line minus first at z."""
    slope = second[0] - first[0]
    return slope * z if origin else torch.addcmul(second[1] - first[1], slope, z)


@dataclass(frozen=True, slots=True)
class Feasible(Batched):
    """Result of a primal sweep: a feasible point and its objective."""

    objective: Tensor
    """[R]."""
    before: Weights
    """Pre-activation of each activation."""
    after: Weights
    """Value of each activation."""


def primal_sweep(problems: Problems, point: PrimalPoint) -> Feasible:
    """Push a primal point through the hulls: feasible to rounding, its objective an upper bound of the LP's value."""
    before: Weights = {}
    after: Weights = {}

    def activate(node: Node, z: Tensor) -> Tensor:
        low, high = floor_and_ceiling(problems.hulls[node.name], z)
        before[node.name], after[node.name] = z, torch.lerp(low, high, point.tau[node.name])
        return after[node.name]

    values = carried_on(problems.network, point.x, problems.wanted, activate)
    return Feasible(_dot(problems.rows, values[problems.target]), before, after)


def nearest_point(problems: Problems, x: Tensor, after: Mapping[str, Tensor]) -> PrimalPoint:
    """A point that keeps box and hulls, near inputs x and values `after` of the activations.

    Each fraction is read off where the neuron really stands once the layers before have been pushed through.
    """
    x = problems.region.into_hull(x)
    tau: Weights = {}

    def activate(node: Node, z: Tensor) -> Tensor:
        h = problems.hulls[node.name]
        low, high = floor_and_ceiling(h, z)
        room = high - low
        fraction = (after[node.name] - low) / torch.where(room > 0, room, 1.0)
        tau[node.name] = torch.where(h.free & (room > 0), fraction.clamp(0, 1), 0.0)
        return torch.lerp(low, high, tau[node.name])

    carried_on(problems.network, x, problems.hidden, activate)
    return PrimalPoint(x, tau)


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
    network, region = problems.network, problems.region
    lines: dict[str, backsubstitution.Enclosure] = {}
    for name, h in problems.hulls.items():
        op = network[name].op
        assert isinstance(op, Activation)
        mixed = lines_at(h, dual.alpha[name], dual.beta.get(name))
        b = preactivation[name]
        lines[name] = outward_lines(mixed, op, b.lower, b.upper)
    balls = interval.propagate(network, region, rounding="outward").balls
    magnitude = backsubstitution.magnitudes(network, balls)
    rows = problems.rows[:, None]
    if not dual.ends:
        return backsubstitution.substitute(network, problems.target, rows, region, lines, magnitude=magnitude)[:, 0]
    walk = backsubstitution.Rows(network, lines, magnitude, rows.new_zeros(problems.count, 1))
    walk.pending[problems.target] = rows
    for node in reversed(network.nodes):
        if node.name not in walk.pending:
            continue
        step = find_rule(node.op, backsubstitution.Rows)
        assert step is not None
        step(node.op, node, walk.pending.pop(node.name), walk)
        if node.name in dual.ends:
            ends, b = dual.ends[node.name][:, None], preactivation[node.name]
            end = torch.where(ends[:, 0] > 0, b.upper, b.lower)
            walk.add_constant(
                -backsubstitution.dot(ends, end), backsubstitution.dot(ends.abs(), end.abs()), end[0].numel()
            )
            walk.add(node.inputs[0], ends)
    return backsubstitution.concretise(walk, region)[:, 0]
