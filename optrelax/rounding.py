"""Floating-point allowances for bounds that must hold in real arithmetic.

A sum of n products computed in any order, with or without fused multiply-add, differs from the exact sum by at most
gamma(n) * sum |a_i b_i| plus n underflows (Higham 2002, section 3.1). Every allowance below is such a bound. Allowances
are themselves computed in floating point from positive terms, so their relative error is at most gamma(N) < 1 %;
`SLACK` covers it. The proof needs standard sums of products: no TF32, no bfloat16 reduction, no Winograd or FFT
convolution; `optrelax.exactness` tests the machine's products and refuses what breaks this.

Constants. An op's coefficient c may be computed (a batch norm's scale) or rounded (a Python number): what multiplies is
c' with |c' - c| <= rho |c| + eta. rho is gamma(`Affine.roundings`); eta, what is lost below the normal range, is
at most `tiny`, the least normal number, wherever a chain of roundings loses it. So an output that reads n values, none
above `peak`, is off by another n * eta * peak whatever the coefficients are: an absolute error that no size of the
products shows, as the lost coefficients are missing there too. `Affine` allowances hold it for every op:

    |fl(M' x + b') - (M x + b)| <= SLACK (gamma(n + roundings) (|M'| |x| + |b'|) + tiny (2 n + 1 + n peak(|x|)))

and rows pulled back, sum_i a_i M_ij by at most m products, err on values z by at most

    SLACK (sum_i |a_i| (gamma(m + roundings) (|M'| |z|)_i + n tiny (1 + peak(|z|))) + m tiny sum_j |z_j|).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context
from optrelax.checks import require_choice

Rounding = Literal["nearest", "outward"]

SLACK = 1.02  # covers the rounding of the allowances themselves, see the module's docstring


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next float."""
    return torch.finfo(dtype).eps / 2


def tiny(dtype: torch.dtype) -> float:
    """The least normal number; what lies below has fewer digits, and may be flushed to zero."""
    return torch.finfo(dtype).tiny


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative error bound of a sum of `terms` products; ValueError where it proves nothing useful (over 1 %)."""
    product = terms * unit_roundoff(dtype)
    if product > 0.0099:
        raise ValueError(
            f"rounding='outward': a sum of {terms} terms in {dtype} has no useful error bound; use float64"
        )
    return product / (1 - product)


def underflow(terms: int, dtype: torch.dtype) -> float:
    """Absolute error bound of `terms` products or coefficients that may underflow (flushed to zero or not)."""
    return terms * tiny(dtype)


def peak(x: Tensor) -> Tensor:
    """Greatest entry of each example, shaped to multiply others of its rank: [batch, *shape] -> [batch, 1...]."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    greatest = flat.amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
    return greatest.reshape(-1, *[1] * (x.dim() - 1))


class _Next(torch.autograd.Function):
    """The next float, towards an end.  Gradient: that of the number itself (older PyTorch has none)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, end: float) -> Tensor:
        return torch.nextafter(x, torch.full_like(x, end))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def down(x: Tensor) -> Tensor:
    """The next float below."""
    found: Tensor = _Next.apply(x, -torch.inf)
    return found


def up(x: Tensor) -> Tensor:
    """The next float above."""
    found: Tensor = _Next.apply(x, torch.inf)
    return found


def cast_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest numbers of a type that are at most these."""
    near = x.to(dtype)
    return torch.where(near.double() > x.double(), down(near), near)


def cast_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of a type that are at least these."""
    near = x.to(dtype)
    return torch.where(near.double() < x.double(), up(near), near)


def check_rounding(owner: str, rounding: str) -> None:
    """ValueError unless `rounding` is one of the two modes."""
    require_choice(owner, "rounding", rounding, "nearest", "outward")
