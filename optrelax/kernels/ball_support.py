"""Support functions of the Euclidean and the l1 ball cut by a box, compiled: a row's split in a few passes in cache.

`optrelax.regions.ball_splits` says what a split is, and finds it by PyTorch's operations elsewhere.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from optrelax.kernels import native

_ROWS = "a[(1 if shared else batch) * k * n]"
_SIGNATURES = (
    f"split(batch, k, n, norm, shared, sides, {_ROWS}, x[batch * n], caps[batch * 2 * n], rooms[batch * 2 * n], "
    "middle[batch * k], length[sides * batch * k], held[sides * batch * k], price[sides * batch * k], "
    "unit[sides * batch * k])",
    f"points_of_rows(batch, k, n, norm, shared, sides, {_ROWS}, x[batch * n], rooms[batch * 2 * n], eps[batch], "
    "price[sides * batch * k], unit[sides * batch * k], grad[sides * batch * k], to_a[batch * k * n])",
    "points_shared(batch, k, n, norm, sides, a[k * n], x[batch * n], rooms[batch * 2 * n], eps[batch], "
    "price[sides * batch * k], unit[sides * batch * k], grad[sides * batch * k], to_a[k * n])",
    f"ends(batch, k, n, norm, shared, sides, {_ROWS}, rooms[batch * 2 * n], price[sides * batch * k], "
    "unit[sides * batch * k], grad[sides * batch * k], to_x[batch * n], to_lower[batch * n], to_upper[batch * n])",
)


@functools.cache
def kernels() -> native.Build:
    """The passes compiled for a CPU, or why there are none."""
    return native.build(Path(__file__).with_name("ball_support.c"), *_SIGNATURES)


def split(norm: int, sides: int, a: Tensor, x: Tensor, caps: Tensor, rooms: Tensor) -> tuple[Tensor, ...]:
    """Values at x [batch, k]; dual norms of p, what the box bounds, and two numbers for the passes below.

    norm: 1 or 2; sides: 2 with the negatives of the rows; a [batch or 1, k, n], x [batch, n], caps and rooms
    [batch, 2, n], all contiguous -> [batch, k], and four of [sides, batch, k].
    """
    batch, (k, n) = len(x), a.shape[1:]
    middle, found = a.new_empty(batch, k), a.new_empty(4, sides, batch, k)
    by = (batch, k, n, norm, _shared(a, x), sides)
    kernels().call("split", a.dtype, *by, a, x, caps, rooms, middle, *found)
    return middle, *found


def points(
    norm: int, a: Tensor, x: Tensor, rooms: Tensor, eps: Tensor, price: Tensor, unit: Tensor, grad: Tensor
) -> Tensor:
    """Where rows take their least values, times grad [sides, batch, k], summed over the sides: [batch, k, n]."""
    batch, (k, n), sides = len(x), a.shape[1:], len(grad)
    found = a.new_empty(batch, k, n)
    by = (batch, k, n, norm, _shared(a, x), sides)
    kernels().call("points_of_rows", a.dtype, *by, a, x, rooms, eps, price, unit, grad.contiguous(), found)
    return found


def gradient(
    norm: int, a: Tensor, x: Tensor, rooms: Tensor, eps: Tensor, price: Tensor, unit: Tensor, grad: Tensor
) -> Tensor:
    """`points` in the shape of a: summed over the batch where all examples share the rows."""
    if not _shared(a, x):
        return points(norm, a, x, rooms, eps, price, unit, grad)
    batch, (k, n), sides = len(x), a.shape[1:], len(grad)
    found = torch.empty_like(a)
    by = (batch, k, n, norm, sides)
    kernels().call("points_shared", a.dtype, *by, a, x, rooms, eps, price, unit, grad.contiguous(), found)
    return found


def ends(
    norm: int, a: Tensor, x: Tensor, rooms: Tensor, price: Tensor, unit: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the middle and in both ends of the box, [batch, n] each."""
    batch, (k, n), sides = len(x), a.shape[1:], len(grad)
    found = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    by = (batch, k, n, norm, _shared(a, x), sides)
    kernels().call("ends", a.dtype, *by, a, rooms, price, unit, grad.contiguous(), *found)
    return found


def _shared(a: Tensor, x: Tensor) -> int:
    return int(len(a) != len(x))
