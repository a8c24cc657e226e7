"""The columns and rows that a region, an activation's hull or its exact pieces are in a program."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.layers.affine_maps import AffineMaps, Array
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.graph import Network, Node
from optrelax.regions import Polyhedron, Region

if TYPE_CHECKING:
    import scipy.sparse as sp


class ProgramBuilder:
    """Columns and rows as they are added."""

    def __init__(self) -> None:
        self.columns: dict[str, slice] = {}
        self.blocks: dict[str, slice] = {}
        self.col_lower: list[Array] = []
        self.col_upper: list[Array] = []
        self.integer: list[Array] = []
        self.row_lower: list[Array] = []
        self.row_upper: list[Array] = []
        self.rows: list[Array] = []
        self.cols: list[Array] = []
        self.values: list[Array] = []
        self.width = self.height = 0

    def add_columns(self, name: str, lower: Tensor, upper: Tensor, integer: bool = False) -> slice:
        l, u = (t.detach().double().flatten().cpu().numpy() for t in (lower, upper))
        self.columns[name] = place = slice(self.width, self.width + len(l))
        self.col_lower.append(l)
        self.col_upper.append(u)
        self.integer.append(np.full(len(l), integer))
        self.width += len(l)
        return place

    def add_rows(self, lower: Array, upper: Array, terms: list[tuple[slice, sp.spmatrix | Array, Array]]) -> None:
        """Rows lower <= sum of terms <= upper; a term is (columns, values or matrix, which columns or rows)."""
        base = self.height
        for place, value, index in terms:
            if isinstance(value, np.ndarray):  # one entry a row, at column place.start + index
                keep = value != 0
                self.rows.append(base + np.arange(len(value))[keep])
                self.cols.append(place.start + index[keep])
                self.values.append(value[keep])
            else:
                coo = value.tocoo()
                self.rows.append(base + coo.row)
                self.cols.append(place.start + coo.col)
                self.values.append(coo.data)
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        self.height += len(lower)

    def matrix(self) -> sp.csc_matrix:
        """The rows' coefficients."""
        import scipy.sparse as sp

        if not self.row_lower:
            return sp.csc_matrix((0, self.width))
        entries = np.concatenate(self.values), (np.concatenate(self.rows), np.concatenate(self.cols))
        return sp.coo_matrix(entries, shape=(self.height, self.width)).tocsc()


def column_of(network: Network, name: str) -> str:
    return "input" if name == network.input else f"post:{name}"


def add_region(builder: ProgramBuilder, region: Region, hull: Polyhedron, integer: bool) -> None:
    """The input within the box, and the rows that cut the region out of it."""
    import scipy.sparse as sp

    box = region.box()
    x = builder.add_columns("input", box.lower[0], box.upper[0])
    if not len(hull.least):
        return
    y = builder.add_columns("region", hull.lower, hull.upper, integer=integer and hull.whole)
    A, B, least, greatest = (t.double().cpu().numpy() for t in hull[:4])
    every = np.arange(len(least))
    builder.add_rows(least, greatest, [(x, sp.csr_matrix(A), every), (y, sp.csr_matrix(B), every)])


def add_activation(builder: ProgramBuilder, maps: AffineMaps, node: Node, before: Bounds, integer: bool) -> None:
    activation = node.activation
    assert activation is not None
    l, u = (t.detach().double().flatten() for t in (before.lower, before.upper))
    n = math.prod(node.shape)
    z = builder.add_columns(f"pre:{node.name}", l, u)
    low, high = activation.image(l, u)
    y = builder.add_columns(f"post:{node.name}", low, high)
    everything = np.arange(n)
    matrices, constant = maps.preactivation(node)
    terms: list[tuple[slice, sp.spmatrix | Array, Array]] = [(z, np.ones(n), everything)]
    terms += [(builder.columns[column_of(maps.network, name)], -m, everything) for name, m in matrices.items()]
    builder.blocks[f"affine:{node.name}"] = slice(builder.height, builder.height + n)
    builder.add_rows(constant, constant, terms)
    crossing = activation.crossing(l, u)
    hull = activation.hull(l, u)
    stable = (~crossing).nonzero()[:, 0].cpu().numpy()
    if len(stable):
        slope, intercept = (t[~crossing].cpu().numpy() for t in hull.below[0])
        builder.add_rows(intercept, intercept, [(y, np.ones(len(stable)), stable), (z, -slope, stable)])
    index = crossing.nonzero()[:, 0].cpu().numpy()
    if not len(index):
        return
    for side, sign in ((hull.below, 1), (hull.above, -1)):
        first = None
        for line in side:
            s, c = (t[crossing].cpu().numpy() for t in line)
            # A side with one line states it twice.
            new = np.full(len(s), True) if first is None else (s != first[0]) | (c != first[1])
            first = (s, c)
            free, one = np.full(int(new.sum()), np.inf), np.ones(int(new.sum()))
            lower, upper = (c[new], free) if sign == 1 else (-free, c[new])
            builder.add_rows(lower, upper, [(y, one, index[new]), (z, -s[new], index[new])])
    if integer:
        assert activation.piecewise is not None
        _add_switches(builder, node, activation.piecewise, l[crossing], u[crossing], index, z, y)


def _add_switches(
    builder: ProgramBuilder,
    node: Node,
    activation: PiecewiseLinear,
    l: Tensor,
    u: Tensor,
    index: Array,
    z: slice,
    y: slice,
) -> None:
    """One binary a kink: 1 where z lies beyond it, with the tightest big-M of [l, u]."""
    count = len(index)
    switches = []
    for i, kink in enumerate(activation.kinks):
        low = (l >= kink).double()
        high = (u > kink).double()
        switches.append((kink, builder.add_columns(f"on{i + 1}:{node.name}", low, high, integer=True)))
    everything, free = np.arange(count), np.full(count, np.inf)
    one = np.ones(count)
    for i, (kink, on) in enumerate(switches):
        # z <= kink where off, z >= kink where on
        above = (u - kink).clamp_min(0).cpu().numpy()
        below = (kink - l).clamp_min(0).cpu().numpy()
        kinks = np.full(count, kink)
        builder.add_rows(-free, kinks, [(z, one, index), (on, -above, everything)])
        builder.add_rows(kinks - below, free, [(z, one, index), (on, -below, everything)])
        if i:
            builder.add_rows(np.zeros(count), free, [(switches[0][1], one, everything), (on, -one, everything)])
    # On each piece y equals the piece: the error of piece p elsewhere is at most its distance from the graph.
    for p, (slope, intercept) in enumerate(zip(activation.slopes, activation.intercepts, strict=True)):
        slopes = torch.full_like(l, slope)
        low, high = activation.band(slopes, l, u)
        over = (high - intercept).clamp_min(0).cpu().numpy()  # y - piece is at most this anywhere
        under = (intercept - low).clamp_min(0).cpu().numpy()
        base: list[tuple[slice, sp.spmatrix | Array, Array]] = [(y, one, index), (z, np.full(count, -slope), index)]
        # "off piece" = sum of the switches that leave it: on_p (to the right) and 1 - on_{p-1} (to the left)
        right = [(switches[p][1], 1.0)] if p < len(switches) else []
        left = [switches[p - 1][1]] if p > 0 else []
        constant = np.full(count, intercept)
        builder.add_rows(
            -free,
            constant + over * len(left),
            base + [(on, -over, everything) for on, _ in right] + [(on, over, everything) for on in left],
        )
        builder.add_rows(
            constant - under * len(left),
            free,
            base + [(on, under, everything) for on, _ in right] + [(on, -under, everything) for on in left],
        )
