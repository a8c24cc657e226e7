"""The sweeps that every solver of network LPs is made of, backward through the faces and forward through the hulls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.domains import backsubstitution, interval
from optrelax.domains.lines import Lines, outward_lines
from optrelax.domains.planes import Planes, outward_planes
from optrelax.domains.row_walks import Enclosure, Rows, dot
from optrelax.domains.rules import find_rule
from optrelax.enclosures import Bounds
from optrelax.layers.batched import Batched
from optrelax.layers.hulls import Face, bounded_by, floor_and_ceiling, height, mix
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems, Weights
from optrelax.networks.graph import Node
from optrelax.networks.ops import flatten_from
from optrelax.networks.walks import carried_back, carried_on
from optrelax.rounding import Rounding


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
        if node.affine:
            b = node.affine.bias(a)
            if b is not None:
                constant = constant + dot_each(a, b.expand(node.shape))
            return zip(node.inputs, node.affine.transpose(a), strict=True)
        h = problems.hulls[node.name]
        below = mix(h.below0, h.below1, dual.alpha[node.name], h.origin)
        above = mix(h.above0, h.above1, dual.beta.get(node.name))
        # relu, not clamp: its gradient is 0 at 0, so that a coefficient of 0 counts for the upper line alone.
        up = a.relu()
        down = a - up
        met[node.name], on_lower[node.name] = a, up.detach().sign()
        pulled = [torch.addcmul(up * low, down, high) for low, high in zip(below[:-1], above[:-1], strict=True)]
        constant = constant + dot_each(down, above[-1])
        if not h.origin:
            constant = constant + dot_each(up, below[-1])
        if node.name in dual.ends:
            ends = dual.ends[node.name]
            # max(ends, 0) (z - u) + max(-ends, 0) (l - z) <= 0 for every admitted z.
            pulled[0] = pulled[0] + ends
            constant = constant - dot_each(ends, torch.where(ends > 0, h.before[1], h.before[0]))
        return zip(node.inputs, pulled, strict=True)

    pending = carried_back(network, {problems.target: problems.rows}, step)
    zero = problems.region.like.new_zeros(()).expand(problems.region.shape)
    a = pending.get(network.input, zero)
    if problems.boxed:
        corner = problems.center - torch.copysign(problems.radius, a)
        return Backward(constant + dot_each(a, corner), met, on_lower, a, corner)
    least, corner = problems.region.attained(a[:, None])
    return Backward(constant + least[:, 0], met, on_lower, a, corner[:, 0])


def dot_each(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all but the first dimension: [R, *shape] and [R or none, *shape] -> [R]."""
    flat = flatten_from(a, 1)
    if b.dim() == a.dim() - 1:
        return flat @ b.reshape(-1)
    return torch.linalg.vecdot(flat, flatten_from(b, 1))


def forward_sweep(problems: Problems, dual: DualPoint, back: Backward) -> DualPoint:
    """The (super)gradient of the dual value in the mixing weights.

    One pass from the minimising corner through the lines that the coefficients took.
    """
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
    return DualPoint(alpha, beta)


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
    return Feasible(dot_each(problems.rows, values[problems.target]), before, after)


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
    lines: dict[str, Enclosure] = {}
    for name, h in problems.hulls.items():
        node = network[name]
        below, above = mix(h.below0, h.below1, dual.alpha[name]), mix(h.above0, h.above1, dual.beta.get(name))
        given = [preactivation[source] for source in bounded_by(node)]
        if node.activation:
            lines[name] = outward_lines(Lines(*below, *above), node.activation, given[0].lower, given[0].upper)
        else:
            planes = Planes(below, above)  # type: ignore[arg-type]
            lines[name] = outward_planes(planes, given[0], given[1], same=False)
    balls = interval.propagate(network, region, rounding="outward").balls
    magnitude = backsubstitution.magnitudes(network, balls)
    rows = problems.rows[:, None]
    if not dual.ends:
        return backsubstitution.substitute(network, problems.target, rows, region, lines, magnitude=magnitude)[:, 0]
    walk = Rows(network, lines, magnitude, rows.new_zeros(problems.count, 1))
    walk.pending[problems.target] = rows
    for node in reversed(network.nodes):
        if node.name not in walk.pending:
            continue
        step = find_rule(node.op, Rows)
        assert step is not None
        step(node.op, node, walk.pending.pop(node.name), walk)
        if node.name in dual.ends:
            ends, b = dual.ends[node.name][:, None], preactivation[node.name]
            end = torch.where(ends[:, 0] > 0, b.upper, b.lower)
            walk.add_constant(-dot(ends, end), dot(ends.abs(), end.abs()), end[0].numel())
            walk.add(node.inputs[0], ends)
    return backsubstitution.concretise(walk, region)[:, 0]
