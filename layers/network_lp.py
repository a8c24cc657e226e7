"""The explicit sparse LP (or MILP) of a network over one example's region, for HiGHS, MPS files and cvxpy.

Columns: the input, what else its region is made of, then for every activation its pre-activation z and its value y, all
with finite bounds. Rows: those of the region, then one equality z = W y' + b a neuron and the hull of each crossing
activation (or its exact piece where it is stable).
Every solver of the project that wants explicit data gets it from here, so that all see the same problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from optrelax.domains.backsubstitution import pull
from optrelax.enclosures import Bounds
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.layers.programs.highs_model import new_highs
from optrelax.networks.activations import Activation, PiecewiseLinear
from optrelax.networks.graph import Network, Node
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import flatten_from
from optrelax.regions import Polyhedron, Region, require_polyhedron
from optrelax.relaxations import identity_rows

if TYPE_CHECKING:
    import scipy.sparse as sp

Array = np.ndarray
_NO_PRODUCTS = "a program of rows takes no product of two values; crown, alpha-crown, triangle and layerwise do"


@dataclass(frozen=True)
class NetworkLP:
    """min (or max) c.v + offset subject to row_lower <= A v <= row_upper, col_lower <= v <= col_upper.

    `columns` maps "input", "region" (numbers of the region's own, where it has any), "pre:NODE" and "post:NODE" (and
    "on:NODE", "on2:NODE" in a MILP) to their slice of v.
    `rows` maps "affine:NODE" to the equalities z = W y' + b of one activation's pre-activation; what follows each
    block are the rows of that activation's hull.  `integer` marks binary columns; none in an LP.
    `target`: the node whose value objectives are about.
    """

    matrix: sp.csc_matrix
    row_lower: Array
    row_upper: Array
    col_lower: Array
    col_upper: Array
    columns: Mapping[str, slice]
    rows: Mapping[str, slice]
    integer: Array
    maps: AffineMaps
    target: str

    def objective(self, rows: Tensor) -> tuple[Array, Array]:
        """Coefficients [k, columns] and offsets [k] of rows [k, *shape] of the target's value."""
        parts, offset = self.maps.pull(self.target, rows[None])
        c = np.zeros((rows.shape[0], len(self.col_lower)))
        for name, part in parts.items():
            c[:, self.columns[_column(self.maps.network, name)]] = part.toarray()
        return c, offset

    def write_mps(self, path: str | Path, rows: Tensor) -> None:
        """Write the problem of one row [1, *output_shape] as an MPS file (through HiGHS)."""
        import highspy

        c, offset = self.objective(rows)
        if len(c) != 1:
            raise ValueError(f"write_mps: one row makes one problem, got {len(c)}")
        solver = new_highs()
        solver.passModel(self.highs_model(c[0], float(offset[0])))
        if solver.writeModel(str(path)) == highspy.HighsStatus.kError:
            raise OSError(f"write_mps: HiGHS could not write {path}; use a name that ends in .mps")

    def highs_model(self, c: Array, offset: float = 0.0) -> object:
        """The problem as a `highspy.HighsLp`, arrays passed whole."""
        import highspy

        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.col_lower), len(self.row_lower)
        model.col_cost_, model.offset_ = c, offset
        model.col_lower_, model.col_upper_ = self.col_lower, self.col_upper
        model.row_lower_, model.row_upper_ = self.row_lower, self.row_upper
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_ = self.matrix.indptr
        model.a_matrix_.index_ = self.matrix.indices
        model.a_matrix_.value_ = self.matrix.data
        if self.integer.any():
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            model.integrality_ = [kinds[int(i)] for i in self.integer]
        return model


def _column(network: Network, name: str) -> str:
    return "input" if name == network.input else f"post:{name}"


class AffineMaps:
    """The affine map from the values behind it to every pre-activation, as sparse matrices: shared by all examples."""

    def __init__(self, network: Network) -> None:
        require_lowered(network)
        self.network = network
        self._stops = frozenset(node.name for node in network.activations)
        self._maps: dict[str, tuple[dict[str, sp.csr_matrix], Array]] = {}

    def preactivation(self, node: Node) -> tuple[dict[str, sp.csr_matrix], Array]:
        """Matrices [n, entries of the source] by source node, and the constant [n], of one pre-activation."""
        if node.name not in self._maps:
            source = node.inputs[0]
            shape = self.network.shape_of(source)
            eye = identity_rows(shape, _float64(self.network))
            self._maps[node.name] = self.pull(source, eye)
        return self._maps[node.name]

    def pull(self, target: str, rows: Tensor) -> tuple[dict[str, sp.csr_matrix], Array]:
        """Rows [1, k, *shape] of a node's value as matrices on the values of activations and input behind it."""
        import scipy.sparse as sp

        with torch.no_grad():
            if target in self._stops or target == self.network.input:
                return {target: sp.csr_matrix(flatten_from(rows[0], 1).cpu().numpy())}, np.zeros(rows.shape[1])
            walk = pull(self.network, target, rows.double(), 1, {}, stop=self._stops)
            parts = dict(walk.stops)
            if self.network.input in walk.pending:
                parts[self.network.input] = walk.pending[self.network.input]
            matrices = {name: sp.csr_matrix(flatten_from(a[0], 1).cpu().numpy()) for name, a in parts.items()}
            return matrices, walk.constant[0].cpu().numpy()


def _float64(network: Network) -> Tensor:
    parameter = next(network.module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return torch.zeros((), dtype=torch.float64, device=device)


def require_lowered(network: Network) -> None:
    """UnsupportedOpError where an op has no rows: a product, or a maximum: `network.lowered` has ReLUs for it."""
    if network.products:
        raise UnsupportedOpError([Problem(node.path, "Multiply", _NO_PRODUCTS) for node in network.products])
    problems = [
        Problem(node.path, type(node.op).__name__, "has no LP formulation; take network.lowered")
        for node in network
        if isinstance(node.op, Greatest)
    ]
    if problems:
        raise UnsupportedOpError(problems, "affine ops and activations")


def require_piecewise_linear(network: Network) -> None:
    """UnsupportedOpError where an activation is no part of a MILP."""
    problems = [
        Problem(node.path, node.op.name, "is not piecewise linear, so it has no MILP; take triangle or layerwise")
        for node in network
        if isinstance(node.op, Activation) and not isinstance(node.op, PiecewiseLinear)
    ]
    if problems:
        raise UnsupportedOpError(problems, "affine ops and piecewise-linear activations")


def shared(network: Network, bounds: Mapping[str, Bounds]) -> dict[str, Bounds]:
    """Of the pre-activation bounds of `network.lowered` those that the network itself has."""
    return {node.name: bounds[node.name] for node in network.activations}


def export(
    network: Network,
    region: Region,
    preactivation: Mapping[str, Bounds],
    *,
    integer: bool = False,
    upto: str | None = None,
    maps: AffineMaps | None = None,
) -> NetworkLP:
    """The triangle LP of one example, or with integer=True the exact MILP.

    region: a batch of one.  preactivation: activation node -> bounds [1, *shape], all finite.
    upto: the node that objectives are about (for layerwise LPs), with only the activations that it depends on;
    None: the output, with all of the network.
    Exact: a MILP in exact arithmetic; the LP is its hull relaxation neuron by neuron.
    Source: Ehlers 2017; Salman et al. 2019.  Raises ValueError for a batch other than one.
    """
    import scipy.sparse as sp

    if region.shape[0] != 1:
        raise ValueError(f"export: takes one example, got a batch of {region.shape[0]}; use region.select")
    if integer:
        require_piecewise_linear(network)
    hull = require_polyhedron("export", region, "Triangle(solver=DualAscent()) takes any region")
    maps = maps or AffineMaps(network)
    wanted = network.ancestors(upto) if upto is not None else frozenset(n.name for n in network)
    nodes = [node for node in network.activations if node.name in wanted]
    builder = _Builder()
    _export_region(builder, region, hull, integer)
    for node in nodes:
        before = preactivation[node.name]
        _export_activation(builder, maps, node, before, integer)
    rows = len(builder.row_lower)
    matrix = (
        sp.coo_matrix(
            (np.concatenate(builder.values), (np.concatenate(builder.rows), np.concatenate(builder.cols))),
            shape=(builder.height, builder.width),
        ).tocsc()
        if rows
        else sp.csc_matrix((0, builder.width))
    )
    return NetworkLP(
        matrix,
        np.concatenate(builder.row_lower) if rows else np.zeros(0),
        np.concatenate(builder.row_upper) if rows else np.zeros(0),
        np.concatenate(builder.col_lower),
        np.concatenate(builder.col_upper),
        builder.columns,
        builder.blocks,
        np.concatenate(builder.integer),
        maps,
        network.output if upto is None else upto,
    )


class _Builder:
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


def _export_region(builder: _Builder, region: Region, hull: Polyhedron, integer: bool) -> None:
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


def _export_activation(builder: _Builder, maps: AffineMaps, node: Node, before: Bounds, integer: bool) -> None:
    activation = node.op
    assert isinstance(activation, Activation)
    l, u = (t.detach().double().flatten() for t in (before.lower, before.upper))
    n = math.prod(node.shape)
    z = builder.add_columns(f"pre:{node.name}", l, u)
    low, high = activation.image(l, u)
    y = builder.add_columns(f"post:{node.name}", low, high)
    everything = np.arange(n)
    matrices, constant = maps.preactivation(node)
    terms: list[tuple[slice, sp.spmatrix | Array, Array]] = [(z, np.ones(n), everything)]
    terms += [(builder.columns[_column(maps.network, name)], -m, everything) for name, m in matrices.items()]
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
        assert isinstance(activation, PiecewiseLinear)
        _export_switches(builder, node, activation, l[crossing], u[crossing], index, z, y)


def _export_switches(
    builder: _Builder,
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
