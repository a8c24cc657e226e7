"""Safe bounds of sparse linear programs with two-sided rows, as exported from networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from optrelax.layers.programs.safe_bounds import box_bound
from optrelax.rounding import SLACK, Rounding, gamma, underflow

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

Array = NDArray[np.float64]


def sparse_bounds(
    c: Array,
    matrix: csc_matrix,
    row_lower: Array,
    row_upper: Array,
    col_lower: Array,
    col_upper: Array,
    duals: Array,
    rounding: Rounding = "nearest",
) -> Array:
    """Lower bounds on min c_i.x, row_lower <= M x <= row_upper, col_lower <= x <= col_upper, from any multipliers.

    Sound: yes, whatever the multipliers; "outward" includes floating point. For every feasible x, with r = c + M^T s,
    c.x = r.x - s.(M x) >= sum_j min(r_j l_j, r_j u_j) - sum_i max(s_i row_lower_i, s_i row_upper_i); multipliers that
    hold an infinite side are set to 0, NaN counts as 0. -inf where a reduced cost meets an infinite bound.
    c [k, n], matrix [rows, n], duals [k, rows] as in `SparseAnswer.duals`; float64; returns [k].
    Source: Neumaier & Shcherbina 2004; the rounding as in `safe_bounds`, with as many products a reduced cost as the
    fullest column has entries.
    """
    c = np.atleast_2d(np.asarray(c, dtype=np.float64))
    s = np.nan_to_num(np.atleast_2d(np.asarray(duals, dtype=np.float64)), nan=0.0, posinf=0.0, neginf=0.0)
    held = (s > 0) & np.isfinite(row_upper) | (s < 0) & np.isfinite(row_lower)
    s = np.where(held, s, 0.0)
    side = np.where(s > 0, row_upper, np.where(s < 0, row_lower, 0.0))
    # (M^T s^T)^T: scipy multiplies sparse by dense column by column.
    reduced = c + (matrix.T @ s.T).T
    entries = int(np.diff(matrix.indptr).max(initial=0)) + 2
    size = np.abs(c) + (abs(matrix).T @ np.abs(s).T).T
    error = 2 * SLACK * (gamma(entries, torch.float64) * size + underflow(entries, torch.float64))
    low, high = (np.broadcast_to(end, reduced.shape).copy() for end in (col_lower, col_upper))
    tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in (reduced, error, low, high, -s * side)]
    bound: Array = box_bound(tensors[0], tensors[1], (tensors[2], tensors[3]), tensors[4], rounding).numpy()
    return bound
