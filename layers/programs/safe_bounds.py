"""Lower bounds on a linear program's value that hold for any multipliers, whatever solver produced them.

For y >= 0, any v, and every feasible x (Lagrange, then the minimum over the box of the variables alone):

    c.x >= c.x + y.(A x - b) + v.(E x - d) = r.x - y.b - v.d >= sum_j min(r_j l_j, r_j u_j) - y.b - v.d

with the reduced costs r = c + A^T y + E^T v. Source: Neumaier & Shcherbina 2004, "Safe bounds in linear and
mixed-integer linear programming".

Rounding "nearest" evaluates this in float64 and stops there. "outward" proves the evaluation. Let K = m + p.

1. Each r_j is a sum of K products and c_j, in any order, so the computed one is off by at most
   rho_j = gamma(K + 2) S_j + K underflows, S_j = |c_j| + sum_i |a_ij| y_i + sum_i |e_ij| |v_i| (Higham 2002, section
   3.1). With K = 0 the reduced costs are c itself and rho = 0.
2. The true r_j lies in [r_j - rho_j, r_j + rho_j], ends rounded outward. A product is bilinear, so its minimum over
   that interval and [l_j, u_j] is the least of the four corners; each corner has one rounding.
3. The n + m + p terms are summed in any order: off by at most gamma(n + m + p + 2) times the sum of their magnitudes.
4. The total less this allowance is rounded down once more, and rounded down again where it goes back to float32.

The data are float32 or float64, exact in float64; float32 data never meet TF32. Only flushing subnormal *inputs* to
zero (torch.set_flush_denormal) is outside the proof.

Infinite bounds. A term with r_j < 0 and u_j = inf (or r_j > 0 and l_j = -inf) makes the bound -inf. Four things are
done before that is accepted. Bounds that the constraints imply stand in for infinite ones. Multipliers whose reduced
costs have the wrong sign are scaled down until they fit, where c itself has the right sign. Multipliers whose reduced
costs should vanish are moved until they do, with a proof that exact ones lie nearby (`rays.balance`). Under "nearest",
a reduced cost whose rounding interval holds 0 counts as 0; under "outward" it does not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optrelax.exactness import require_exact_products
from optrelax.layers.batched import Batched
from optrelax.layers.programs.evaluation import evaluated
from optrelax.layers.programs.implied_bounds import implied_box, product
from optrelax.layers.programs.lp_data import LPData, all_finite, times, transposed_times
from optrelax.layers.programs.rays import ExactRows, balance
from optrelax.rounding import SLACK, Rounding, down, gamma, underflow, up


@dataclass(frozen=True, slots=True, eq=False)
class Certificate(Batched):
    """A safe lower bound, the multipliers that prove it, and the gap to a feasible point; all float64."""

    lower: Float[Tensor, " B"]
    gap: Float[Tensor, " B"]
    inequality: Float[Tensor, "B m"]
    equality: Float[Tensor, "B p"]
    reduced: Float[Tensor, "B n"]


def certify_duals(
    data: LPData,
    primal: Float[Tensor, "B n"],
    inequality: Float[Tensor, "B m"],
    equality: Float[Tensor, "B p"],
    rounding: Rounding,
    feasibility: float,
) -> Certificate:
    """The safe bound of any multipliers, and the certified gap of any point inside the variables' bounds.

    Sound: yes, `lower` as the module states it; negative multipliers of A x <= b are set to 0, NaN counts as 0.
    A point is feasible if A x - b <= feasibility * max(1, |b|) row by row, and |E x - d| alike. What it violates within
    that tolerance is charged at its multiplier, so the gap does not fall below 0 for being slightly infeasible.
    """
    data, closed = data.double(), all_finite(data.lower) and all_finite(data.upper)
    box = (data.lower, data.upper) if closed else implied_box(data)
    if rounding == "nearest" and (closed or (all_finite(box[0]) and all_finite(box[1]))):
        found = evaluated_certificate(data, primal, inequality, equality, feasibility, box)
        if found is not None and blurred_by_far_ends(data, box, found.gap, found.lower, feasibility) is None:
            return found
    y, v = (part.double().nan_to_num(0.0, 0.0, 0.0) for part in (inequality, equality))
    y = torch.where(data.b == torch.inf, 0.0, y.clamp(min=0))
    given, (lower, reduced) = (y, v), dual_bound(data, y, v, box, rounding)
    # Shrinking by a hair costs a hair; by more only where nothing else gives a bound.
    for least in (0.99, None, 0.0):
        lost = lower == -torch.inf
        if not bool(lost.any()):
            break
        if least is None:
            y, v, lower = _balanced(data, (y, v), box, (y, v, lower), rounding, lost)
            reduced = data.c + data.push(y, v)
            continue
        scale = _repair(data, y, v, box)
        scale = torch.where(lost & (scale >= least), scale, 1.0).unsqueeze(-1)
        y, v = y * scale, v * scale
        shrunk, reduced = dual_bound(data, y, v, box, rounding)
        lower = torch.where(lost, shrunk, lower)
    value = _primal_value(data, primal.double(), y, v, feasibility)
    blurred = blurred_by_far_ends(data, box, value - lower, lower, feasibility)
    if blurred is not None:
        y, v, lower = _balanced(data, given, (data.lower, data.upper), (y, v, lower), rounding, blurred)
        reduced = data.c + data.push(y, v)
        value = _primal_value(data, primal.double(), y, v, feasibility)
    gap = value - lower
    return Certificate(lower, gap.nan_to_num(torch.inf, torch.inf, torch.inf), y, v, reduced)


def evaluated_certificate(
    data: LPData,
    primal: Tensor,
    inequality: Tensor,
    equality: Tensor,
    feasibility: float,
    box: tuple[Tensor, Tensor],
) -> Certificate | None:
    """The certificate in a finite box, to nearest, by the compiled pass; None where there is none."""
    found = evaluated(data, primal.double(), inequality.double(), equality.double(), feasibility, box)
    if found is None:
        return None
    lower, value, y, v, reduced = found
    return Certificate(lower, (value - lower).nan_to_num(torch.inf, torch.inf, torch.inf), y, v, reduced)


def dual_bound(
    data: LPData,
    y: Float[Tensor, "B m"],
    v: Float[Tensor, "B p"],
    box: tuple[Float[Tensor, "B n"], Float[Tensor, "B n"]],
    rounding: Rounding,
    lenient: bool | None = None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B n"]]:
    """(bound, reduced costs) for multipliers y >= 0 and v; see the module.  Not finite in between: the bound is -inf.

    `lenient` counts reduced costs that rounding cannot tell from 0 as 0 at infinite bounds; default: "nearest" does.
    """
    reduced = data.c + data.push(y, v)
    infinite = not (all_finite(box[0]) and all_finite(box[1]))
    error = _reduced_error(data, y, v) if rounding == "outward" or infinite else None
    constants = torch.cat([-product(y, data.b), -v * data.d], -1)
    return box_bound(reduced, error, box, constants, rounding, lenient), reduced


def box_bound(
    reduced: Float[Tensor, "B n"],
    error: Float[Tensor, "B n"] | None,
    box: tuple[Float[Tensor, "B n"], Float[Tensor, "B n"]],
    constants: Float[Tensor, "B q"],
    rounding: Rounding,
    lenient: bool | None = None,
) -> Float[Tensor, " B"]:
    """sum_j min over [l_j, u_j] of r_j x_j, plus the constants: steps 2 to 4 of the module, float64.

    `error` is rho of step 1 (None: 0); each constant is one product.
    """
    outward = rounding == "outward"
    lenient = not outward if lenient is None else lenient
    if outward:
        require_exact_products(reduced)
    inexact = outward and error is not None and bool((error > 0).any())
    ends = _ends(reduced, error) if inexact else (reduced,)  # type: ignore[arg-type]
    terms = functools.reduce(torch.minimum, [product(r, x) for r in ends for x in box])
    terms = down(terms) if outward else terms
    if lenient and error is not None:
        unclear = (box[0].isinf() | box[1].isinf()) & (reduced.abs() <= error)
        terms = torch.where(unclear, 0.0, terms)
    total = terms.sum(-1) + constants.sum(-1)
    if outward:
        count = reduced.shape[-1] + constants.shape[-1] + 2
        magnitude = terms.abs().sum(-1) + constants.abs().sum(-1)
        allowance = SLACK * gamma(count, torch.float64) * magnitude + underflow(count, torch.float64)
        total = down(total - allowance)
    sure = total.isfinite() & reduced.isfinite().all(-1)
    return torch.where(sure, total, -torch.inf)


def _ends(reduced: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced costs at their least and greatest; what has no error stays, lest 0 at an infinite bound cease to be 0."""
    exact = error == 0
    return torch.where(exact, reduced, down(reduced - error)), torch.where(exact, reduced, up(reduced + error))


def _reduced_error(data: LPData, y: Tensor, v: Tensor) -> Tensor:
    """rho of the module's docstring, [B, n]; 0 without multipliers, when reduced costs are c itself."""
    terms = data.A.shape[-2] + data.E.shape[-2]
    held = torch.cat([y, v], -1) != 0
    if not bool(held.any()):
        return torch.zeros_like(data.c)
    size = data.c.abs() + transposed_times(data.A.abs(), y) + transposed_times(data.E.abs(), v.abs())
    error = 2 * SLACK * (gamma(terms + 2, torch.float64) * size + underflow(terms + 2, torch.float64))
    return torch.where(held.any(-1, keepdim=True), error, 0.0)


def _repair(data: LPData, y: Tensor, v: Tensor, box: tuple[Tensor, Tensor]) -> Tensor:
    """The factor by which to shrink multipliers so that reduced costs fit infinite bounds, [B]; 1 where none can."""
    lower, upper = box
    push = data.push(y, v)
    reduced = data.c + push
    wrong = (reduced < 0) & (upper == torch.inf) | (reduced > 0) & (lower == -torch.inf)
    # Reduced costs at a factor t are c + t push; they have c's sign below t = -c / push.
    ratio = torch.where(wrong, -data.c / torch.where(wrong, push, 1.0), 1.0)
    # Slightly below, so that the costs at infinite bounds leave 0 by more than their rounding.
    return ratio.amin(-1).clamp(0, 1) * (1 - 2.0**-30)


def blurred_by_far_ends(
    data: LPData, box: tuple[Tensor, Tensor], gap: Tensor, lower: Tensor, tol: float
) -> Bool[Tensor, " B"] | None:
    """Problems whose gap may be what rounding makes of implied ends far away; None where there are none."""
    if box[0] is data.lower and box[1] is data.upper:
        return None
    wide = (gap > tol * lower.abs().clamp(min=1)) & gap.isfinite()
    if bool(wide.any()):
        wide &= (data.lower.isinf() | data.upper.isinf()).any(-1)
    return wide if bool(wide.any()) else None


def _balanced(
    data: LPData,
    given: tuple[Tensor, Tensor],
    box: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor, Tensor],
    rounding: Rounding,
    which: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`held`, (y, v, bounds), or better: `given` multipliers moved until reduced costs vanish where they must."""
    y, v, lower = (part.clone() for part in held)
    m = data.size[2]
    if not ExactRows.fit(data):
        return y, v, lower
    for i in which.nonzero().squeeze(-1).tolist():
        found = balance(ExactRows.of(data, i, box), data.c[i], torch.cat([given[0][i], given[1][i]]))
        bound = -torch.inf if found is None else found.bound if rounding == "outward" else max(found.bound, found.near)
        if found is None or not bound > lower[i]:
            continue
        y[i], v[i], lower[i] = found.multipliers[:m].clamp(min=0), found.multipliers[m:], bound
    return y, v, lower


def _primal_value(data: LPData, x: Tensor, y: Tensor, v: Tensor, feasibility: float) -> Tensor:
    """c.x with violations charged at their multipliers; inf where x is not feasible, [B]."""
    broken = violations(data, x)
    value = (data.c * x).sum(-1) + product(y, broken[0]).sum(-1) + (v.abs() * broken[1]).sum(-1)
    feasible = ((x >= data.lower) & (x <= data.upper)).all(-1) & _tolerable(data, broken, feasibility)
    return torch.where(feasible & value.isfinite(), value, torch.inf)


def keeps_constraints(data: LPData, x: Float[Tensor, "B n"], feasibility: float) -> Bool[Tensor, " B"]:
    """Whether a point violates no row by more than `feasibility` of max(1, its side)."""
    return _tolerable(data, violations(data, x), feasibility)


def _tolerable(data: LPData, broken: tuple[Tensor, Tensor], feasibility: float) -> Tensor:
    pairs = zip(broken, (data.b, data.d), strict=True)
    kept = [(part <= feasibility * side.abs().clamp(min=1)).all(-1) for part, side in pairs if part.shape[-1]]
    return functools.reduce(torch.logical_and, kept) if kept else torch.ones_like(data.c[:, 0], dtype=torch.bool)


def violations(data: LPData, x: Float[Tensor, "B n"]) -> tuple[Float[Tensor, "B m"], Float[Tensor, "B p"]]:
    """(max(A x - b, 0), |E x - d|)."""
    above = (times(data.A, x) - data.b).clamp(min=0) if data.b.shape[-1] else data.b
    return above, (times(data.E, x) - data.d).abs() if data.d.shape[-1] else data.d
