"""Bound and value of all problems by a compiled pass over their rows, in float64 between finite ends."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from optrelax.kernels import native
from optrelax.layers.programs.lp_data import LPData
from optrelax.layers.programs.sparse_matrices import is_sparse

_SIGNATURES = (
    "evaluation(size, n, m, p, shared_a, shared_e, shared_p, double feasibility, c[size * n], "
    "A?[(1 if shared_a else size) * m * n], b?[size * m], E?[(1 if shared_e else size) * p * n], d?[size * p], "
    "lower[size * n], upper[size * n], low[size * n], high[size * n], P?[(1 if shared_p else size) * n * n], "
    "x[size * n], y[size * m], v[size * p], reduced[size * n], bound[size], value[size])",
)


@functools.cache
def kernels() -> native.Build:
    """The compiled pass, or why there is none."""
    return native.build(Path(__file__).with_name("evaluation.c"), *_SIGNATURES)


def evaluated(
    data: LPData,
    x: Float[Tensor, "B n"],
    y: Float[Tensor, "B m"],
    v: Float[Tensor, "B p"],
    feasibility: float,
    box: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """(bounds, values, multipliers as counted, reduced costs) in a finite box, of float64 data; None without kernel.

    A bound that is not finite is -inf; the value of a point that is not feasible is inf.
    """
    if is_sparse(data.A) or is_sparse(data.E) or not kernels().supports(data.c):
        return None
    size, n, m, p = data.size
    ready = data.map(Tensor.contiguous)
    y, v = y.clone(memory_format=torch.contiguous_format), v.clone(memory_format=torch.contiguous_format)
    reduced, bound, value = torch.empty_like(ready.c), x.new_empty(size), x.new_empty(size)
    shared = (int(part is None or part.dim() == 2) for part in (ready.A, ready.E, ready.P))
    sides = (ready.lower, ready.upper, *(end.contiguous() for end in box), ready.P)
    inputs = (ready.c, ready.A, ready.b, ready.E, ready.d, *sides, x.contiguous(), y, v)
    kernels().call("evaluation", torch.float64, size, n, m, p, *shared, feasibility, *inputs, reduced, bound, value)
    return bound, value, y, v, reduced
