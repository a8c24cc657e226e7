"""A batch of triangle LPs of one network, one row each, and the sweeps every solver is made of.

Problem r: minimise rows[r] . value(target) over the input region and all hidden values, subject to the hull of every
activation. Dual point: weights alpha, beta in [0, 1] that mix the two hull lines below and above; the backward sweep
with coefficients A > 0 on the mixed lower line and A < 0 on the mixed upper line is a lower bound for every choice
(Wong and Kolter 2018; Salman et al. 2019). Primal point: an input x and, for every activation, the fraction tau of
the way from the hull's floor to its ceiling; the forward sweep through them is feasible for every x in the region and
tau in [0, 1], provided the pre-activation bounds are implied by the LP on the layers before. Bounds that the LP does
not imply are constraints of their own: they get multipliers in the dual point (`ends`), and a primal point counts
only where it keeps them. The hull of a product is McCormick's: two planes over its factors in place of two lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from optrelax.domains import backsubstitution, interval
from optrelax.domains.lines import Lines, crown_lines, outward_lines
from optrelax.domains.planes import Planes, outward_planes, product_planes
from optrelax.domains.rules import find_rule
from optrelax.enclosures import Bounds
from optrelax.layers.batched import Batched, Change
from optrelax.networks.activations import Activation, Hull, Line
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import Affine, flatten_from
from optrelax.networks.products import Multiply
from optrelax.networks.walks import carried_back, carried_on
from optrelax.regions import InputBox, Region
from optrelax.rounding import Rounding

Weights = dict[str, Tensor]  # activation or product -> [R, *shape]
Face = tuple[Tensor, ...]  # a slope for each value that is read, and the intercept: a line, or the plane of a product


@dataclass(frozen=True, slots=True)
class HullLines(Batched):
    """Two faces below and two above every neuron, [R or examples, *shape]; `above1` is None where there is one."""

    below0: Face
    below1: Face
    above0: Face
    above1: Face | None
    before: tuple[Tensor, ...]
    """The pre-activation bounds that the hull was taken at; of a product none: its operands have them."""
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


def product_hull(x: Bounds, y: Bounds) -> HullLines:
    """McCormick's planes of the product of two bounded values: of each side those of its shares 0 and 1.

    Exact: the convex hull of the product over the box.  Gradient: exact.  Source: McCormick 1976.
    """
    first, second = (product_planes(x, y, below=share, above=share) for share in (0.0, 1.0))
    free = (x.lower < x.upper).detach() & (y.lower < y.upper).detach()
    return HullLines(first.below, second.below, first.above, second.above, (), free)


def hulls_at(network: Network, bounds: Mapping[str, Bounds]) -> dict[str, HullLines]:
    """Hulls of the activations whose pre-activation bounds are given, and of the products of such."""
    hulls: dict[str, HullLines] = {}
    for node in network.relaxed:
        if not all(name in bounds for name in _bounded_by(node)):
            continue
        given = [bounds[name] for name in _bounded_by(node)]
        hulls[node.name] = hull_lines(node.op, *given) if isinstance(node.op, Activation) else product_hull(*given)
    return hulls


def _bounded_by(node: Node) -> tuple[str, ...]:
    """The activations whose pre-activation bounds a node's hull is taken at."""
    return (node.name,) if isinstance(node.op, Activation) else node.inputs


def mix(first: Face, second: Face | None, weight: Tensor | None, origin: bool = False) -> Face:
    """The face between two: weight 0 the first, 1 the second; origin: both pass through it."""
    if second is None or weight is None:
        return first
    *slopes, intercept = first
    mixed = [torch.lerp(slope, other, weight) for slope, other in zip(slopes, second, strict=False)]
    return (*mixed, intercept if origin else torch.lerp(intercept, second[-1], weight))


def height(face: Face, values: Sequence[Tensor], origin: bool = False) -> Tensor:
    """The face at values of what it reads."""
    total = face[0] * values[0] if origin else torch.addcmul(face[-1], face[0], values[0])
    for slope, z in zip(face[1:-1], values[1:], strict=True):
        total = torch.addcmul(total, slope, z)
    return total


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
        """Nodes that some activation or product behind the target depends on, these included."""
        found: set[str] = set()
        for node in self.network.relaxed:
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
        pulled = [torch.addcmul(up * low, down, high) for low, high in zip(below[:-1], above[:-1], strict=True)]
        constant = constant + _dot(down, above[-1])
        if not h.origin:
            constant = constant + _dot(up, below[-1])
        if node.name in dual.ends:
            ends = dual.ends[node.name]
            # max(ends, 0) (z - u) + max(-ends, 0) (l - z) <= 0 for every admitted z.
            pulled[0] = pulled[0] + ends
            constant = constant - _dot(ends, torch.where(ends > 0, h.before[1], h.before[0]))
        return zip(node.inputs, pulled, strict=True)

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

    def activate(node: Node, *inputs: Tensor) -> Tensor:
        a, h = back.coefficients[node.name], problems.hulls[node.name]
        below = mix(h.below0, h.below1, dual.alpha[node.name], h.origin)
        above = mix(h.above0, h.above1, dual.beta.get(node.name))
        # Stable neurons have both lines equal: their gradient is 0 without a mask.
        alpha[node.name] = a.clamp_min(0) * _spread(h.below0, h.below1, inputs, h.origin)
        if h.above1 is not None:
            beta[node.name] = a.clamp_max(0) * _spread(h.above0, h.above1, inputs)
        return torch.lerp(height(above, inputs), height(below, inputs, h.origin), back.on_lower[node.name])

    carried_on(problems.network, back.corner, problems.hidden, activate)
    return Ascent(alpha, beta)


def _spread(first: Face, second: Face, inputs: Sequence[Tensor], origin: bool = False) -> Tensor:
    """Second face minus first at these values."""
    return height(tuple(b - a for a, b in zip(first, second, strict=True)), inputs, origin)


@dataclass(frozen=True, slots=True)
class Feasible(Batched):
    """Result of a primal sweep: a feasible point and its objective."""

    objective: Tensor
    """[R]."""
    before: Weights
    """Pre-activation of each activation."""
    after: Weights
    """Value of each activation and product."""


def primal_sweep(problems: Problems, point: PrimalPoint) -> Feasible:
    """Push a primal point through the hulls: feasible to rounding, its objective an upper bound of the LP's value."""
    before: Weights = {}
    after: Weights = {}

    def activate(node: Node, *inputs: Tensor) -> Tensor:
        low, high = floor_and_ceiling(problems.hulls[node.name], *inputs)
        if problems.hulls[node.name].before:
            before[node.name] = inputs[0]
        after[node.name] = torch.lerp(low, high, point.tau[node.name])
        return after[node.name]

    values = carried_on(problems.network, point.x, problems.wanted, activate)
    return Feasible(_dot(problems.rows, values[problems.target]), before, after)


def nearest_point(problems: Problems, x: Tensor, after: Mapping[str, Tensor]) -> PrimalPoint:
    """A point that keeps box and hulls, near inputs x and values `after` of the activations.

    Each fraction is read off where the neuron really stands once the layers before have been pushed through.
    """
    x = problems.region.into_hull(x)
    tau: Weights = {}

    def activate(node: Node, *inputs: Tensor) -> Tensor:
        h = problems.hulls[node.name]
        low, high = floor_and_ceiling(h, *inputs)
        room = high - low
        fraction = (after[node.name] - low) / torch.where(room > 0, room, 1.0)
        tau[node.name] = torch.where(h.free & (room > 0), fraction.clamp(0, 1), 0.0)
        return torch.lerp(low, high, tau[node.name])

    carried_on(problems.network, x, problems.hidden, activate)
    return PrimalPoint(x, tau)


def floor_and_ceiling(h: HullLines, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the hull at a pre-activation, or at both factors."""
    low = torch.maximum(height(h.below0, inputs), height(h.below1, inputs))
    high = height(h.above0, inputs)
    if h.above1 is not None:
        high = torch.minimum(high, height(h.above1, inputs))
    return low, high


def crown_start(network: Network, preactivation: Mapping[str, Bounds], hulls: Mapping[str, HullLines]) -> DualPoint:
    """The weights that make the dual value CROWN's bound: the line of smaller area, the even plane, per example."""
    alpha: Weights = {}
    beta: Weights = {}
    for node in network.relaxed:
        if node.name not in hulls:
            continue
        h = hulls[node.name]
        if isinstance(node.op, Multiply):
            alpha[node.name] = beta[node.name] = torch.full_like(h.below0[0], 0.5)
            continue
        assert isinstance(node.op, Activation)
        b = preactivation[node.name]
        chosen = crown_lines(node.op, b.lower, b.upper)
        alpha[node.name] = _weight_of(chosen.lower_slope, chosen.lower_intercept, h.below0, h.below1)
        if h.above1 is not None:
            beta[node.name] = _weight_of(chosen.upper_slope, chosen.upper_intercept, h.above0, h.above1)
    return DualPoint(alpha, beta)


def chord_start(network: Network, hulls: Mapping[str, HullLines], start: DualPoint) -> DualPoint:
    """The weights whose lower slope is the chord's (Fast-Lin); upper weights, and products, as in `start`."""
    alpha: Weights = {}
    for name, h in hulls.items():
        if isinstance(network[name].op, Multiply):
            alpha[name] = start.alpha[name]
            continue
        spread = h.below1[0] - h.below0[0]
        wide = spread != 0
        weight = (h.above0[0] - h.below0[0]) / torch.where(wide, spread, 1.0)
        alpha[name] = torch.where(wide, weight, 0.0).clamp(0, 1)
    return DualPoint(alpha, start.beta)


def _weight_of(slope: Tensor, intercept: Tensor, first: Face, second: Face) -> Tensor:
    return ((slope == second[0]) & (intercept == second[1])).to(slope)


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
        node = network[name]
        below, above = mix(h.below0, h.below1, dual.alpha[name]), mix(h.above0, h.above1, dual.beta.get(name))
        given = [preactivation[source] for source in _bounded_by(node)]
        if isinstance(node.op, Activation):
            lines[name] = outward_lines(Lines(*below, *above), node.op, given[0].lower, given[0].upper)
        else:
            planes = Planes(below, above)  # type: ignore[arg-type]
            lines[name] = outward_planes(planes, given[0], given[1], same=False)
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
