"""Specifications of outputs that are no class scores: ranges for regression, and orders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optrelax.margin_rows import whole_labels
from optrelax.rounding import down
from optrelax.specifications import Specification, number_tensor

__all__ = ["ordering", "within"]


def within(target: Tensor, delta: Tensor | float) -> Specification:
    """Regression: |output - target| <= delta in every output; the ends belong to it.

    Args:
        target: [*batch, outputs].
        delta: a number or what broadcasts against the target, >= 0.

    Returns:
        Rows [*batch, 2 * outputs, outputs], the lower ends first.

    Raises:
        TypeError: for a target that is no tensor.
        ValueError: for a delta that is negative or not finite.

    Sound: offsets are rounded down, so that what is fulfilled holds in real arithmetic.

    Example:
        >>> spec = ox.within(torch.tensor([1.0, 2.0]), delta=0.5)
        >>> spec.values(torch.tensor([1.25, 2.0]).double()).tolist()
        [0.75, 0.5, 0.25, 0.5]
    """
    if not isinstance(target, Tensor) or target.dim() == 0:
        raise TypeError("within: target must be a tensor [*batch, outputs]")
    y = target.detach().double()
    size = number_tensor(delta, y.device).detach().double()
    if not bool((size >= 0).all()) or not bool(size.isfinite().all()):
        raise ValueError("within: delta must be finite and >= 0")
    n = y.shape[-1]
    eye = torch.eye(n, dtype=torch.float64, device=y.device)
    rows = torch.cat([eye, -eye]).expand(*y.shape[:-1], 2 * n, n)
    size = size.expand_as(y)
    return Specification(rows, torch.cat([_sum_down(size, -y), _sum_down(size, y)], -1), closed=True)


def _sum_down(a: Tensor, b: Tensor) -> Tensor:
    """a + b rounded down; the error of a float sum is a float (Knuth 1969)."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return torch.where(error < 0, down(total), total)


def ordering(order: Tensor | Sequence[int], outputs: int) -> Specification:
    """The outputs named are in strictly falling order.

    Args:
        order: [*batch, m] of integers, the greatest first.
        outputs: of the network.

    Returns:
        Rows [*batch, m - 1, outputs], e_order[i] - e_order[i + 1].

    Raises:
        ValueError: for fewer than two outputs, or one out of range.

    Example:
        >>> ox.ordering([2, 0], outputs=3).rows
        tensor([[-1.,  0.,  1.]], dtype=torch.float64)
    """
    places = whole_labels("ordering", order if isinstance(order, Tensor) else torch.tensor(order, device="cpu"))
    if places.shape[-1:] < (2,):
        raise ValueError("ordering: wants at least two outputs")
    if not bool(((places >= 0) & (places < outputs)).all()):
        raise ValueError(f"ordering: outputs must lie in [0, {outputs - 1}], got {places.flatten().tolist()[:9]}")
    eye = torch.eye(outputs, dtype=torch.float64, device=places.device)
    rows = eye[places.long()]
    return Specification(rows[..., :-1, :] - rows[..., 1:, :])
