"""Gomory's mixed-integer cuts at the root: rows that integer points satisfy and the relaxation's vertex does not.

At a vertex with the basic variables z_B and the nonbasic ones at distances t >= 0 from their ends, an integer variable
that is basic and fractional reads x = x* - sum_j a_j t_j. With f = frac(x*), every integer point satisfies

    sum_j g_j t_j >= 1,   g_j = min(frac(a_j) / f, (1 - frac(a_j)) / (1 - f)) where t_j is an integer,
                          g_j = max(a_j / f, -a_j / (1 - f)) elsewhere.

Source: Gomory 1960, "An algorithm for the mixed integer problem"; Conforti, Cornuejols & Zambelli 2014, section 5.3.
Computed in float64, so a cut holds to rounding: cuts shape gradients here, never bounds.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from optrelax.layers.programs.highs_model import Array, Model
from optrelax.layers.programs.lp_data import LPData, stack_rows
from optrelax.layers.solutions import Status

Mask = NDArray[np.bool_]

_FRACTION = 0.01  # a variable nearer to an integer gives a cut of large coefficients
_RANGE = 1e6  # cuts whose coefficients differ by more are left out
_VIOLATED = 1e-6  # least violation, relative to the cut's length


def root_cuts(data: LPData, integer: Mask, rounds: int) -> tuple[Float[Tensor, "B cuts n"], Float[Tensor, "B cuts"]]:
    """(G, h) with G x <= h for every integer point; rows 0 x <= inf fill up.  Data on the CPU in float64.

    Each round adds a cut for every fractional basic variable of the strengthened relaxation's vertex; a problem is done
    where that is integer.
    """
    found = [_problem(data.select(slice(i, i + 1)), integer, rounds) for i in range(data.size[0])]
    most = max((len(h) for _, h in found), default=0)
    G, h = data.c.new_zeros(len(found), most, data.size[1]), data.c.new_full((len(found), most), torch.inf)
    for i, (rows, sides) in enumerate(found):
        G[i, : len(sides)], h[i, : len(sides)] = torch.from_numpy(rows), torch.from_numpy(sides)
    return G, h


def _problem(data: LPData, integer: Mask, rounds: int) -> tuple[Array, Array]:
    """The cuts of one problem."""
    from scipy.sparse import csc_matrix

    n = data.size[1]
    M = stack_rows(*(part if part.dim() == 2 else part[0] for part in (data.A, data.E))).numpy()
    low = np.concatenate([np.full(data.size[2], -np.inf), data.d[0].numpy()])
    high = torch.cat([data.b[0], data.d[0]]).numpy()
    lower, upper = data.lower[0].numpy(), data.upper[0].numpy()
    G, h = np.zeros((0, n)), np.zeros(0)
    for _ in range(rounds):
        rows = np.concatenate([M, G])
        ends = np.concatenate([low, np.full(len(h), -np.inf)]), np.concatenate([high, h])
        model = Model(1, None)
        model.load(csc_matrix(rows), *ends, lower, upper)
        run = model.solve(data.c[0].numpy())
        if run.status != Status.OPTIMAL:
            break
        vertex = _Vertex(model, rows, ends, (lower, upper), run.primal)
        new = [cut for i in np.flatnonzero(integer) if (cut := vertex.cut(int(i), integer)) is not None]
        if not new:
            break
        G = np.concatenate([G, [row for row, _ in new]])
        h = np.concatenate([h, [side for _, side in new]])
    return G, h


class _Vertex:
    """A basic solution of M x - a = 0 in the variables z = (x, a), a the rows' activities."""

    def __init__(
        self, model: Model, M: Array, row_ends: tuple[Array, Array], ends: tuple[Array, Array], x: Array
    ) -> None:
        rows = len(M)
        basis, kind = model.highs.getBasis(), model.api.HighsBasisStatus
        status = [*basis.col_status, *basis.row_status]
        at_upper = np.array([s == kind.kUpper for s in status])
        self.basic = np.array([s == kind.kBasic for s in status])
        low, high = (np.concatenate(pair) for pair in zip(ends, row_ends, strict=True))
        self.end, self.sign = np.where(at_upper, high, low), np.where(at_upper, -1.0, 1.0)
        self.fixed = low == high
        self.x, self.M = x, M
        self.table = np.concatenate([M, -np.eye(rows)], 1)
        self.order = np.flatnonzero(self.basic)
        square = self.table[:, self.basic]
        good = square.shape[0] == square.shape[1] and bool(np.isfinite(self.end[~self.basic & ~self.fixed]).all())
        self.inverse: Array | None = None
        if good and rows:
            with contextlib.suppress(np.linalg.LinAlgError):
                self.inverse = np.linalg.inv(square)

    def cut(self, i: int, integer: Mask) -> tuple[Array, float] | None:
        """(g, h) of g.x <= h from the row of x_i; None where that is not basic, not fractional, or gives a poor cut."""
        n = len(self.x)
        f = self.x[i] - np.floor(self.x[i])
        if self.inverse is None or not self.basic[i] or not _FRACTION < f < 1 - _FRACTION:
            return None
        row = self.inverse[int(np.searchsorted(self.order, i))] @ self.table
        free = ~self.basic & ~self.fixed
        a = np.where(free, row * self.sign, 0.0)
        whole = np.zeros(len(a), dtype=bool)
        whole[:n] = integer & (self.end[:n] == np.round(self.end[:n]))
        part = a - np.floor(a)
        weight = np.where(whole, np.minimum(part / f, (1 - part) / (1 - f)), np.maximum(a / f, -a / (1 - f)))
        weight = np.where(free, weight, 0.0) * self.sign
        # sum_j weight_j (z_j - end_j) >= 1, with the rows' activities written in x.
        g = -(weight[:n] + weight[n:] @ self.M)
        h = -1 - float(weight[free] @ self.end[free])
        size = np.abs(g[np.abs(g) > 1e-12])
        if not len(size) or size.max() > _RANGE * size.min() or g @ self.x - h < _VIOLATED * np.linalg.norm(g):
            return None
        return g, h
