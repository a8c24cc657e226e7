"""Back-substitution: rows of a linear function of the output pulled back to the input, relaxation by relaxation.

The one implementation behind CROWN, Fast-Lin, DeepZ (backward), Box (with constant lines) and the dual bound of the
LP layers. Source: Zhang et al. 2018 (CROWN), Singh et al. 2019 (DeepPoly); outward rounding: see `optrelax.rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from optrelax.domains import windows
from optrelax.domains.balls import Ball, absolute_terms
from optrelax.domains.frames import Plan, Seen
from optrelax.domains.lines import Lines
from optrelax.domains.planes import Planes
from optrelax.domains.rules import find_rule, require_rules, rule
from optrelax.domains.windows import Windows
from optrelax.enclosures import Bounds, from_above, from_below
from optrelax.kernels.band_step import band_step, range_over_box
from optrelax.kernels.convolutions import Pair
from optrelax.kernels.relax_step import least_over_box, relax_step
from optrelax.kernels.sign_products import bytes_taken, ends_through, pays
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear, Shape, flatten_from
from optrelax.networks.products import Multiply
from optrelax.regions import InputBox, Region, Support
from optrelax.rounding import SLACK, gamma, peak, tiny, underflow, unit_roundoff

Enclosure = Lines | Planes | Bounds
Ends = TypeVar("Ends", Tensor, tuple[Tensor, Tensor])


@dataclass
class Rows:
    """Walk in progress: coefficients [batch or 1, k, *shape] a node, and the constant [batch, k]."""

    network: Network
    lines: Mapping[str, Enclosure]
    """Lines of each activation, planes of a product, or constant bounds of a value, which end the walk there."""
    magnitude: Mapping[str, Tensor] | None
    """Greatest |value| of each node, [batch, *shape]: what outward rounding multiplies; None to round to nearest."""
    constant: Tensor
    upper: Tensor | None = None
    """Between parallel lines the constant of the rows' upper bounds, whose coefficients are the same; else None."""
    region: InputBox | None = None
    """A box: rows may end in its bounds before they reach the input; to nearest only."""
    pending: dict[str, Tensor] = field(default_factory=dict)
    allowance: Tensor | None = None
    terms: Tensor | None = None
    stops: dict[str, Tensor] = field(default_factory=dict)
    frames: Mapping[str, Seen] = field(default_factory=dict)
    """Where each node's coefficients lie; what is not named has them in its own shape."""
    grid: Pair = (1, 1)
    places: Tensor | None = None
    """Places of the grid that rows of windows start from, [batch or 1, places, 2]."""
    settled: set[str] = field(default_factory=set)
    """Nodes whose bias went into the lines behind them."""

    def add(self, name: str, a: Tensor) -> None:
        """Send coefficients to a node's value, where branches meet."""
        self.join(name, windows.adapt(a, "rows", self.frames.get(name, "rows"), self))

    def join(self, name: str, a: Tensor) -> None:
        """Send coefficients in the frame that the node expects them in."""
        if name not in self.pending:
            self.pending[name] = a
            return
        total = self.pending[name] + a
        if self.magnitude is not None:
            self.allow(unit_roundoff(a.dtype) * self.dot(name, total.abs(), self.magnitude[name]))
        self.pending[name] = total

    def dot(self, name: str, a: Tensor, values: Tensor) -> Tensor:
        """Coefficients of a node times values of it, [batch or none, *shape]: [batch or 1, k]."""
        frame = self.frames.get(name, "rows")
        if frame == "rows":
            return dot(a, values)
        return windows.dot(a, windows.see(values, frame, self), self)

    def least(self, a: Tensor, region: Region) -> Tensor:
        """Least value over the region of rows that have reached the input."""
        frame = self.frames.get(self.network.input, "rows")
        if frame != "rows" and isinstance(region, InputBox):
            found: Tensor = windows.over_box(least_over_box, a, frame, region, self)
            return found
        return region.support(windows.adapt(a, frame, "rows", self))

    def extent(self, a: Tensor, region: Region) -> tuple[Tensor, Tensor]:
        """Least and greatest value over the region of rows that have reached the input."""
        frame = self.frames.get(self.network.input, "rows")
        if frame != "rows" and isinstance(region, InputBox):
            found: tuple[Tensor, Tensor] = windows.over_box(range_over_box, a, frame, region, self)
            return found
        return region.extent(windows.adapt(a, frame, "rows", self))

    def least_outward(self, a: Tensor, region: Region) -> Support:
        """A lower bound over the region of rows that have reached the input, with what its rounding scales with."""
        frame = self.frames.get(self.network.input, "rows")
        if frame == "rows" or not isinstance(region, InputBox):
            return region.outward_support(windows.adapt(a, frame, "rows", self))
        reach = region.center.abs() + region.radius + tiny(a.dtype)
        size = self.dot(self.network.input, a.abs(), reach)
        return Support(self.least(a, region), size, 2 * math.prod(self.network.input_shape) + 4)

    @cached_property
    def entrance(self) -> str | None:
        """The convolution that all paths from the input lead through."""
        return windows.entrance(self.network)

    def allow(self, amount: Tensor) -> None:
        """Add to the rounding allowance, [batch, k]."""
        self.allowance = amount if self.allowance is None else self.allowance + amount

    def allow_underflow(self, name: str, terms: int) -> None:
        """Allow for coefficients at a node's value that lost up to `terms` products each below the normal range."""
        assert self.magnitude is not None
        # Each example's own: one that overflows must not spoil the others. The greatest value n times, not their sum:
        # that may overflow where none of them does.
        size = self.magnitude[name].detach()
        n = math.prod(size.shape[1:])
        greatest = peak(size).reshape(-1, 1).expand(self.constant.shape)
        self.allow(underflow(terms * n, size.dtype) * (1 + greatest))

    def add_constant(
        self, amount: Tensor, magnitude: Tensor | None = None, terms: int = 0, upper: Tensor | None = None
    ) -> None:
        """Add [batch or 1, k] to the constant; outward, `magnitude` is the sum of the absolute terms behind it.

        upper: what the upper bounds get instead.
        """
        self.constant = self.constant + amount
        if self.upper is not None:
            self.upper = self.upper + (amount if upper is None else upper)
        if self.magnitude is not None and magnitude is not None:
            dtype = amount.dtype
            self.allow(gamma(terms + 2, dtype) * magnitude + underflow(terms + 2, dtype))
            self.terms = magnitude if self.terms is None else self.terms + magnitude


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Rows times a vector: a [batch or 1, k, *shape], b [batch or none, *shape] -> [batch or 1, k]."""
    flat = flatten_from(a, 2)
    if b.dim() == a.dim() - 2:  # one vector for all
        return flat @ b.reshape(-1)
    vector = flatten_from(b, 1)
    if flat.shape[0] == 1 and vector.shape[0] != 1:
        return vector @ flat[0].mT
    return (flat @ vector[..., None])[..., 0]


def substitute(
    network: Network,
    target: str,
    rows: Tensor,
    region: Region,
    lines: Mapping[str, Enclosure],
    *,
    magnitude: Mapping[str, Tensor] | None = None,
    plan: Plan | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Lower bound of each row of `rows` times the value of node `target`.

    rows [batch or 1, k, *shape of target] -> [batch, k]; plan, places: see `pull`.
    Sound: yes, for sound lines.  Gradient: in weights, lines, rows and region; at coefficients of exactly 0 that
    of the upper line (relu(0)' = 0 for the positive part).
    """
    end = _end_of(region) if magnitude is None else None
    walk = pull(network, target, rows, region.shape[0], lines, magnitude, end=end, plan=plan, places=places)
    return concretise(walk, region)


def substitute_both(
    network: Network,
    target: str,
    rows: Tensor,
    region: Region,
    lines: Mapping[str, Enclosure],
    *,
    plan: Plan | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of each row of `rows` times the value of node `target`, by parallel lines, to nearest.

    rows [batch or 1, k, *shape of target] -> [batch, k] each, from one walk: the upper bound's coefficients are those
    of the lower.  Sound and gradient: as `substitute`; at coefficients of exactly 0 that of the middle.
    """
    walk = pull(network, target, rows, region.shape[0], lines, both=True, end=_end_of(region), plan=plan, places=places)
    a = walk.pending.pop(network.input, None)
    if a is not None:
        low, high = walk.extent(a, region)
        walk.add_constant(low, upper=high)
    assert walk.upper is not None
    return from_below(walk.constant), from_above(walk.upper)


def pull(
    network: Network,
    target: str,
    rows: Tensor,
    batch: int,
    lines: Mapping[str, Enclosure],
    magnitude: Mapping[str, Tensor] | None = None,
    stop: frozenset[str] = frozenset(),
    both: bool = False,
    end: InputBox | None = None,
    plan: Plan | None = None,
    places: Tensor | None = None,
) -> Rows:
    """Pull rows back until they reach the input (or a node of `stop`, where they are left in `.stops`).

    both: the constants of lower and upper bounds at once; every line is one of a parallel pair.
    end: a box in whose bounds rows may end on the way, where that is faster; to nearest only.
    plan: where the coefficients of every node lie; places: those of the target whose rows these are, as windows,
    [batch or 1, places, 2]: rows [examples or 1, k, 1, 1, channels], and constants are [batch, places * k].
    """
    require_rules(network, Rows)
    zeros = rows.new_zeros(batch, rows.shape[1] * (1 if places is None else places.shape[1]))
    walk = Rows(network, lines, magnitude, zeros, zeros if both else None, end)
    if plan is not None:
        walk.frames, walk.grid, walk.places = plan.frames, plan.grid, places
    walk.pending[target] = rows
    for node in reversed(network.nodes):
        if node.name not in walk.pending:
            continue
        a = walk.pending.pop(node.name)
        if node.name in stop:
            walk.stops[node.name] = a
            continue
        frame = walk.frames.get(node.name, "rows")
        step = find_rule(node.op, Rows if frame == "rows" else Windows)
        assert step is not None
        step(node.op, node, a, *(() if frame == "rows" else (frame,)), walk)
    return walk


def _end_of(region: Region) -> InputBox | None:
    return region if isinstance(region, InputBox) else None


def concretise(walk: Rows, region: Region) -> Tensor:
    """Lower bound over the region once every row has reached the input: [batch, k]."""
    name = walk.network.input
    a = walk.pending.pop(name, None)
    if a is not None:
        if walk.magnitude is None:
            walk.add_constant(walk.least(a, region))
        else:
            walk.add_constant(*walk.least_outward(a, region))
    if walk.allowance is None:
        return from_below(walk.constant)
    total = walk.allowance
    if walk.terms is not None:
        total = total + gamma(4 * len(walk.network.nodes) + 8, total.dtype) * walk.terms
    return from_below(walk.constant - SLACK * total)


@rule(Affine, domain=Rows)
def _affine(op: Affine, node: Node, a: Tensor, walk: Rows) -> None:
    b = op.bias(a)
    if b is not None:
        b = b.expand(node.shape)
        size = None if walk.magnitude is None else op.bias_size(a)
        magnitude = None if size is None else dot(a.abs(), size.expand(node.shape))
        walk.add_constant(dot(a, b), magnitude, b.numel() + op.roundings)
    if walk.magnitude is not None and op.cost() > 0:
        # (fl(A W) - A W) z is at most gamma(fan_out) |A| (|W| |z|), and the constants' part: see `optrelax.rounding`.
        size, lost = absolute_terms(op, [walk.magnitude[name] for name in node.inputs])
        walk.allow(dot(a.abs(), gamma(op.fan_out + op.roundings, a.dtype) * size + lost))
        for name in node.inputs:
            walk.allow_underflow(name, 2 * op.fan_out)
    if walk.region is not None and walk.network.entrance[-1:] == (node,) and _end(a, walk, walk.region):
        return
    for name, pulled in zip(node.inputs, op.transpose(a), strict=True):
        walk.add(name, pulled)


def _end(a: Tensor, walk: Rows, region: InputBox) -> bool:
    """Rows at the network's entrance end in the box before it, where that is faster."""
    found = box_at_entrance(walk.network, region, a.shape[1])
    if found is None or a.shape[0] != region.shape[0]:
        return False
    middle, spread = ends_through(a, *found)
    walk.add_constant(middle - spread, upper=middle + spread)
    return True


def box_at_entrance(network: Network, region: Region, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weight of the network's entrance, center and radius before it, where k rows an example end there; or None."""
    if not network.entrance or not isinstance(region, InputBox):
        return None
    *before, last = network.entrance
    assert isinstance(last.op, Linear)
    center, radius = region.center, region.radius
    for node in before:
        assert isinstance(node.op, Affine)
        center, radius = node.op.apply(center), node.op.absolute(radius)
    weight = last.op.weight(center)
    return (weight, center, radius) if pays(k, weight, center, radius) else None


def bytes_at_entrance(network: Network, region: Region, k: int) -> tuple[int, int] | None:
    """What k rows take there, forward and back, beside themselves; None where they go on to the input."""
    found = box_at_entrance(network, region, k)
    if found is None:
        return None
    m, n = found[0].shape
    return bytes_taken(region.shape[0], k, m, n, region.dtype.itemsize)


@rule(Multiply, domain=Rows)
def _multiply(op: Multiply, node: Node, a: Tensor, walk: Rows) -> None:
    """A positive coefficient takes the plane below, a negative one that above."""
    planes = walk.lines[node.name]
    if isinstance(planes, Bounds):
        end_in(planes, a, walk)
        return
    assert isinstance(planes, Planes)
    assert walk.upper is None, "products have two rows a neuron"
    positive, negative = a.clamp_min(0), a.clamp_max(0)
    (*below, low), (*above, high) = planes.below, planes.above
    constant = dot(positive, low) + dot(negative, high)
    size = None
    if walk.magnitude is not None:
        size = dot(a.abs(), torch.maximum(low.abs(), high.abs()) + tiny(a.dtype))
    walk.add_constant(constant, size, math.prod(node.shape) + 8)
    for name, under, over in zip(node.inputs, below, above, strict=True):
        pulled = positive * under[:, None] + negative * over[:, None]
        if walk.magnitude is not None:
            walk.allow(2 * unit_roundoff(a.dtype) * dot(pulled.abs(), walk.magnitude[name]))
            walk.allow_underflow(name, 1)
        walk.add(name, pulled)


@rule(Activation, domain=Rows)
def _activation(op: Activation, node: Node, a: Tensor, walk: Rows) -> None:
    lines = walk.lines[node.name]
    if isinstance(lines, Bounds):
        end_in(lines, a, walk)
        return
    assert isinstance(lines, Lines)
    if walk.upper is not None:
        assert lines.parallel, "one row gives both bounds between parallel lines only"
        pulled, low, high = band_step(a, lines)
        walk.add_constant(low, upper=high)
        walk.add(node.inputs[0], pulled)
        return
    pulled, constant = relax_step(a, lines)
    if walk.magnitude is not None:
        reach = torch.maximum(lines.lower_intercept.abs(), lines.upper_intercept.abs())
        walk.add_constant(constant, dot(a.abs(), reach + tiny(a.dtype)), math.prod(node.shape) + 8)
        unit = unit_roundoff(a.dtype)
        walk.allow(2 * unit * dot(pulled.abs(), walk.magnitude[node.inputs[0]]))
        walk.allow_underflow(node.inputs[0], 1)
    else:
        walk.add_constant(constant)
    walk.add(node.inputs[0], pulled)


def end_in(bounds: Bounds, a: Tensor, walk: Rows) -> None:
    """The value is known only to lie in `bounds`: the rows end here."""
    l, u = bounds.lower, bounds.upper
    constant = least_over_box(a, l, u)
    size = None
    if walk.magnitude is not None:
        size = dot(a.abs(), torch.maximum(l.abs(), u.abs()) + tiny(a.dtype)) * 2
    walk.add_constant(constant, size, 2 * math.prod(l.shape[1:]) + 4)


@rule(Greatest, domain=Rows)
def _max_pool(op: Greatest, node: Node, a: Tensor, walk: Rows) -> None:
    """Below: the entry with the greatest lower bound; above: that entry where it dominates, else the greatest upper.

    Source: Singh et al. 2019, section 4.
    """
    given = walk.lines[node.name]
    assert isinstance(given, Bounds), "pooling takes the bounds of its input"
    windows = op.windows(a.device)
    chosen, dominates, top = choose_entries(op, given, windows)
    lower_part = a.relu()
    upper_part = a - lower_part  # a coefficient of 0 is above, as in `relax_step`: clamped twice, it would count twice
    kept = lower_part + upper_part * dominates[:, None]
    batch, k = kept.shape[:2]
    flat: Shape = (math.prod(op.input_shapes[0]),)
    pulled = kept.new_zeros(batch, k, *flat)
    index = flatten_from(chosen, 1)[:, None].expand(batch, k, -1)
    entries = flatten_from(kept, 2)
    pulled = pulled.scatter_add(2, index, entries)
    roof = torch.where(dominates, 0.0, top)
    size = None
    if walk.magnitude is not None:
        size = dot(a.abs(), roof.abs())
        # Overlapping windows add coefficients of one input, of both signs.
        added = torch.zeros_like(pulled).scatter_add(2, index, entries.abs())
        reach = dot(added, flatten_from(walk.magnitude[node.inputs[0]], 1))
        walk.allow(gamma(op.readers + 2, a.dtype) * reach)
    walk.add_constant(dot(upper_part, roof), size, math.prod(node.shape))
    walk.add(node.inputs[0], pulled.reshape(batch, k, *op.input_shapes[0]))


def choose_entries(op: Greatest, before: Bounds, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per window: flat index of the entry with the greatest lower bound, whether it dominates, greatest upper bound."""
    pad = windows < 0
    index = windows.clamp_min(0)
    low = flatten_from(before.lower, 1)[:, index].masked_fill(pad, -torch.inf)
    high = flatten_from(before.upper, 1)[:, index].masked_fill(pad, -torch.inf)
    best = low.argmax(-1, keepdim=True)
    others = high.scatter(-1, best, -torch.inf)
    dominates = (low.gather(-1, best) >= others.amax(-1, keepdim=True))[..., 0]
    chosen = index.expand(low.shape).gather(-1, best)[..., 0]
    return chosen, dominates, high.amax(-1)


def magnitudes(network: Network, balls: Mapping[str, Ball]) -> dict[str, Tensor]:
    """Greatest |value| of every node from a walk of intervals with outward rounding."""
    return {name: b.magnitude * SLACK for name, b in balls.items()}
