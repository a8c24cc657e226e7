"""The explicit sparse LP (or MILP) of a network over one example's region, for HiGHS, MPS files and cvxpy.

Columns: the input, what else its region is made of, then for every activation its pre-activation z and its value y, all
with finite bounds. Rows: those of the region, then one equality z = W y' + b a neuron and the hull of each crossing
activation (or its exact piece where it is stable).
Every solver of the project that wants explicit data gets it from here, so that all see the same problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from optrelax.enclosures import Bounds
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.layers.affine_maps import AffineMaps, Array
from optrelax.layers.program_rows import ProgramBuilder, add_activation, add_region, column_of
from optrelax.layers.programs.highs_model import new_highs
from optrelax.networks.graph import Network
from optrelax.regions import Region, require_polyhedron

if TYPE_CHECKING:
    import scipy.sparse as sp


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
            c[:, self.columns[column_of(self.maps.network, name)]] = part.toarray()
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


def require_piecewise_linear(network: Network) -> None:
    """UnsupportedOpError where an activation is no part of a MILP."""
    problems = [
        Problem(node.path, op.name, "is not piecewise linear, so it has no MILP; take triangle or layerwise")
        for node in network
        if (op := node.activation) and not op.piecewise
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
    if region.shape[0] != 1:
        raise ValueError(f"export: takes one example, got a batch of {region.shape[0]}; use region.select")
    if integer:
        require_piecewise_linear(network)
    hull = require_polyhedron("export", region, "Triangle(solver=DualAscent()) takes any region")
    maps = maps or AffineMaps(network)
    wanted = network.ancestors(upto) if upto is not None else frozenset(n.name for n in network)
    nodes = [node for node in network.activations if node.name in wanted]
    builder = ProgramBuilder()
    add_region(builder, region, hull, integer)
    for node in nodes:
        before = preactivation[node.name]
        add_activation(builder, maps, node, before, integer)
    return NetworkLP(
        builder.matrix(),
        np.concatenate([np.zeros(0), *builder.row_lower]),
        np.concatenate([np.zeros(0), *builder.row_upper]),
        np.concatenate(builder.col_lower),
        np.concatenate(builder.col_upper),
        builder.columns,
        builder.blocks,
        np.concatenate(builder.integer),
        maps,
        network.output if upto is None else upto,
    )
