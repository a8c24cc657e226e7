"""Rows of specifications: those whose values are the margins of labels, and whether rows fit a network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_specification", "label_rows", "margins", "sign_margin", "whole_labels"]


def margins(labels: Tensor, classes: int) -> Tensor:
    """Rows e_label - e_other, in class order without the label.

    A row's value is logit[label] - logit[other].

    Args:
        labels: [*batch] of integers in [0, classes).
        classes: at least 2; for one output, `sign_margin`.

    Returns:
        [*batch, classes - 1, classes], float32; entry points cast it to the region's dtype.

    Raises:
        ValueError: for labels out of range.
        TypeError: for labels that are not integers.

    Example:
        >>> ox.margins(torch.tensor([1]), classes=3)
        tensor([[[-1.,  1.,  0.],
                 [ 0.,  1., -1.]]])
    """
    labels = whole_labels("margins", labels)
    if classes < 2:
        raise ValueError(f"margins: classes must be at least 2, got {classes}; for one output, sign_margin(labels)")
    if labels.numel() and not 0 <= (ends := [int(end) for end in labels.aminmax()])[0] <= ends[1] < classes:
        wrong = (labels < 0) | (labels >= classes)
        value = int(labels[wrong][0])
        raise ValueError(f"margins: labels must lie in [0, {classes - 1}], got {value}")
    if classes <= _FEW:
        found = _table(classes, labels.device).index_select(0, labels.long().reshape(-1))
        return found.reshape(*labels.shape, classes - 1, classes)
    return _rows(labels.long(), classes)


def sign_margin(labels: Tensor) -> Tensor:
    """Rows of a network with one output, which is positive for one class and negative for the other.

    A row's value is the output where the label is 1, minus the output elsewhere.

    Args:
        labels: [*batch] of integers: 1 for the class of positive outputs, 0 (or everywhere -1) for the other.

    Returns:
        [*batch, 1, 1], float32.

    Raises:
        ValueError: for other labels.
        TypeError: for labels that are not integers.

    Example:
        >>> ox.sign_margin(torch.tensor([1, 0])).flatten().tolist()
        [1.0, -1.0]
    """
    labels = whole_labels("sign_margin", labels)
    found = set(labels.unique().tolist()) if labels.numel() else set()
    if not (found <= {0, 1} or found <= {-1, 1}):
        raise ValueError(f"sign_margin: labels must be 0 and 1 (or -1 and 1), got {sorted(found)[:5]}")
    return torch.where(labels > 0, 1.0, -1.0).to(torch.float32)[..., None, None]


def label_rows(labels: Tensor, output_shape: Sequence[int], owner: str) -> Tensor:
    """The rows whose values are the margins of labels: `margins`, or `sign_margin` where there is one output.

    ValueError where the outputs [batch, *output_shape] are no class scores.
    """
    if math.prod(output_shape) == 1 and len(output_shape) <= 1:
        return sign_margin(labels)
    if len(output_shape) != 1:
        raise ValueError(
            f"{owner}: labels want outputs [batch, classes], got [batch, {', '.join(map(str, output_shape))}]: "
            "end the network in class scores, or bound rows of your own by optrelax.lower_bounds"
        )
    return margins(labels, output_shape[0])


def whole_labels(owner: str, labels: Tensor) -> Tensor:
    """Labels as they are; TypeError where they are not integers."""
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels, device="cpu")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{owner}: labels must be integers, got {labels.dtype}; use labels.long()")
    return labels


_FEW = 32  # classes whose rows are kept: at most 32 k numbers


@functools.lru_cache(maxsize=16)
def _table(classes: int, device: torch.device) -> Tensor:
    """The rows of every label: [classes, classes - 1, classes]."""
    with torch.inference_mode(False):
        return _rows(torch.arange(classes, device=device), classes)


def _rows(labels: Tensor, classes: int) -> Tensor:
    eye = torch.eye(classes, dtype=torch.float32, device=labels.device)
    # others[c] lists the classes but c, in order: 0..classes-2, those from c on moved up by one
    order = torch.arange(classes - 1, device=labels.device)
    others = order + (order >= labels[..., None]).long()
    return eye[labels][..., None, :] - eye[others]


def check_specification(rows: Tensor, batch: torch.Size, outputs: int) -> None:
    """ValueError unless rows is [*batch, k, outputs] or [k, outputs]."""
    if rows.dim() < 2 or rows.shape[-1] != outputs:
        raise ValueError(
            f"specification: rows must be [k, {outputs}] or [*batch, k, {outputs}] for a network with {outputs} "
            f"outputs, got {tuple(rows.shape)}"
        )
    if rows.dim() > 2 and rows.shape[:-2] != batch:
        raise ValueError(f"specification: rows have batch {tuple(rows.shape[:-2])}, the region has {tuple(batch)}")
    if not bool(rows.detach().sum().isfinite()) and not bool(rows.detach().isfinite().all()):
        raise ValueError("specification: rows must be finite")
