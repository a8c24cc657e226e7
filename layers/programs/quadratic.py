"""Projection of points on polyhedra: Clarabel's interior-point method, finished on the active constraints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optrelax.layers.programs.lp_data import LPData, stack_rows, times, without_open_rows

_ASKED = 1e-11  # tolerance asked of Clarabel
_ACCEPTED = 1e-7  # violation accepted of the result, relative to the data
_NEAR = 1e-5  # how far the finish may move a point, relative to the data


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Projected points and their active constraints; float64 on the data's device."""

    x: Float[Tensor, "B n"]
    at_rows: Bool[Tensor, "B rows"]
    """Active rows of [A; E]; equalities are always active."""
    at_lower: Bool[Tensor, "B n"]
    at_upper: Bool[Tensor, "B n"]
    solved: Bool[Tensor, " B"]
    """False: infeasible, or not solved to 1e-7."""


def project(data: LPData, target: Float[Tensor, "B n"]) -> Projection:
    """The point of each polyhedron nearest `target`; data in float64, one solve a problem on the CPU.

    A constraint is active where its multiplier exceeds its slack. The projection on the active constraints is taken
    where it is feasible and near Clarabel's point: it is exact to rounding.
    """
    host, goal = without_open_rows(data.map(Tensor.cpu)), target.cpu()
    rows = [_one(host.select(slice(i, i + 1)), goal[i]) for i in range(data.size[0])]
    x, at_rows, at_lower, at_upper, solved = (torch.stack(parts) for parts in zip(*rows, strict=True))
    x = _finish(host, goal, x, at_rows, at_lower, at_upper)
    scale = _size(host, goal)
    solved &= _violation(host, x) <= _ACCEPTED * scale
    x = torch.minimum(torch.maximum(x, host.lower), host.upper)
    device = data.c.device
    return Projection(x.to(device), at_rows.to(device), at_lower.to(device), at_upper.to(device), solved.to(device))


def _one(data: LPData, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, active rows of [A; E], active lower and upper bounds, solved) of one problem."""
    import clarabel  # type: ignore[import-untyped]
    import numpy as np
    from scipy import sparse

    _, n, m, p = data.size
    A, E = (matrix if matrix.dim() == 2 else matrix[0] for matrix in (data.A, data.E))
    eye = torch.eye(n, dtype=torch.float64, device="cpu")
    below, above = data.lower[0].isfinite(), data.upper[0].isfinite()
    G = torch.cat([E, A, -eye[below], eye[above]]).numpy()
    h = torch.cat([data.d[0], data.b[0], -data.lower[0][below], data.upper[0][above]]).numpy()
    cones: list[object] = [clarabel.ZeroConeT(p)] if p else []
    cones += [clarabel.NonnegativeConeT(len(h) - p)] if len(h) > p else []
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = _ASKED
    q = -target.numpy()
    found = clarabel.DefaultSolver(
        sparse.identity(n, format="csc"), q, sparse.csc_matrix(G), h, cones, settings
    ).solve()
    solved = str(found.status) in ("Solved", "AlmostSolved")
    active = torch.from_numpy(np.array(found.z) > np.array(found.s))
    at_lower, at_upper = torch.zeros(n, dtype=torch.bool, device="cpu"), torch.zeros(n, dtype=torch.bool, device="cpu")
    at_lower[below] = active[p + m : p + m + int(below.sum())]
    at_upper[above] = active[p + m + int(below.sum()) :]
    at_rows = torch.cat([active[p : p + m], torch.ones(p, dtype=torch.bool, device="cpu")])
    # A variable without room is held by both bounds.
    fixed = data.lower[0] == data.upper[0]
    x = torch.from_numpy(np.array(found.x)) if solved else torch.zeros(n, dtype=torch.float64, device="cpu")
    return x, at_rows, at_lower | fixed, at_upper | fixed, torch.tensor(solved, device="cpu")


def _finish(data: LPData, target: Tensor, rough: Tensor, at_rows: Tensor, at_lower: Tensor, at_upper: Tensor) -> Tensor:
    """The projection on the active constraints; `rough` where that is infeasible or far away, [B, n]."""
    held = torch.where(at_lower, data.lower, torch.where(at_upper, data.upper, 0.0))
    free = ~(at_lower | at_upper)
    G = stack_rows(data.A, data.E).expand(len(target), -1, -1) * at_rows.unsqueeze(-1)
    h = torch.cat([data.b, data.d], -1) * at_rows
    base = torch.where(free, target, held)
    inverse = torch.linalg.pinv(G * free.unsqueeze(-2), rtol=1e-10)
    exact = base + times(inverse, h - times(G, base)) * free
    scale = _size(data, target)
    near = (exact - rough).abs().amax(-1) <= _NEAR * scale
    accepted = near & (_violation(data, exact) <= 1e-9 * scale)
    return torch.where(accepted.unsqueeze(-1), exact, rough)


def _size(data: LPData, target: Tensor) -> Tensor:
    """1 + the largest entry of the target and the sides, [B]."""
    return 1 + torch.cat([target, data.b, data.d], -1).abs().amax(-1)


def _violation(data: LPData, x: Tensor) -> Tensor:
    """Largest violation of any constraint, [B]."""
    rows = [times(data.A, x) - data.b, (times(data.E, x) - data.d).abs(), data.lower - x, x - data.upper]
    return torch.cat(rows, -1).amax(-1).clamp(min=0)
