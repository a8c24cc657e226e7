"""The convolution that every path from the input leads through: rows end before it, where one matrix is faster."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.domains.frames import Frame
from optrelax.domains.window_values import each, fold, see
from optrelax.kernels.band_step import range_over_box
from optrelax.kernels.convolutions import pair
from optrelax.kernels.relax_step import least_over_box
from optrelax.kernels.sign_products import ends_through, pays
from optrelax.kernels.window_step import spread
from optrelax.networks.graph import Network, Node
from optrelax.networks.images import Conv2d
from optrelax.networks.ops import flatten_from

if TYPE_CHECKING:
    from optrelax.domains.row_walks import Rows


def entrance(network: Network) -> str | None:
    """The convolution that every path from the input leads through, behind diagonal ops alone."""
    name = network.input
    while len(reading := network.readers.get(name, ())) == 1:
        node = reading[0]
        if node.of(Conv2d):
            return node.name
        if not node.affine or not node.affine.diagonal or node.shape != network.input_shape:
            break
        name = node.name
    return None


def enter(op: Conv2d, node: Node, a: Tensor, frame: Frame, walk: Rows) -> bool:
    """Rows end in the box before the first convolution, unrolled to one matrix, where that is the faster way."""
    g, region = op.geometry, walk.region
    assert region is not None
    before = frame.back(op.kernel, g)
    m, n = math.prod(a.shape[2:]), op.input_shapes[0][0] * before.size[0] * before.size[1]
    # A row of the kernel fills vectors of 16 numbers.
    lanes = -(-op.kernel[1] * op.input_shapes[0][0] // 16) * 16
    if frame.whole or g.groups > 1 or m * n > 2 * m * op.kernel[0] * lanes:
        return False
    center, radius = region.center, region.radius
    for name in _before(node, walk):
        diagonal = walk.network[name].affine
        assert diagonal is not None
        center, radius = diagonal.apply(center), diagonal.apply_abs(radius)
    before = Frame(pair(op.input_shapes[0][1:]), before.size, before.stride, before.offset)
    c, r = (flatten_from(see(t, before, walk), 1) for t in (center, radius))
    eye = torch.eye(m, dtype=a.dtype, device=a.device).reshape(m, *a.shape[2:])
    weight = spread(eye, op.weight(a), g, (0, 0), before.size).flatten(1)
    rows = flatten_from(each(a, c.shape[0]), 2)
    if pays(rows.shape[1], weight, c, r) and rows.shape[0] == c.shape[0]:
        middle, width = ends_through(rows, weight, c, r)
        low, high = middle - width, middle + width
    elif walk.upper is not None:
        low, high = range_over_box(rows @ weight, c - r, c + r)
    else:
        low = high = least_over_box(rows @ weight, c - r, c + r)
    walk.add_constant(fold(low, walk), upper=fold(high, walk))
    return True


def _before(node: Node, walk: Rows) -> list[str]:
    """The diagonal ops from the input on to a node."""
    found: list[str] = []
    name = node.inputs[0]
    while name != walk.network.input:
        found.insert(0, name)
        name = walk.network[name].inputs[0]
    return found
