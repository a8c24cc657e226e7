"""Dual points from prices, and what must hold before a point or a ray counts.

The prices of an LP are the multipliers of its equalities z = W y + b, one a pre-activation. They fix every other
multiplier: the coefficient of a neuron's value is W^T times the prices behind it, and the lines and bounds that best
hold (coefficient * y - price * z) over the neuron's hull can be read off. So any prices make a bound, and prices of an
optimal solution make the optimal value.  Source: Salman et al. 2019, appendix on duality; Bunel et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.layers.hulls import Face, HullLines, floor_and_ceiling, hulls_at, mix
from optrelax.layers.problems import DualPoint, Problems, Weights
from optrelax.layers.sweeps import Feasible, dual_value
from optrelax.networks.activations import Line
from optrelax.networks.graph import Node
from optrelax.networks.ops import flatten_from
from optrelax.networks.walks import carried_back


def in_float64(problems: Problems) -> Problems:
    """The same problems in float64, their hulls taken anew at their pre-activation bounds."""
    exact = problems.to(torch.float64)
    if exact is problems:
        return problems
    before = {name: Bounds.known(*h.before) for name, h in exact.hulls.items() if h.before}
    return replace(exact, hulls=hulls_at(problems.network, before))


def priced(problems: Problems, prices: Mapping[str, Tensor], crossing_only: bool = False) -> DualPoint:
    """The best dual point whose coefficients at the pre-activations are `prices`, [R, *shape] an activation.

    Where a price lies between the slopes of the side that the value's coefficient takes, it is a mix of the two lines;
    what lies beyond is a multiplier of z <= u or z >= l.
    crossing_only: the prices of stable neurons are not given but follow from their lines.
    """
    dual = DualPoint({}, {}, {})

    def step(node: Node, a: Tensor) -> Iterable[tuple[str, Tensor]]:
        if node.affine:
            return zip(node.inputs, node.affine.transpose(a), strict=True)
        price, h = prices[node.name], problems.hulls[node.name]
        if crossing_only:
            price = torch.where(h.free, price, a * affine_line(h)[0])
        slope = price / torch.where(a == 0, 1.0, a)
        dual.alpha[node.name] = alpha = _nearest_mix(slope, h.below0, h.below1, h.before, 1.0)
        beta = None
        if h.above1 is not None:
            dual.beta[node.name] = beta = _nearest_mix(slope, h.above0, h.above1, h.before, -1.0)
        below, above = mix(h.below0, h.below1, alpha), mix(h.above0, h.above1, beta)
        dual.ends[node.name] = price - a * torch.where(a > 0, below[0], above[0])
        return ((node.inputs[0], price),)

    carried_back(problems.network, {problems.target: problems.rows}, step)
    return dual


def affine_line(h: HullLines) -> Line:
    """The line through both ends of the graph, or the piece that it is."""
    l, u = h.before
    low, high = floor_and_ceiling(h, l)[0], floor_and_ceiling(h, u)[0]
    stable = (h.below0[0] == h.above0[0]) & (h.below0[1] == h.above0[1]) | (l == u)
    slope = torch.where(stable, h.below0[0], (high - low) / torch.where(stable, 1.0, u - l))
    return slope, torch.where(stable, h.below0[1], low - slope * l)


def _nearest_mix(slope: Tensor, first: Face, second: Face, ends: tuple[Tensor, ...], side: float) -> Tensor:
    """The mix of two lines whose slope comes nearest to a third; side 1 for lines below, -1 for lines above.

    Only of lines that are tight somewhere in [l, u]: the first from l on, the second up to u. Beyond one that is not,
    a multiplier of z <= u or z >= l holds more.
    """
    spread, lift = second[0] - first[0], second[1] - first[1]
    left, right = (side * torch.addcmul(lift, spread, end) for end in ends)
    weight = ((slope - first[0]) / torch.where(spread == 0, 1.0, spread)).clamp(0, 1)
    weight = torch.where(left < 0, weight, 1.0)
    return torch.where((right > 0) & (spread != 0), weight, 0.0)


def beyond_bounds(problems: Problems, feasible: Feasible, dual: DualPoint, tolerance: float) -> Tensor:
    """What a primal point pays for lying beyond its pre-activation bounds, inf where it lies too far: [R].

    It may lie beyond a bound by `tolerance` * max(1, |l|, |u|); that is charged at the bound's multiplier.
    """
    charge = torch.zeros_like(feasible.objective)
    inside = torch.ones_like(charge, dtype=torch.bool)
    for name, z in feasible.before.items():
        l, u = problems.hulls[name].before
        under, over = (l - z).clamp_min(0), (z - u).clamp_min(0)
        kept = torch.maximum(under, over) <= tolerance * torch.maximum(l.abs(), u.abs()).clamp_min(1)
        inside &= flatten_from(kept, 1).all(1)
        ends = dual.ends.get(name)
        if ends is not None:
            charge = charge + flatten_from(ends.clamp_min(0) * over - ends.clamp_max(0) * under, 1).sum(1)
    return torch.where(inside, charge, torch.inf)


def proves_contradiction(problems: Problems, rays: Mapping[str, Tensor], unit: float) -> Tensor:
    """Whether prices prove that no point keeps all pre-activation bounds: [R].

    With an objective of 0 a positive bound is a contradiction (Farkas); it is evaluated outward. Bounds that were
    computed with unit roundoff `unit` may contradict each other by as much, which says nothing about what they stand
    for, so that has to be exceeded too.
    """
    nothing = problems.rows.new_zeros(problems.count)
    size = nothing
    for r in rays.values():
        size = torch.maximum(size, flatten_from(r.abs(), 1).amax(1))
    scale = torch.where(size > 0, size, 1.0)
    rays = {name: r / scale.reshape(-1, *[1] * (r.dim() - 1)) for name, r in rays.items()}
    before = {name: Bounds.known(*h.before) for name, h in problems.hulls.items()}
    free = replace(problems, rows=torch.zeros_like(problems.rows))
    value = dual_value(free, priced(free, rays), "outward", before)
    reach = nothing
    for name, terms in _sizes(problems).items():
        reach = reach + flatten_from(rays[name].abs() * terms, 1).sum(1)
    return value > 64 * unit * reach


def _sizes(problems: Problems) -> Weights:
    """Sums of the absolute terms behind every pre-activation, [R, *shape]: what its rounding errors scale with."""
    network = problems.network
    sizes = {network.input: torch.maximum(problems.box.lower.abs(), problems.box.upper.abs())}
    found: Weights = {}
    for node in network.nodes:
        if node.name not in problems.hidden:
            continue
        if node.affine:
            size = node.op.apply_abs(*(sizes[name] for name in node.inputs))
            bias = node.op.bias_size(size)
            sizes[node.name] = size if bias is None else size + bias
        else:
            assert node.activation
            found[node.name] = z = sizes[node.inputs[0]]
            sizes[node.name] = node.op.magnitude(z)
    return found
