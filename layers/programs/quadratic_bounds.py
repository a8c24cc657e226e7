"""Lower bounds on a convex quadratic program's value that hold for any point and any multipliers.

A convex function lies above its tangent: with f(x) = c.x + x.P x / 2 and any point z,

    f(x) >= f(z) + (c + P z).(x - z) + mu / 2 |x - z|^2 = (c + P z).x - z.P z / 2 + mu / 2 |x - z|^2,

mu >= 0 a proved lower bound of P's eigenvalues. So a safe bound of the linear program with costs c + P z, less
z.P z / 2, is one of the quadratic program. At an infinite bound, where a reduced cost r has to vanish, the last term
gives r z_j - r^2 / (2 mu) instead.  Assumed of P: that it is symmetric and positive semidefinite; the layer checks it.

Rounding "outward": P z has n products an entry, whose error bound joins that of the reduced costs; z.P z / 2 is charged
at its largest. mu is proved by a Cholesky factor (Rump 2006, "Verification of positive definiteness").
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from optrelax.exactness import require_exact_products
from optrelax.layers.programs.implied_bounds import implied_box
from optrelax.layers.programs.lp_data import LPData, all_finite, times, transposed_times
from optrelax.layers.programs.rays import ExactRows, balance
from optrelax.layers.programs.safe_bounds import (
    Certificate,
    blurred_by_far_ends,
    box_bound,
    evaluated_certificate,
    keeps_constraints,
    violations,
)
from optrelax.rounding import SLACK, Rounding, down, gamma, underflow, up

_F64 = torch.float64


def certify_quadratic(
    data: LPData,
    primal: Float[Tensor, "B n"],
    inequality: Float[Tensor, "B m"],
    equality: Float[Tensor, "B p"],
    rounding: Rounding,
    feasibility: float,
) -> Certificate:
    """The safe bound of any point and multipliers, and the certified gap of the point; see the module.

    Sound: yes, for positive semidefinite P; negative multipliers of A x <= b are set to 0, NaN counts as 0.
    """
    data = data.double()
    assert data.P is not None
    if rounding == "outward":
        require_exact_products(data.c)
    z, y, v = (part.double().nan_to_num(0.0, 0.0, 0.0) for part in (primal, inequality, equality))
    z = z.clamp(data.lower, data.upper)
    if rounding == "nearest" and all_finite(data.lower) and all_finite(data.upper):
        found = evaluated_certificate(data, z, y, v, feasibility, (data.lower, data.upper))
        if found is not None:
            return found
    box = implied_box(data)
    y = torch.where(data.b == torch.inf, 0.0, y.clamp(min=0))
    Pz, error_P = _tangent(data.P, z)
    costs = data.c + Pz
    half, error_half = z * Pz / 2, up(z.abs() * error_P)
    # Between finite ends no curvature is needed.
    closed = all_finite(box[0]) and all_finite(box[1])
    curvature = torch.zeros_like(z[:, 0]) if closed else least_eigenvalue(data.P).expand(len(z))
    reduced = costs + data.push(y, v)
    size = costs.abs() + data.c.abs() + transposed_times(data.A.abs(), y) + transposed_times(data.E.abs(), v.abs())
    terms = data.size[2] + data.size[3] + 4
    error = up(error_P + 2 * SLACK * (gamma(terms, _F64) * size + underflow(terms, _F64)))
    held = torch.cat([torch.where(y == 0, 0.0, -y * data.b), -v * data.d, -half], -1)
    loose = torch.cat([held, -error_half], -1) if rounding == "outward" else held
    reduced_box, ends, extra = _open_ends(reduced, error, box, z, curvature, rounding)
    lower = box_bound(reduced_box, error, ends, torch.cat([loose, extra], -1), rounding)
    # Far out what rounding cannot tell from 0 is no small thing.
    unclear = (ends[0].isinf() | ends[1].isinf()) & (reduced_box.abs() <= error)
    drift = torch.where(unclear, error * z.abs(), 0.0).sum(-1)
    lower = torch.where(drift > feasibility * lower.abs().clamp(min=1), -torch.inf, lower)
    lost = lower == -torch.inf
    if bool(lost.any()):
        lower, y, v, reduced = _balanced(data, box, (z, y, v), (lower, reduced), rounding, lost)
    value = _value(data, z, Pz, y, v, feasibility)
    blurred = blurred_by_far_ends(data, box, value - lower, lower, feasibility)
    if blurred is not None:
        given = data.lower, data.upper
        lower, y, v, reduced = _balanced(data, given, (z, y, v), (lower, reduced), rounding, blurred)
        value = _value(data, z, Pz, y, v, feasibility)
    gap = (value - lower).nan_to_num(torch.inf, torch.inf, torch.inf)
    return Certificate(lower, gap, y, v, reduced)


def least_eigenvalue(P: Float[Tensor, "... n n"]) -> Tensor:
    """A proved lower bound >= 0 of the eigenvalues of positive semidefinite matrices; 0 where none is proved."""
    n = P.shape[-1]
    guess = 0.5 * torch.linalg.eigvalsh(P)[..., 0].clamp(min=0)
    trace = P.diagonal(dim1=-2, dim2=-1).clamp(min=0).sum(-1)
    allowance = SLACK * 2 * (gamma(n + 2, _F64) * trace / (1 - gamma(n + 2, _F64)) + underflow(n * n, _F64))
    shifted = P - torch.diag_embed((guess + allowance).unsqueeze(-1).expand(*P.shape[:-1]))
    _, info = torch.linalg.cholesky_ex(shifted)
    return torch.where(info == 0, (guess - allowance).clamp(min=0), 0.0)


def _tangent(P: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(P z, a bound on its rounding error)."""
    n = z.shape[-1]
    return times(P, z), 2 * SLACK * (gamma(n + 2, _F64) * times(P.abs(), z.abs()) + underflow(n + 2, _F64))


def _balanced(
    data: LPData,
    box: tuple[Tensor, Tensor],
    point: tuple[Tensor, Tensor, Tensor],
    bound: tuple[Tensor, Tensor],
    rounding: Rounding,
    which: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(bounds, y, v, reduced costs); of some problems z, y and v are moved for better bounds.

    P's rows are rows of the program with the side 0, whose multipliers are z: so the tangent moves with the rest.
    """
    (z, y, v), (lower, reduced) = point, bound
    if not ExactRows.fit(data):
        return lower, y, v, reduced
    lower, y, v, reduced = (part.clone() for part in (lower, y, v, reduced))
    m, p = data.size[2:]
    assert data.P is not None
    for i in which.nonzero().squeeze(-1).tolist():
        P = (data.P if data.P.dim() == 2 else data.P[i]).cpu()
        rows = ExactRows.of(data, i, box).beside(P)
        found = balance(rows, data.c[i], torch.cat([y[i], v[i], z[i]]))
        if found is None:
            continue
        moved, slack = found.multipliers[m + p :], found.slack[m + p :]
        proved, near = found.bound - _half(P, moved, slack), found.near - _half(P, moved, 0 * slack)
        better = float(
            down(torch.tensor(proved if rounding == "outward" else max(proved, near), dtype=_F64, device="cpu"))
        )
        if not better > lower[i]:
            continue
        lower[i] = better
        y[i], v[i] = found.multipliers[:m].clamp(min=0), found.multipliers[m : m + p]
        reduced[i] = data.c[i] + (rows.M.mT @ found.multipliers).to(reduced)
    return lower, y, v, reduced


def _half(P: Tensor, z: Tensor, slack: Tensor) -> float:
    """An upper bound of x.P x / 2 for all x within `slack` of z."""
    Pz, error = _tangent(P, z[None])
    size = (Pz.abs() + error)[0]
    rest = z.abs() * error[0] / 2 + slack * size + slack * (P.abs() @ slack) / 2
    magnitude = (z.abs() * size).sum() + rest.sum()
    count = 2 * len(z) + 8
    allowance = 2 * SLACK * (gamma(count, _F64) * magnitude + underflow(count, _F64))
    return float(up((z * Pz[0]).sum() / 2 + rest.sum() + allowance))


def _open_ends(
    reduced: Tensor,
    error: Tensor,
    box: tuple[Tensor, Tensor],
    z: Tensor,
    curvature: Tensor,
    rounding: Rounding,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """(reduced costs, ends, constants): entries that no end bounds become constants by the curvature."""
    low, high = box
    unfit = (high == torch.inf) & (reduced - error < 0) | (low == -torch.inf) & (reduced + error > 0)
    mu = curvature.unsqueeze(-1)
    use = unfit & (mu > 0)
    size = up(reduced.abs() + error) if rounding == "outward" else reduced.abs()
    fall = up(up(size * size) / (2 * torch.where(mu > 0, mu, 1.0)))
    drift = up(error * z.abs()) if rounding == "outward" else torch.zeros_like(z)
    constants = [torch.where(use, part, 0.0) for part in (reduced * z, -drift, -fall)]
    ends = torch.where(use, z, low), torch.where(use, z, high)
    kept = torch.where(use, 0.0, reduced)
    ends = torch.where(use, 0.0, ends[0]), torch.where(use, 0.0, ends[1])
    return kept, ends, torch.cat(constants, -1)


def _value(data: LPData, x: Tensor, Px: Tensor, y: Tensor, v: Tensor, feasibility: float) -> Tensor:
    """f(x) with violations charged at their multipliers; inf where x is not feasible, [B]."""
    excess, miss = violations(data, x)
    charges = torch.where(y == 0, 0.0, y * excess).sum(-1) + (v.abs() * miss).sum(-1)
    value = (data.c * x).sum(-1) + (x * Px).sum(-1) / 2 + charges
    return torch.where(keeps_constraints(data, x, feasibility) & value.isfinite(), value, torch.inf)
