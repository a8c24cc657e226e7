"""Presolve of network LPs: stable neurons composed away, the crossing ones as dense matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optrelax.layers.composition import Composition, NeuronSlots
from optrelax.layers.hulls import HullLines, floor_and_ceiling
from optrelax.layers.prices import priced
from optrelax.layers.problems import DualPoint, PrimalPoint, Problems, Weights
from optrelax.layers.sweeps import nearest_point
from optrelax.networks.ops import flatten_from


@dataclass(frozen=True)
class Reduced:
    """min c_v.v + c_y.y + offset, p = M v + N y + m, v in [-1, 1]^d, (p, y) in the hull of each of K neurons.

    M [R, K, d], N [R, K, K] strictly lower block triangular, m [R, K]; neurons of one layer stand together
    (`slots`), padded with neurons that read and feed nothing.
    """

    M: Tensor
    N: Tensor
    m: Tensor
    c_v: Tensor
    c_y: Tensor
    offset: Tensor
    constraints: tuple[Tensor, Tensor, Tensor]
    """g_p, g_y, h of g_p p + g_y y >= h: [2 below + 1 or 2 above, R, K] each."""
    middle: Tensor
    """A pre-activation inside (l, u), and `inside` a value strictly inside the hull there: [R, K]."""
    inside: Tensor
    slots: tuple[NeuronSlots, ...]
    """Of the crossing neurons, layer by layer."""

    def dual_point(self, problems: Problems, prices: Tensor) -> DualPoint:
        """The dual point of the prices of the crossing neurons, [R, K]; see `optrelax.layers.prices`.

        Not from the multipliers of the lines: where a pre-activation bound is attained, as LP-ALL's are, an interior
        method puts weight on lines below and above at once, which their shares cannot say.
        """
        return priced(problems, self._scattered(problems, prices), crossing_only=True)

    def primal_point(self, problems: Problems, v: Tensor, y: Tensor) -> PrimalPoint:
        """A feasible point near (v, y)."""
        center, radius = problems.center, problems.radius
        x = center + radius * v.reshape(center.shape).clamp(-1, 1)
        return nearest_point(problems, x, self._scattered(problems, y))

    def _scattered(self, problems: Problems, values: Tensor) -> Weights:
        """Values of the crossing neurons, [R, K], by activation; 0 elsewhere."""
        like = {slot.name: torch.zeros_like(problems.hulls[slot.name].before[0]) for slot in self.slots}
        return {slot.name: slot.scatter(values[:, slot.span], like[slot.name]) for slot in self.slots}


_FLAT = 1e-12  # height of a hull that is not worth a variable: far below any tolerance, and ill-conditioned


def without_flat(problems: Problems) -> Problems:
    """The same problems with neurons whose hull is next to a line marked as not crossing."""

    def bent(h: HullLines) -> Tensor:
        height = torch.zeros_like(h.before[0])
        for first, second in ((h.below0, h.below1), (h.above0, h.above1 or h.above0)):
            spread = second[0] - first[0]
            kink = (first[1] - second[1]) / torch.where(spread == 0, 1.0, spread)
            low, high = floor_and_ceiling(h, torch.minimum(torch.maximum(kink, h.before[0]), h.before[1]))
            height = torch.maximum(height, high - low)
        return h.free & (height > _FLAT)

    return replace(problems, hulls={name: replace(h, free=bent(h)) for name, h in problems.hulls.items()})


def reduce_problems(problems: Problems) -> Reduced:
    """Compose the stable neurons away: rows of every crossing neuron and of the objective, pulled back together."""
    composition = Composition(problems)
    shape = (problems.count, composition.width)
    new = problems.rows.new_zeros
    M, N, m = new(*shape, problems.center[0].numel()), new(*shape, composition.width), new(*shape)
    values, reached = composition.values(problems.center)
    for slot in composition.slots:
        if slot.first < slot.last:
            M[:, slot.span], N[:, slot.span] = composition.neurons(slot)
            m[:, slot.span] = slot.gather(values[slot.name])
    c_x, c_y = composition.pull(problems.target, problems.rows[:, None])
    offset = (problems.rows * reached).flatten(1).sum(1)
    radius = flatten_from(problems.radius, 1)
    constraints, middle, inside = _hulls(problems, composition.slots, shape)
    return Reduced(
        M * radius[:, None],
        N,
        m,
        c_x[:, 0] * radius,
        c_y[:, 0],
        offset,
        constraints,
        middle,
        inside,
        composition.slots,
    )


def _hulls(
    problems: Problems, slots: tuple[NeuronSlots, ...], shape: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Constraints of the crossing neurons in order, and a point strictly inside each hull."""
    two = any(problems.hulls[slot.name].above1 is not None for slot in slots)
    new = problems.rows.new_zeros
    count = 4 if two else 3
    g_p, g_y, h = new(count, *shape), new(count, *shape), new(count, *shape)
    middle, inside = new(*shape), new(*shape)
    for slot in slots:
        if slot.first == slot.last:
            continue
        lines = problems.hulls[slot.name]
        sides = [(lines.below0, 1.0), (lines.below1, 1.0), (lines.above0, -1.0)]
        if two:
            sides.append((lines.above1 or lines.above0, -1.0))

        # Padding gets the triangle of a ReLU on [-1, 1].
        defaults = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 0.5))
        at, pick = slot.span, slot.gather
        for c, ((line, sign), (slope, intercept)) in enumerate(zip(sides, defaults[: len(sides)], strict=True)):
            g_p[c, :, at] = -sign * pick(line[0], slope)
            g_y[c, :, at] = sign
            h[c, :, at] = sign * pick(line[1], intercept)
        l, u = pick(lines.before[0], -1.0), pick(lines.before[1], 1.0)
        middle[:, at] = p = (l + u) / 2
        g, hc = g_p[:, :, at], h[:, :, at]
        low = torch.maximum(hc[0] - g[0] * p, hc[1] - g[1] * p)
        highs = g[2:] * p - hc[2:]
        inside[:, at] = (low + highs.amin(0)) / 2
    return (g_p, g_y, h), middle, inside
