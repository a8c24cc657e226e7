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
from optrelax.layers.programs.safe_bounds import Certificate, box_bound, violations
from optrelax.rounding import SLACK, Rounding, gamma, underflow, up

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
    box = implied_box(data)
    z, y, v = (part.double().nan_to_num(0.0, 0.0, 0.0) for part in (primal, inequality, equality))
    z = z.clamp(data.lower, data.upper)
    y = torch.where(data.b == torch.inf, 0.0, y.clamp(min=0))
    Pz, error_P = _tangent(data.P, z)
    costs = data.c + Pz
    half, error_half = z * Pz / 2, up(z.abs() * error_P)
    # Between finite ends no curvature is needed.
    closed = all_finite(box[0]) and all_finite(box[1])
    curvature = torch.zeros_like(z[:, 0]) if closed else least_eigenvalue(data.P).expand(len(z))
    y, v = (y, v) if closed else _balanced(data, costs, y, v, box, curvature)
    reduced = costs + data.push(y, v)
    size = costs.abs() + data.c.abs() + transposed_times(data.A.abs(), y) + transposed_times(data.E.abs(), v.abs())
    terms = data.size[2] + data.size[3] + 4
    error = up(error_P + 2 * SLACK * (gamma(terms, _F64) * size + underflow(terms, _F64)))
    held = torch.cat([torch.where(y == 0, 0.0, -y * data.b), -v * data.d, -half], -1)
    loose = torch.cat([held, -error_half], -1) if rounding == "outward" else held
    reduced_box, ends, extra = _open_ends(reduced, error, box, z, curvature, rounding)
    lower = box_bound(reduced_box, error, ends, torch.cat([loose, extra], -1), rounding)
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
    data: LPData, costs: Tensor, y: Tensor, v: Tensor, box: tuple[Tensor, Tensor], curvature: Tensor
) -> tuple[Tensor, Tensor]:
    """Multipliers moved until reduced costs vanish at infinite bounds, where no curvature makes up for them."""
    open_ = box[0].isinf() | box[1].isinf()
    if data.size[2] + data.size[3] == 0 or not bool((open_.any(-1) & (curvature == 0)).any()):
        return y, v
    y, v = y.clone(), v.clone()
    m = data.size[2]
    for i in (open_.any(-1) & (curvature == 0)).nonzero().squeeze(-1).tolist():
        found = balance(ExactRows.of(data, i, box), costs[i], torch.cat([y[i], v[i]]))
        if found is not None:
            y[i], v[i] = found.multipliers[:m].clamp(min=0), found.multipliers[m:]
    return y, v


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
    feasible = (excess <= feasibility * data.b.abs().clamp(min=1)).all(-1)
    feasible &= (miss <= feasibility * data.d.abs().clamp(min=1)).all(-1)
    charges = torch.where(y == 0, 0.0, y * excess).sum(-1) + (v.abs() * miss).sum(-1)
    value = (data.c * x).sum(-1) + (x * Px).sum(-1) / 2 + charges
    return torch.where(feasible & value.isfinite(), value, torch.inf)
