"""What the layer says of a solver's answer: bounds and gaps from the points alone, and statuses that these bear out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optrelax.layers.programs.lp_data import Answer, LPData
from optrelax.layers.programs.quadratic_bounds import certify_quadratic
from optrelax.layers.programs.safe_bounds import Certificate, certify_duals
from optrelax.layers.solutions import Status
from optrelax.rounding import Rounding, cast_down


def certify(data: LPData, answer: Answer, rounding: Rounding, feasibility: float) -> Certificate:
    """The safe bound of the answer's multipliers and the gap of its point."""
    # A solver that differentiates itself may leave the variables' bounds by its tolerance.
    primal = answer.primal
    primal = primal if answer.objective is None else primal.detach().clamp(data.lower, data.upper)
    rule = certify_duals if data.P is None else certify_quadratic
    found = rule(data, primal, answer.inequality, answer.equality, rounding, feasibility)
    # A bound above the value of a point is what rounding makes of terms far larger than both.
    false = found.gap < -feasibility * found.lower.abs().clamp(min=1)
    if rounding == "outward" or not bool(false.any()):
        return found
    lower, gap = torch.where(false, -torch.inf, found.lower), torch.where(false, torch.inf, found.gap)
    return replace(found, lower=lower, gap=gap)


def judge(claimed: Tensor, certificate: Certificate, tol: float) -> Tensor:
    """Final statuses: OPTIMAL exactly where the certificate says so, [B]."""
    proved = certificate.lower.isfinite() & (certificate.gap <= tol * certificate.lower.abs().clamp(min=1))
    # A claim of optimality that the certificate does not bear out is a numerical failure.
    unproved = torch.where(claimed == Status.OPTIMAL, int(Status.NUMERICAL), claimed)
    return torch.where(proved & (claimed != Status.INFEASIBLE), int(Status.OPTIMAL), unproved)


def has_no_value(status: Tensor) -> Tensor:
    """Where a problem has no optimal value."""
    return (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)


def in_dtype(value: Tensor, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    """float64 to `dtype`; rounded down under "outward"."""
    if dtype == torch.float64:
        return value
    near = cast_down(value, dtype) if rounding == "outward" else value.to(dtype)
    # A finite float64 may round up to inf in float32.
    return torch.where(near == torch.inf, torch.full_like(near, torch.finfo(dtype).max), near)


def carry(value: Tensor, objective: Tensor) -> Tensor:
    """`value` with the gradient of `objective`."""
    zero = objective - objective.detach()
    return torch.where(value.isfinite(), value + zero, value)
