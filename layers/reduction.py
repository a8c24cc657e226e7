"""Presolve of network LPs: stable neurons composed away, the crossing ones as dense matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optrelax.layers.prices import affine_line, priced
from optrelax.layers.problems import (
    DualPoint,
    HullLines,
    PrimalPoint,
    Problems,
    Weights,
    floor_and_ceiling,
    primal_sweep,
)
from optrelax.ops import Affine, flatten_from


@dataclass(frozen=True)
class Reduced:
    """min c_v.v + c_y.y + offset, p = M v + N y + m, v in [-1, 1]^d, (p, y) in the hull of each of K neurons.

    M [R, K, d], N [R, K, K] strictly lower block triangular, m [R, K]; neurons of one layer stand together
    (`layers`), padded with neurons that read and feed nothing.
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
    layers: tuple[tuple[int, int], ...]
    places: tuple[tuple[str, Tensor, Tensor], ...]
    """Per layer: activation, flat neuron index [R, K_t], which of them are real."""

    def dual_point(self, problems: Problems, prices: Tensor) -> DualPoint:
        """The dual point of the prices of the crossing neurons, [R, K]; see `optrelax.layers.prices`.

        Not from the multipliers of the lines: where a pre-activation bound is attained, as LP-ALL's are, an interior
        method puts weight on lines below and above at once, which their shares cannot say.
        """
        given: Weights = {}
        for (name, index, real), (first, last) in zip(self.places, self.layers, strict=True):
            like = torch.zeros_like(problems.hulls[name].before[0])
            given[name] = _scatter(prices[:, first:last], index, real, like)
        return priced(problems, given, crossing_only=True)

    def primal_point(self, problems: Problems, v: Tensor, y: Tensor) -> PrimalPoint:
        """A feasible point near (v, y): the fractions are read off layer by layer, where the neurons really stand."""
        center, radius = (problems.lower + problems.upper) / 2, (problems.upper - problems.lower) / 2
        x = center + radius * v.reshape(center.shape).clamp(-1, 1)
        tau = {name: torch.zeros_like(h.below0[0]) for name, h in problems.hulls.items()}
        for (name, index, real), (first, last) in zip(self.places, self.layers, strict=True):
            before = primal_sweep(problems, PrimalPoint(x, tau)).before[name]
            h = problems.hulls[name]
            low, high = floor_and_ceiling(h, before)
            wanted = _scatter(y[:, first:last], index, real, torch.zeros_like(before))
            room = high - low
            fraction = (wanted - low) / torch.where(room > 0, room, 1.0)
            tau[name] = torch.where(h.free & (room > 0), fraction.clamp(0, 1), 0.0)
        return PrimalPoint(x, tau)


def _scatter(values: Tensor, index: Tensor, real: Tensor, rest: Tensor) -> Tensor:
    """The values at their neurons, `rest` elsewhere."""
    # Padding is written to a spare last column.
    flat = torch.cat([flatten_from(rest, 1), values.new_zeros(len(values), 1)], 1)
    flat = flat.scatter(1, torch.where(real, index, flat.shape[1] - 1), values)
    return flat[:, :-1].reshape(rest.shape)


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
    names = [node.name for node in problems.network.activations if node.name in problems.hulls]
    places: list[tuple[str, Tensor, Tensor]] = []
    layers: list[tuple[int, int]] = []
    width = 0
    for name in names:
        free = flatten_from(problems.hulls[name].free, 1)
        count = int(free.sum(1).max()) if free.numel() else 0
        order = free.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        places.append((name, order, free.gather(1, order)))
        layers.append((width, width + count))
        width += count
    shape = (problems.count, width)
    d = problems.lower[0].numel()
    new = problems.rows.new_zeros
    M, N, m = new(*shape, d), new(*shape, width), new(*shape)
    spans = dict(zip(names, zip(places, layers, strict=True), strict=True))
    for name, ((_, index, real), (first, last)) in spans.items():
        if first == last:
            continue
        source = problems.network[name].inputs[0]
        rows = new(problems.count, last - first, *problems.network.shape_of(source))
        flatten_from(rows, 2).scatter_(2, index[..., None], real.to(rows)[..., None])
        M[:, first:last], N[:, first:last], m[:, first:last] = _pull(problems, source, rows, spans, width)
    c_x, c_y, offset = _pull(problems, problems.target, problems.rows[:, None], spans, width)
    center = flatten_from((problems.lower + problems.upper) / 2, 1)
    radius = flatten_from((problems.upper - problems.lower) / 2, 1)
    constraints, middle, inside = _hulls(problems, spans, shape)
    return Reduced(
        M * radius[:, None],
        N,
        m + (M @ center[..., None])[..., 0],
        c_x[:, 0] * radius,
        c_y[:, 0],
        offset[:, 0] + (c_x[:, 0] * center).sum(1),
        constraints,
        middle,
        inside,
        tuple(layers),
        tuple(places),
    )


Span = tuple[tuple[str, Tensor, Tensor], tuple[int, int]]


def _pull(
    problems: Problems, target: str, rows: Tensor, spans: dict[str, Span], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R, k, *shape] of a node as coefficients of the input [R, k, d] and of crossing values, and constants."""
    network = problems.network
    pending = {target: rows}
    constant = rows.new_zeros(*rows.shape[:2])
    on_values = rows.new_zeros(*rows.shape[:2], width)
    for node in reversed(network.nodes):
        if node.name not in pending:
            continue
        a = pending.pop(node.name)
        if isinstance(node.op, Affine):
            b = node.op.bias(a)
            if b is not None:
                constant = constant + flatten_from(a, 2) @ b.expand(node.shape).reshape(-1)
            pulls = zip(node.inputs, node.op.transpose(a), strict=True)
        else:
            (_, index, real), (first, last) = spans[node.name]
            h = problems.hulls[node.name]
            flat = flatten_from(a, 2)
            picked = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))
            on_values[:, :, first:last] += picked * real[:, None]
            slope, intercept = (torch.where(h.free, 0.0, t) for t in affine_line(h))
            constant = constant + (flat @ flatten_from(intercept, 1)[..., None])[..., 0]
            pulls = zip(node.inputs, (a * slope[:, None],), strict=True)
        for name, pulled in pulls:
            pending[name] = pending[name] + pulled if name in pending else pulled
    on_input = pending.get(network.input)
    if on_input is None:
        on_input = rows.new_zeros(*rows.shape[:2], *network.input_shape)
    return flatten_from(on_input, 2), on_values, constant


def _hulls(
    problems: Problems, spans: dict[str, Span], shape: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Constraints of the crossing neurons in order, and a point strictly inside each hull."""
    two = any(problems.hulls[name].above1 is not None for name in spans)
    new = problems.rows.new_zeros
    count = 4 if two else 3
    g_p, g_y, h = new(count, *shape), new(count, *shape), new(count, *shape)
    middle, inside = new(*shape), new(*shape)
    for name, ((_, index, real), (first, last)) in spans.items():
        if first == last:
            continue
        lines = problems.hulls[name]
        sides = [(lines.below0, 1.0), (lines.below1, 1.0), (lines.above0, -1.0)]
        if two:
            sides.append((lines.above1 or lines.above0, -1.0))

        def pick(t: Tensor, default: float, index: Tensor = index, real: Tensor = real) -> Tensor:
            return torch.where(real, flatten_from(t, 1).gather(1, index), default)

        # Padding gets the triangle of a ReLU on [-1, 1].
        defaults = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 0.5))
        place = slice(first, last)
        for c, ((line, sign), (slope, intercept)) in enumerate(zip(sides, defaults[: len(sides)], strict=True)):
            g_p[c, :, place] = -sign * pick(line[0], slope)
            g_y[c, :, place] = sign
            h[c, :, place] = sign * pick(line[1], intercept)
        l, u = pick(lines.before[0], -1.0), pick(lines.before[1], 1.0)
        middle[:, place] = p = (l + u) / 2
        g, hc = g_p[:, :, place], h[:, :, place]
        low = torch.maximum(hc[0] - g[0] * p, hc[1] - g[1] * p)
        highs = g[2:] * p - hc[2:]
        inside[:, place] = (low + highs.amin(0)) / 2
    return (g_p, g_y, h), middle, inside
