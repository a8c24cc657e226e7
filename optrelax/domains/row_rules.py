"""The rules by which rows in a node's own shape go back through its op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optrelax.domains.balls import absolute_terms
from optrelax.domains.lines import Lines
from optrelax.domains.planes import Planes
from optrelax.domains.row_walks import Rows, dot
from optrelax.domains.rules import rule
from optrelax.domains.window_values import fold
from optrelax.enclosures import Bounds
from optrelax.kernels.band_step import band_step
from optrelax.kernels.relax_step import least_over_box, relax_step
from optrelax.kernels.sign_products import bytes_taken, ends_through, pays
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Linear, Shape, flatten_from
from optrelax.networks.products import Multiply
from optrelax.regions import InputBox, Region
from optrelax.rounding import gamma, tiny, unit_roundoff


@rule(Affine, domain=Rows)
def _affine(op: Affine, node: Node, a: Tensor, walk: Rows) -> None:
    settle(op, node, a, walk)
    if walk.region is not None and walk.network.entrance[-1:] == (node,) and _end(a, walk, walk.region):
        return
    for name, pulled in zip(node.inputs, op.transpose(a), strict=True):
        walk.add(name, pulled)


def settle(op: Affine, node: Node, a: Tensor, walk: Rows) -> None:
    """Bias and rounding allowance of an affine op, whatever frame its coefficients are in."""
    b = op.bias(a)
    if b is not None and node.name not in walk.settled:
        b = b.expand(node.shape)
        size = None if walk.magnitude is None else op.bias_size(a)
        magnitude = None if size is None else walk.dot(node.name, a.abs(), size.expand(node.shape))
        walk.add_constant(walk.dot(node.name, a, b), magnitude, b.numel() + op.roundings)
    if walk.magnitude is not None and op.cost() > 0:
        # (fl(A W) - A W) z is at most gamma(fan_out) |A| (|W| |z|), and the constants' part: see `optrelax.rounding`.
        size, lost = absolute_terms(op, [walk.magnitude[name] for name in node.inputs])
        walk.allow(walk.dot(node.name, a.abs(), gamma(op.fan_out + op.roundings, a.dtype) * size + lost))
        for name in node.inputs:
            walk.allow_underflow(name, 2 * op.fan_out)


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
    if not network.entrance or region.as_box is None:
        return None
    *before, last = network.entrance
    center, radius = region.as_box.center, region.as_box.radius
    for node in before:
        assert node.affine
        center, radius = node.op.apply(center), node.op.apply_abs(radius)
    product = last.of(Linear)
    assert product is not None
    weight = product.weight(center)
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
    walk.add(node.inputs[0], relax(node, a, walk.lines_of(node), walk))


def relax(node: Node, a: Tensor, lines: Lines, walk: Rows) -> Tensor:
    """Coefficients of what an activation reads, in the frame of its value; lines: as rows in that frame see them."""
    if walk.upper is not None:
        assert lines.parallel, "one row gives both bounds between parallel lines only"
        pulled, low, high = band_step(a, lines)
        walk.add_constant(fold(low, walk), upper=fold(high, walk))
        return pulled
    pulled, constant = relax_step(a, lines)
    if walk.magnitude is None:
        walk.add_constant(fold(constant, walk))
        return pulled
    source, own = node.inputs[0], walk.lines_of(node)
    reach = torch.maximum(own.lower_intercept.abs(), own.upper_intercept.abs())
    size = walk.dot(node.name, a.abs(), reach + tiny(a.dtype))
    walk.add_constant(fold(constant, walk), size, math.prod(node.shape) + 8)
    walk.allow(2 * unit_roundoff(a.dtype) * walk.dot(node.name, pulled.abs(), walk.magnitude[source]))
    walk.allow_underflow(source, 1)
    return pulled


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
