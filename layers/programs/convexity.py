"""Whether the matrices of quadratic programs are symmetric and positive semidefinite, to rounding."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from optrelax.kernels import native

_ROUNDING = 1e-9  # how far below 0 an eigenvalue may lie, relative to the largest, and P from its transpose
_IN_CACHE = 128  # variables: beyond, LAPACK's blocks are as fast
_SIGNATURES = ("convexity(size, n, double rounding, P[size * n * n], int64 convex[size])",)


@functools.cache
def kernels() -> native.Build:
    """The compiled check, or why there is none."""
    return native.build(Path(__file__).with_name("convexity.c"), *_SIGNATURES)


def require_convex(owner: str, P: Float[Tensor, "*batch n n"]) -> None:
    """ValueError unless P is symmetric and positive semidefinite, to rounding."""
    if P.numel() == 0:
        return
    unit = torch.finfo(P.dtype).eps / torch.finfo(torch.float64).eps
    rounding, exact = _ROUNDING * max(1.0, min(unit, 1e4)), P.double()
    if _plainly(exact, rounding):
        return
    allowed = rounding * exact.abs().amax((-1, -2))
    if bool(((exact - exact.mT).abs().amax((-1, -2)) > allowed).any()):
        raise ValueError(f"{owner}: P must be symmetric; give (P + P.mT) / 2")
    shift = (allowed + torch.finfo(torch.float64).tiny).unsqueeze(-1).expand(P.shape[:-1])
    _, info = torch.linalg.cholesky_ex(exact + torch.diag_embed(shift))
    if bool((info != 0).any()):
        least = float(torch.linalg.eigvalsh(exact)[..., 0].min())
        if least < -float(allowed.max()):
            raise ValueError(f"{owner}: P must be positive semidefinite, its least eigenvalue is {least:.3g}")


def _plainly(P: Tensor, rounding: float) -> bool:
    """Whether the compiled check finds every small matrix convex: what it does not is looked at again."""
    n = P.shape[-1]
    if n > _IN_CACHE or not kernels().supports(P):
        return False
    size = P.numel() // (n * n)
    convex = torch.empty(size, dtype=torch.int64, device="cpu")
    kernels().call("convexity", torch.float64, size, n, rounding, P.contiguous(), convex)
    return bool(convex.all())
