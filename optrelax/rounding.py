"""Floating-point allowances for bounds that must hold in real arithmetic.

A sum of n products computed in any order, with or without fused multiply-add, differs from the exact sum by at most
gamma(n) * sum |a_i b_i| plus n underflows (Higham 2002, section 3.1). Every allowance below is such a bound. Allowances
are themselves computed in floating point from positive terms, so their relative error is at most gamma(N) < 1 %;
`SLACK` covers it. The proof needs standard sums of products: no TF32, no bfloat16 reduction, no Winograd or FFT
convolution; `require_exact_products` refuses the settings that break this.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "outward"]

SLACK = 1.02  # covers the rounding of the allowances themselves, see the module's docstring


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next float."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative error bound of a sum of `terms` products; ValueError where it proves nothing useful (over 1 %)."""
    product = terms * unit_roundoff(dtype)
    if product > 0.0099:
        raise ValueError(
            f"rounding='outward': a sum of {terms} terms in {dtype} has no useful error bound; use float64"
        )
    return product / (1 - product)


def underflow(terms: int, dtype: torch.dtype) -> float:
    """Absolute error bound of `terms` products that may underflow (flushed to zero or not)."""
    return terms * torch.finfo(dtype).tiny


def down(x: Tensor) -> Tensor:
    """The next float below."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


def up(x: Tensor) -> Tensor:
    """The next float above."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def check_rounding(owner: str, rounding: str) -> None:
    """ValueError unless `rounding` is one of the two modes."""
    if rounding not in ("nearest", "outward"):
        raise ValueError(f"{owner}: rounding must be 'nearest' or 'outward', got {rounding!r}")


def require_exact_products(x: Tensor) -> None:
    """ValueError where a setting makes products less exact than the allowances assume."""
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("rounding='outward': autocast breaks the error bound; leave the autocast region")
    if x.dtype != torch.float32:
        return
    if x.is_cuda:
        # cuDNN may pick Winograd or FFT convolutions in float32, whose error is not bounded by gamma(n).
        raise ValueError("rounding='outward': on a GPU use float64 (cuDNN's float32 convolutions are not exact sums)")
    for name, setting, exact in _cpu_precisions():
        if setting not in exact:
            raise ValueError(f"rounding='outward': {name} must be {exact[0]!r}, got {setting!r}")
    mkldnn = torch.backends.mkldnn
    if torch.backends.nnpack.is_available() and not (mkldnn.is_available() and mkldnn.enabled):
        # Without oneDNN, NNPACK takes over float32 convolutions and may pick Winograd or FFT ones.
        raise ValueError("rounding='outward': float32 on this CPU needs torch.backends.mkldnn.enabled; or use float64")


def _cpu_precisions() -> list[tuple[str, str, tuple[str, ...]]]:
    """What this torch lets its CPU library make of float32 products: name, value and exact values of each setting."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for op in ("matmul", "conv"):
        owner = getattr(torch.backends.mkldnn, op, None)
        if owner is not None:  # torch 2.9 and later; the older function fails once these have been used
            name = f"torch.backends.mkldnn.{op}.fp32_precision"
            found.append((name, str(owner.fp32_precision), ("ieee", "none")))
    if not found:
        name = "torch.set_float32_matmul_precision"
        found.append((name, torch.get_float32_matmul_precision(), ("highest",)))
    return found
