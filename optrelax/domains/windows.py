"""Rows as windows: the rules by which back-substitution acts on small images, one a place, that grow on their way.

Positions of a map share their weights, so places are examples: lines, biases and the box are cut into windows, one a
place, zero beyond the edges, and the rows of a place, one or two a channel, are pulled through the same products. Which
window is seen where is planned beforehand (`frames`). Coefficients are [examples, k, high, wide, channels], examples
those of the batch times the places, or 1 while all share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.entrances import enter
from optrelax.domains.frames import Frame
from optrelax.domains.lines import Lines
from optrelax.domains.row_rules import relax, settle
from optrelax.domains.rules import rule
from optrelax.domains.window_values import each, see
from optrelax.kernels.convolutions import ConvGeometry, pair
from optrelax.kernels.window_step import spread
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Node
from optrelax.networks.images import AveragePool2d, Conv2d
from optrelax.networks.ops import Add, Scale
from optrelax.networks.views import Concatenate

if TYPE_CHECKING:
    from optrelax.domains.row_walks import Rows


class Windows:
    """The domain of the rules here."""


def _cleaned(a: Tensor, frame: Frame, walk: Rows) -> Tensor:
    """Zeros where the window leaves the map: what lies there is no value of the op before."""
    if frame.clean or frame.inside(walk.grid):
        return a
    return _by_place(torch.mul, a, see(a.new_ones(1, 1, *frame.image), frame, walk))


def _by_place(change: Callable[[Tensor, Tensor], Tensor], a: Tensor, seen: Tensor) -> Tensor:
    """`change` of rows and what their places see, [places, high, wide, channels], the same in every example."""
    seen = seen[:, None]
    if a.shape[0] > seen.shape[0]:
        return change(a.unflatten(0, (-1, seen.shape[0])), seen).flatten(0, 1)
    return change(a, seen)


@rule(Conv2d, domain=Windows)
def _convolution(op: Conv2d, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    settle(op, node, a, walk)
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
        size = pair(min(n, m - p) for n, m, p in zip(image, before.size, g.padding, strict=True))
        corner, reach = (g.padding[0], g.padding[1]), [n - m for n, m in zip(image, size, strict=True)]
    pulled = spread(a.flatten(0, 1), weight, g, corner, size).unflatten(0, a.shape[:2])
    if reach and any(reach):
        pulled = F.pad(pulled, (0, 0, 0, reach[1], 0, reach[0]))
    seen = Frame(image, size, before.stride, before.offset, clean=False)
    if frame.whole:
        seen = Frame(image, image, (0, 0), (0, 0), whole=True)
    walk.add(name, pulled, seen)


@rule(AveragePool2d, domain=Windows)
def _average(op: AveragePool2d, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    settle(op, node, a, walk)
    a = _cleaned(a, frame, walk)
    count = op.counts(a)
    if count.dim() == 0:
        a = a / count
    else:  # beyond the edges there is nothing, and nothing to divide by
        seen = see(count.expand(node.shape), frame, walk)
        a = _by_place(torch.div, a, torch.where(seen == 0, 1.0, seen))
    ones = a.new_ones(node.shape[0], 1, *op.kernel)
    _pull(ones, op.kernel, op.geometry, node, a, frame, walk)


@rule(Scale, domain=Windows)
def _scale(op: Scale, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    settle(op, node, a, walk)
    factor = op.factor(a)
    if factor is not None:
        wide = factor.reshape(*[1] * (3 - factor.dim()), *factor.shape)
        if wide.shape[1:] == (1, 1):
            a = a * wide[:, 0, 0]
        else:
            a = _by_place(torch.mul, a, see(wide.expand(node.shape), frame, walk))
    walk.add(node.inputs[0], a, frame)


@rule(Add, domain=Windows)
def _add(op: Add, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    settle(op, node, a, walk)
    for name, sign in zip(node.inputs, op.signs, strict=True):
        walk.add(name, a if sign == 1 else -a, frame)


@rule(Concatenate, domain=Windows)
def _concatenate(op: Concatenate, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    settle(op, node, a, walk)
    for name, part in zip(node.inputs, a.split(op.sizes, -1), strict=True):
        walk.add(name, part, frame)


@rule(Activation, domain=Windows)
def _activation(op: Activation, node: Node, a: Tensor, frame: Frame, walk: Rows) -> None:
    source = node.inputs[0]
    given = _with_bias(walk.lines_of(node), source, a, walk)
    once: dict[int, Tensor] = {}
    for t in given:
        if id(t) not in once:
            once[id(t)] = see(t, frame, walk)
    around = Lines(*(once[id(t)] for t in given))
    pulled = relax(node, each(a, around.lower_slope.shape[0]), around, walk)
    walk.add(source, pulled, frame)


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
