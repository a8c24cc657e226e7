"""Bounds before the second of two convolutions, patch by patch: a neuron there reads a small window of the input.

Rows for all neurons of a map, pulled back as images, are mostly zeros. All positions share their weights: seen from
one of them, two convolutions with an activation between are a small fully connected network on the patch of the input
that it reads, the same one everywhere. So positions are examples: the activation's lines and the box are cut into
windows, and the rows, one or two a channel, go through one matrix. The same bounds, to rounding, as by
`backsubstitution`, for a tenth of the multiply-adds, in matrix products instead of transposed convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.domains.lines import Lines
from optrelax.kernels.band_step import band_step, range_over_box
from optrelax.kernels.relax_step import least_over_box, relax_step
from optrelax.kernels.sign_products import ends_through, pays
from optrelax.memory import Pull
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import Affine, Conv2d
from optrelax.regions import InputBox


@dataclass(frozen=True, slots=True)
class Patches:
    """Two convolutions, `outer` behind an activation behind `inner`, which reads the input through diagonal ops."""

    outer: Conv2d
    activation: str
    inner: Conv2d
    before: tuple[Affine, ...]

    @property
    def field(self) -> tuple[int, int]:
        """What a value of `outer` sees of the input."""
        window, strides, kernel = self.outer.kernel, self.inner.geometry.stride, self.inner.kernel
        high, wide = ((w - 1) * s + k for w, s, k in zip(window, strides, kernel, strict=True))
        return high, wide

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Positions, numbers in a window and in its field."""
        c, f = self.inner.shape[0], self.inner.input_shapes[0][0]
        return math.prod(self.outer.shape[1:]), c * math.prod(self.outer.kernel), f * math.prod(self.field)

    def pull(self, batch: int) -> Pull:
        """Numbers that one row of one position takes."""
        _, m, n = self.sizes
        return Pull(batch * (m + n), batch * (m + n))


def find(network: Network, source: str) -> Patches | None:
    """The two convolutions that end in node `source`, if that is how it comes from the input."""
    outer = _at(network, source)
    between = None if outer is None else _at(network, outer.inputs[0])
    inner = None if between is None else _at(network, between.inputs[0])
    if outer is None or between is None or inner is None or not isinstance(between.op, Activation):
        return None
    if not isinstance(outer.op, Conv2d) or not isinstance(inner.op, Conv2d):
        return None
    if any(op.geometry.groups > 1 or op.geometry.dilation != (1, 1) for op in (outer.op, inner.op)):
        return None
    before: list[Affine] = []
    name = inner.inputs[0]
    while name != network.input:
        node = network[name]
        if not isinstance(node.op, Affine) or not node.op.diagonal or len(node.inputs) > 1:
            return None
        before.insert(0, node.op)
        name = node.inputs[0]
    return Patches(outer.op, between.name, inner.op, tuple(before))


def _at(network: Network, name: str) -> Node | None:
    return None if name == network.input else network[name]


def ends(found: Patches, region: InputBox, lines: Lines, one_row: bool) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of every value of `outer`, [batch, *shape] each, by the lines of the activation.

    one_row: the lines are parallel, and one row gives both.
    Sound: yes, for sound lines, to nearest.  Gradient: exact, to any order, in weights, lines and region.
    """
    outer, inner = found.outer.geometry, found.inner.geometry
    center, radius = region.center, region.radius
    for op in found.before:
        center, radius = op.apply(center), op.absolute(radius)
    weight = found.outer.weight(center)
    rows = weight.flatten(1)[None]
    # What lies beyond an edge is 0: lines without slope and height there, and a box of one point.
    shift = [p * s + q for p, s, q in zip(outer.padding, inner.stride, inner.padding, strict=True)]
    step = [s * t for s, t in zip(outer.stride, inner.stride, strict=True)]
    c, r = (_windows(t, found.field, shift, step) for t in (center, radius))
    given = (lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept)
    near = {id(t): _windows(t, found.outer.kernel, outer.padding, outer.stride) for t in given}
    around = Lines(*(near[id(t)] for t in given))
    if one_row:
        a, low, high = band_step(rows, around)
    else:
        a, low = relax_step(torch.cat([rows, -rows], 1), around)
        high = low
    bias = found.inner.bias(center)
    if bias is not None:
        added = a @ bias.expand(-1, *found.outer.kernel).flatten()
        low, high = low + added, high + added
    last_low, last_high = _through(a, _unrolled(found, center), c, r, one_row)
    low, high = low + last_low, high + last_high
    if not one_row:
        low, high = low[:, : rows.shape[1]], -low[:, rows.shape[1] :]
    own = found.outer.bias(center)
    batch, shape = region.shape[0], (region.shape[0], found.sizes[0], rows.shape[1])
    both = [t.reshape(shape).mT.reshape(batch, *found.outer.shape) for t in (low, high)]
    low, high = both if own is None else (t + own for t in both)
    return low, high


def _through(a: Tensor, weight: Tensor, center: Tensor, radius: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """Least and greatest value of rows a W over boxes; the greatest only if asked for."""
    if pays(a.shape[1], weight, center, radius):
        middle, spread = ends_through(a, weight, center, radius)
        return middle - spread, middle + spread
    pulled = a @ weight
    if both:
        return range_over_box(pulled, center - radius, center + radius)
    low = least_over_box(pulled, center - radius, center + radius)
    return low, low


def _unrolled(found: Patches, like: Tensor) -> Tensor:
    """The inner convolution from a field to a window as a matrix, transposed: [window, field]."""
    channels, high, wide = found.inner.shape[0], *found.outer.kernel
    m = channels * high * wide
    eye = torch.eye(m, dtype=like.dtype, device=like.device).reshape(m, channels, high, wide)
    return F.conv_transpose2d(eye, found.inner.weight(like), stride=found.inner.geometry.stride).flatten(1)


def _windows(t: Tensor, size: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> Tensor:
    """[batch, c, h, w] -> [batch * positions, c * size], zeros beyond the edges."""
    if t.shape[0] == 0:
        return t.new_empty(0, t.shape[1] * math.prod(size))
    return F.unfold(t, tuple(size), padding=tuple(padding), stride=tuple(stride)).mT.flatten(0, 1)
