"""Rows as windows: the rules by which back-substitution acts on small images, one a place, that grow on their way.

Positions of a map share their weights, so places are examples: lines, biases and the box are cut into windows, one a
place, zero beyond the edges, and the rows of a place, one or two a channel, are pulled through the same products. Which
window is seen where is planned beforehand (`frames`). Coefficients are [examples, k, high, wide, channels], examples
those of the batch times the places, or 1 while all share them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.balls import absolute_terms
from optrelax.domains.entrances import enter
from optrelax.domains.frames import Frame
from optrelax.domains.lines import Lines
from optrelax.domains.rules import rule
from optrelax.domains.window_values import adapt, dot, each, fold, see
from optrelax.kernels.band_step import band_step
from optrelax.kernels.convolutions import ConvGeometry
from optrelax.kernels.relax_step import relax_step
from optrelax.kernels.window_step import spread
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Node
from optrelax.networks.images import AveragePool2d, Conv2d
from optrelax.networks.ops import Add, Affine, Scale
from optrelax.networks.views import Concatenate
from optrelax.rounding import gamma, tiny, unit_roundoff

if TYPE_CHECKING:
    from optrelax.domains.row_walks import Rows


class Windows:
    """The domain of the rules here."""


def _send(walk: Rows, name: str, a: Tensor, seen: Frame) -> None:
    """Hand coefficients to a node in the frame that it expects."""
    wanted = walk.frames.get(name, "rows")
    walk.join(name, adapt(a, seen, wanted, walk))


def _settle(op: Affine, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    """Bias and rounding allowance of an affine op."""
    b = op.bias(a)
    if b is not None and node.name not in walk.settled:
        seen = see(b.expand(node.shape), frame, walk)
        size = None if walk.magnitude is None else op.bias_size(a)
        magnitude = None if size is None else dot(a.abs(), see(size.expand(node.shape), frame, walk), walk)
        walk.add_constant(dot(a, seen, walk), magnitude, b.numel() + op.roundings)
    if walk.magnitude is not None and op.cost() > 0:
        # As for rows: (fl(A W) - A W) z is at most gamma(fan_out) |A| (|W| |z|), and the constants' part.
        size, lost = absolute_terms(op, [walk.magnitude[name] for name in node.inputs])
        total = gamma(op.fan_out + op.roundings, a.dtype) * size + lost
        walk.allow(dot(a.abs(), see(total, frame, walk), walk))
        for name in node.inputs:
            walk.allow_underflow(name, 2 * op.fan_out)


def _cleaned(a: Tensor, frame: Frame, walk: Rows) -> Tensor:
    """Zeros where the window leaves the map: what lies there is no value of the op before."""
    if frame.clean or frame.inside(walk.grid):
        return a
    mask = see(a.new_ones(1, 1, *frame.image), frame, walk)[:, None]
    if a.shape[0] > mask.shape[0]:
        return (a.unflatten(0, (-1, mask.shape[0])) * mask).flatten(0, 1)
    return a * mask


@rule(Conv2d, domain=Windows)
def _convolution(op: Conv2d, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    _settle(op, node, a, frame, walk)
    a = _cleaned(a, frame, walk)
    if node.name == walk.entrance and walk.region is not None and enter(op, node, a, frame, walk):
        return
    _pull(op.weight(a), op.kernel, op.geometry, node, a, frame, walk)


def _pull(
    weight: Tensor, kernel: tuple[int, int], g: ConvGeometry, node: Node, a: Tensor, frame: Frame, walk: Rows
) -> None:
    """Rows through the transpose of a convolution; whole images are cut at the edges at once."""
    name = node.inputs[0]
    before = frame.back(kernel, g)
    corner, size = (0, 0), before.size
    shape = walk.network.shape_of(name)
    image = shape[1], shape[2]
    reach = None
    if frame.whole:
        # Pixels of the image that no window reads lie beyond what the transpose gives.
        size = tuple(min(n, m - p) for n, m, p in zip(image, before.size, g.padding, strict=True))  # type: ignore[assignment]
        corner, reach = (g.padding[0], g.padding[1]), [n - m for n, m in zip(image, size, strict=True)]
    pulled = spread(a.flatten(0, 1), weight, g, corner, size).unflatten(0, a.shape[:2])
    if reach and any(reach):
        pulled = F.pad(pulled, (0, 0, 0, reach[1], 0, reach[0]))
    seen = Frame(image, size, before.stride, before.offset, clean=False)
    if frame.whole:
        seen = Frame(image, image, (0, 0), (0, 0), whole=True)
    _send(walk, name, pulled, seen)


@rule(AveragePool2d, domain=Windows)
def _average(op: AveragePool2d, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    _settle(op, node, a, frame, walk)
    a = _cleaned(a, frame, walk)
    count = op.counts(a)
    if count.dim() == 0:
        a = a / count
    else:  # beyond the edges there is nothing, and nothing to divide by
        seen = see(count.expand(node.shape), frame, walk)[:, None]
        seen = torch.where(seen == 0, 1.0, seen)
        a = (a.unflatten(0, (-1, seen.shape[0])) / seen).flatten(0, 1) if a.shape[0] > 1 else a / seen
    ones = a.new_ones(node.shape[0], 1, *op.kernel)
    _pull(ones, op.kernel, op.geometry, node, a, frame, walk)


@rule(Scale, domain=Windows)
def _scale(op: Scale, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    _settle(op, node, a, frame, walk)
    factor = op.factor(a)
    if factor is not None:
        wide = factor.reshape(*[1] * (3 - factor.dim()), *factor.shape)
        if wide.shape[1:] == (1, 1):
            a = a * wide[:, 0, 0]
        else:
            seen = see(wide.expand(node.shape), frame, walk)[:, None]
            a = (a.unflatten(0, (-1, seen.shape[0])) * seen).flatten(0, 1) if a.shape[0] > 1 else a * seen
    _send(walk, node.inputs[0], a, frame)


@rule(Add, domain=Windows)
def _add(op: Add, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    _settle(op, node, a, frame, walk)
    for name, sign in zip(node.inputs, op.signs, strict=True):
        _send(walk, name, a if sign == 1 else -a, frame)


@rule(Concatenate, domain=Windows)
def _concatenate(op: Concatenate, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    _settle(op, node, a, frame, walk)
    for name, part in zip(node.inputs, a.split(op.sizes, -1), strict=True):
        _send(walk, name, part, frame)


@rule(Activation, domain=Windows)
def _activation(op: Activation, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    lines = walk.lines_of(node)
    source = node.inputs[0]
    given = _with_bias(lines, source, a, walk)
    once: dict[int, Tensor] = {}
    for t in given:
        if id(t) not in once:
            once[id(t)] = see(t, frame, walk)
    around = Lines(*(once[id(t)] for t in given))
    a = each(a, around.lower_slope.shape[0])
    if walk.upper is not None:
        assert lines.parallel, "one row gives both bounds between parallel lines only"
        pulled, low, high = band_step(a, around)
        walk.add_constant(fold(low, walk), upper=fold(high, walk))
        _send(walk, source, pulled, frame)
        return
    pulled, constant = relax_step(a, around)
    if walk.magnitude is not None:
        reach = torch.maximum(lines.lower_intercept.abs(), lines.upper_intercept.abs())
        size = dot(a.abs(), see(reach + tiny(a.dtype), frame, walk), walk)
        walk.add_constant(fold(constant, walk), size, math.prod(node.shape) + 8)
        seen = see(walk.magnitude[source], frame, walk)
        walk.allow(2 * unit_roundoff(a.dtype) * dot(pulled.abs(), seen, walk))
        walk.allow_underflow(source, 1)
    else:
        walk.add_constant(fold(constant, walk))
    _send(walk, source, pulled, frame)


def _with_bias(lines: Lines, source: str, a: Tensor, walk: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lines in the value that the op before gives without its bias, where nobody else reads it; to nearest only.

    s (z + b) + t = s z + (s b + t): a map's worth of work instead of one more pass over the rows.
    """
    ls, li, us, ui = lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept
    network = walk.network
    if walk.magnitude is not None or source == network.input or len(network.readers[source]) > 1:
        return ls, li, us, ui
    op = network[source].affine
    b = op.bias(a) if op else None
    if b is None:
        return ls, li, us, ui
    walk.settled.add(source)
    return ls, li + ls * b, us, ui + us * b
