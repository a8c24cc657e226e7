"""Exact multipliers near computed ones, and the proofs that rest on them.

At an infinite bound a reduced cost has to vanish or to have the right sign, exactly: 1e-9 times infinity is infinity.
A computed s leaves a residual r = c_J + M_J^T s on the columns J that have to vanish. Where M_J^T has full row rank,
the least correction delta, M_J^T delta = -r, is shown to exist and bounded without being computed exactly (Rump 1999,
"INTLAB"; the approximate inverse R of a Gram matrix G proves G regular where |I - R G| < 1). Exact multipliers
s + delta then exist, and the Lagrange bound is evaluated for all of them at once. Nothing is forgiven. Where columns of
J depend on each other, exact multipliers are sought in rationals, in small problems (`rationals`).

The same proof shows rays: of infeasibility (Farkas: costs 0 and a positive bound) and of unboundedness (a direction d
with E d = 0, A d <= 0, c.d < 0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optrelax.layers.programs.lp_data import LPData
from optrelax.layers.programs.rationals import exact_correction, exactly_zero, products
from optrelax.layers.programs.sparse_matrices import is_sparse
from optrelax.rounding import SLACK, down, gamma, underflow, up

_F64 = torch.float64
_SMALL = 1e-5  # a residual above this part of its terms is no rounding: nothing exact lies nearby
_MOST = 2**24  # entries of a sparse matrix written out
_NOISE = (1e-9, 1e-6)  # a multiplier below these parts of the largest may be all that a solver's rounding has left


@dataclass(frozen=True, slots=True, eq=False)
class ExactRows:
    """The constraints of one problem: M x <= sides for the first m rows, M x = sides for the rest, in a box."""

    M: Float[Tensor, "rows n"]
    sides: Float[Tensor, " rows"]
    m: int
    low: Float[Tensor, " n"]
    high: Float[Tensor, " n"]

    @staticmethod
    def fit(data: LPData) -> bool:
        """Whether the matrices, written out, are small enough for dense factors; beyond, nothing is shown."""
        _, n, m, p = data.size
        return not (is_sparse(data.A) or is_sparse(data.E)) or (m + p) * n <= _MOST

    @classmethod
    def of(cls, data: LPData, i: int, box: tuple[Tensor, Tensor]) -> ExactRows:
        """Problem i of float64 data, with this box for its variables."""
        data = data.dense()
        A, E = ((matrix if matrix.dim() == 2 else matrix[i]).cpu() for matrix in (data.A, data.E))
        M, sides = torch.cat([A, E]), torch.cat([data.b[i], data.d[i]]).cpu()
        # A row without a side says nothing.
        open_ = sides == torch.inf
        M, sides = torch.where(open_[:, None], 0.0, M), torch.where(open_, 0.0, sides)
        return cls(M, sides, data.b.shape[1], box[0][i].cpu(), box[1][i].cpu())

    def beside(self, more: Float[Tensor, "more n"]) -> ExactRows:
        """These rows with more rows below, of side 0 and multipliers of either sign."""
        return replace(self, M=torch.cat([self.M, more]), sides=torch.cat([self.sides, more.new_zeros(len(more))]))


@dataclass(frozen=True, slots=True, eq=False)
class Balanced:
    """Multipliers, the proved bound of exact ones within `slack`, and the bound with rounding's residuals taken for 0.

    Each bound is -inf where it was not shown.
    """

    multipliers: Float[Tensor, " rows"]
    slack: Float[Tensor, " rows"]
    bound: float
    near: float


def balance(rows: ExactRows, c: Float[Tensor, " n"], s: Float[Tensor, " rows"]) -> Balanced | None:
    """Multipliers near s whose reduced costs fit the infinite bounds exactly; None where none are found."""
    c, s = c.cpu(), s.cpu().clone()
    s[: rows.m] = s[: rows.m].clamp(min=0)
    best = _fitted(rows, c, s)
    # Columns may meet no other multipliers than noise, and between dependent ones noise leaves nothing exact.
    for noise in _NOISE if len(s) else ():
        if best is not None and best.bound > -torch.inf:
            break
        found = _fitted(rows, c, torch.where(s.abs() > noise * s.abs().amax(), s, 0.0))
        best = found if best is None or (found is not None and found.bound > best.bound) else best
    return best


def _fitted(rows: ExactRows, c: Tensor, s: Tensor) -> Balanced | None:
    """The same from one start."""
    vanishing = _vanishing(rows, c, s)
    if vanishing is None:
        return None
    M = rows.M[:, vanishing].mT.contiguous()
    slack, proved, near = torch.zeros_like(s), True, True
    if len(M):
        for _ in range(3):
            s = _moved(M, c[vanishing] + M @ s, s, rows.m)
        if not bool(exactly_zero(M, s, c[vanishing]).all()):
            residual, error = products(M, s, c[vanishing])
            found = _correction(M, residual.abs() + error, _scales(s, rows.m), c[vanishing])
            found = exact_correction(M, s, c[vanishing], rows.m) if found is None else found
            proved, near = found is not None, bool((residual.abs() <= error).all())
            slack = slack if found is None else found
            proved = proved and not bool((slack > s)[: rows.m].any())
            if not proved and not near:
                return None
            slack = slack if proved else torch.zeros_like(s)
    made = _bounded(rows, c, s, slack, vanishing)
    return replace(made, bound=made.bound if proved else -torch.inf, near=made.near if near else -torch.inf)


def proves_infeasible(data: LPData, y: Float[Tensor, "B m"], v: Float[Tensor, "B p"]) -> Bool[Tensor, " B"]:
    """Whether (y, v) shows that no point satisfies the constraints (Farkas): a proof, rounding included.

    With costs 0, the bound of exact multipliers near the ray is positive; or, whatever the ray, bounds that single rows
    imply cross. NaN and negative y count as 0.
    """
    from optrelax.layers.programs.implied_bounds import implied_box
    from optrelax.layers.programs.safe_bounds import dual_bound

    data = data.double()
    y, v = (part.double().nan_to_num(0.0, 0.0, 0.0) for part in (y, v))
    y = torch.where(data.b == torch.inf, 0.0, y.clamp(min=0))
    if y.shape[-1] + v.shape[-1] == 0:
        return torch.zeros(data.size[0], dtype=torch.bool, device=data.c.device)
    size = torch.cat([y, v.abs()], -1).amax(-1, keepdim=True)
    y, v = (part / torch.where(size > 0, size, 1.0) for part in (y, v))
    # What is 1e-14 of the largest multiplier is the solver's rounding.
    y, v = (torch.where(part.abs() > 1e-14, part, 0.0) for part in (y, v))
    zero = LPData(torch.zeros_like(data.c), data.A, data.b, data.E, data.d, data.lower, data.upper)
    box = implied_box(zero)
    proved = (dual_bound(zero, y, v, box, "outward")[0] > 0) | (box[0] > box[1]).any(-1)
    for i in (~proved).nonzero().squeeze(-1).tolist():
        if size[i] > 0 and ExactRows.fit(data) and bool((box[0][i].isinf() | box[1][i].isinf()).any()):
            found = balance(ExactRows.of(zero, i, box), zero.c[i], torch.cat([y[i], v[i]]))
            proved[i] = found is not None and found.bound > 0
    return proved


def proves_unbounded(data: LPData, ray: Float[Tensor, "B n"]) -> Bool[Tensor, " B"]:
    """Whether an exact ray near `ray` leads from any feasible point to ever lower objectives: proved, with rounding.

    That there is a feasible point is not part of it.
    """
    data, ray = data.double(), ray.double().nan_to_num(0.0, 0.0, 0.0)
    size = ray.abs().amax(-1, keepdim=True)
    ray = ray / torch.where(size > 0, size, 1.0)
    wrong = torch.maximum(
        torch.where(data.lower.isfinite(), -ray, 0.0), torch.where(data.upper.isfinite(), ray, 0.0)
    ).amax(-1)
    likely = (size.squeeze(-1) > 0) & (wrong <= _SMALL) & ((data.c * ray).sum(-1) < 0)
    likely &= ExactRows.fit(data)
    for i in likely.nonzero().squeeze(-1).tolist():
        rows = ExactRows.of(data, i, (data.lower, data.upper))
        # What is small is the solver's rounding, or a point that the ray began at.
        clear = (torch.where(ray[i].abs() > small, ray[i], 0.0) for small in (1e-14, 1e-6))
        likely[i] = any(_falls(rows, data.c[i], part) for part in clear)
    return likely


def _vanishing(rows: ExactRows, c: Tensor, s: Tensor) -> Tensor | None:
    """The columns whose reduced costs have to vanish; None where one is too large for that."""
    value, error = products(rows.M.mT, s, c)
    size = c.abs() + rows.M.mT.abs() @ s.abs()
    needs_up, needs_down = rows.high == torch.inf, rows.low == -torch.inf
    unfit = needs_up & (value - error < 0) | needs_down & (value + error > 0)
    # Beside what is unfit, what the correction could make unfit.
    near = (needs_up | needs_down) & (value.abs() <= 1e-9 * size)
    if bool((unfit & (value.abs() > _SMALL * size)).any()):
        return None
    return (unfit | near).nonzero().squeeze(-1)


def _scales(s: Tensor, m: int) -> Tensor:
    """Powers of two that say how far each multiplier may move: its size; more for those of either sign."""
    size = s.abs()
    largest = size.amax().clamp(min=1e-300)
    size[m:] = largest
    return torch.where(size > 0, torch.exp2(torch.log2(size.clamp(min=1e-300)).round()), 0.0)


def _scaled(M: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(M with columns and rows scaled, exactly, the row scales)."""
    N = M * scales
    size = N.abs().amax(1)
    powers = torch.where(size > 0, torch.exp2(-torch.log2(size.clamp(min=1e-300)).round()), 1.0)
    return N * powers[:, None], powers


def _moved(M: Tensor, residual: Tensor, s: Tensor, m: int) -> Tensor:
    """s moved by the least correction, as computed."""
    scales = _scales(s, m)
    N, powers = _scaled(M, scales)
    step = scales * torch.linalg.lstsq(N, (-powers * residual)[:, None], driver="gelsd").solution[:, 0]
    moved = s + step
    moved[:m] = moved[:m].clamp(min=0)
    return moved if bool(moved.isfinite().all()) else s


def _correction(M: Tensor, residual: Tensor, scales: Tensor, c: Tensor) -> Tensor | None:
    """|delta| <= result for some delta with M delta = r, for r = -(c + M s) of any s and |r| <= residual.

    None where not shown.

    Rows that meet nothing that may move are left out: their residual is exactly 0.
    """
    met = ((M != 0) & (scales > 0)).any(1)
    if not bool(met.any()):
        return torch.zeros_like(scales)
    M, residual, c = M[met], residual[met], c[met]
    N, powers = _scaled(M, scales)
    # Equal rows of equal costs ask for the same thing twice; of other costs, for what there is not.
    N, which = torch.cat([N, (powers * c)[:, None]], 1).unique(dim=0, return_inverse=True)
    N = N[:, :-1]
    wanted = torch.zeros_like(N[:, 0]).scatter_reduce(0, which, powers * residual, "amax")
    q, k = N.shape
    if q > k:
        return None
    gram = N @ N.mT
    inverse, info = torch.linalg.inv_ex(gram)
    if int(info) or not bool(inverse.isfinite().all()):
        return None
    eye = torch.eye(q, dtype=_F64, device=N.device)
    size = N.abs() @ N.abs().mT
    defect = (eye - inverse @ gram).abs() + gamma(q + 2, _F64) * (inverse.abs() @ gram.abs() + eye)
    defect = defect + inverse.abs() @ (gamma(k + 1, _F64) * size + underflow(k + 1, _F64))
    contraction = float(SLACK * defect.sum(1).amax())
    if not contraction < 0.5:
        return None
    weight = SLACK * float((inverse.abs() @ wanted).amax()) / (1 - contraction)
    found = scales * (N.abs().sum(0) * weight) * SLACK**2
    return torch.where(scales > 0, found + underflow(q, _F64), 0.0)


def _bounded(rows: ExactRows, c: Tensor, s: Tensor, slack: Tensor, vanishing: Tensor) -> Balanced:
    """The bound of every multiplier within `slack` of s whose reduced costs vanish where they must."""
    from optrelax.layers.programs.safe_bounds import box_bound

    value, error = products(rows.M.mT, s, c)
    error = up(error + SLACK * (rows.M.mT.abs() @ slack))
    low, high = rows.low.clone(), rows.high.clone()
    value, error = value.clone(), error.clone()
    value[vanishing] = error[vanishing] = low[vanishing] = high[vanishing] = 0
    held = -torch.cat([s * rows.sides, up(SLACK * slack * rows.sides.abs())])
    bounds = [
        float(box_bound(value[None], error[None], (low[None], high[None]), held[None], mode, lenient=False))
        for mode in ("outward", "nearest")
    ]
    return Balanced(s, slack, bounds[0], bounds[1])


def _falls(rows: ExactRows, c: Tensor, ray: Tensor) -> bool:
    """Whether an exact ray near this one keeps every constraint of one problem and lowers the objective."""
    c, ray = c.cpu(), ray.cpu()
    ray = torch.where(rows.low.isfinite(), ray.clamp(min=0), ray)
    ray = torch.where(rows.high.isfinite(), ray.clamp(max=0), ray)
    value, error = products(rows.M, ray)
    size = rows.M.abs() @ ray.abs()
    equal = torch.arange(len(value), device=value.device) >= rows.m
    vanishing = equal | (value + error > 0) | (value.abs() <= 1e-9 * size) & (size > 0)
    if bool((vanishing & (value.abs() > _SMALL * size)).any()):
        return False
    index = vanishing.nonzero().squeeze(-1)
    M, slack = rows.M[index], torch.zeros_like(ray)
    bounded = rows.low.isfinite() | rows.high.isfinite()
    order = torch.cat([bounded.nonzero().squeeze(-1), (~bounded).nonzero().squeeze(-1)])
    count = int(bounded.sum())
    if len(M) and not bool(exactly_zero(M, ray).all()):
        scales = torch.zeros_like(ray)
        scales[order] = _scales(ray[order], count)
        found = _correction(M, value[index].abs() + error[index], scales, torch.zeros_like(value[index]))
        if found is None or bool((found > ray.abs())[bounded].any()):
            return False
        slack = found
    spread = SLACK * (rows.M.abs() @ slack) + error
    if bool((~vanishing & (up(value + spread) > 0)).any()):
        return False
    descent, rounding = products(c[None], ray)
    worst = down(descent + rounding + SLACK * (c.abs() @ slack))
    return bool(up(up(worst)) < 0)
