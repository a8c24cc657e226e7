"""Specifications: rows of linear functions of the network's output."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def margins(labels: Tensor, classes: int) -> Tensor:
    """Rows e_label - e_other, in class order without the label.

    labels [*batch] of integers in [0, classes) -> [*batch, classes - 1, classes], float32; entry points cast
    it to the region's dtype.  A row's value is logit[label] - logit[other].
    Raises ValueError for labels out of range, TypeError for labels that are not integers.
    """
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"margins: labels must be integers, got {labels.dtype}")
    if classes < 2:
        raise ValueError(f"margins: classes must be at least 2, got {classes}")
    if labels.numel() and not 0 <= (ends := [int(end) for end in labels.aminmax()])[0] <= ends[1] < classes:
        wrong = (labels < 0) | (labels >= classes)
        value = int(labels[wrong][0])
        raise ValueError(f"margins: labels must lie in [0, {classes - 1}], got {value}")
    if classes <= _FEW:
        found = _table(classes, labels.device).index_select(0, labels.long().reshape(-1))
        return found.reshape(*labels.shape, classes - 1, classes)
    return _rows(labels.long(), classes)


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
