"""Examples in memory, from whatever form a user has them in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from optrelax.checks import require_dense
from optrelax.data.splits import Dataset, evenly_spaced

__all__ = ["Samples", "gather"]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Inputs and labels, and where they stood before a subset was taken."""

    x: Tensor
    """float32 or float64 [n, *input_shape]."""
    labels: Tensor
    """int64 [n], on the CPU."""
    index: Tensor
    """int64 [n], on the CPU."""
    labelled: bool = True
    """False where inputs came alone; the labels are then 0."""

    def __len__(self) -> int:
        return self.x.shape[0]

    def require_range(self, clip: tuple[float, float] | None, owner: str = "certify") -> None:
        """ValueError where clip is no range, or where a value lies outside it; NaN is the concern of its example."""
        if clip is None:
            return
        low, high = (float(end) for end in clip)
        if not low <= high:
            raise ValueError(f"{owner}: clip must be (low, high) with low <= high, got {clip}")
        outside = (self.x < low) | (self.x > high)
        outside &= self.x.isfinite()
        if bool(outside.any()):
            count = f"{int(outside.sum())} of {outside.numel()} entries"
            first = f"first at {outside.nonzero()[0].tolist()}: {float(self.x[outside][0]):g}"
            raise ValueError(
                f"{owner}: x lies outside clip [{low:g}, {high:g}] in {count} ({first}); scale pixels to that range, "
                "or allow any values (clip=None, --no-clip)"
            )


def gather(data: object, subset: int | None = None) -> Samples:
    """Inputs and labels of a pair (x, labels), a Dataset of such items, a DataLoader of such batches; or inputs alone.

    subset: that many evenly spaced examples of it.
    Raises TypeError for another form, ValueError for types, shapes or lengths that do not fit.
    """
    match data:
        case Tensor():
            found = gather((data, torch.zeros(len(data), dtype=torch.int64, device="cpu")), subset)
            return replace(found, labelled=False)
        case tuple() | list():
            if len(data) != 2:
                raise ValueError(f"data: a pair (x, labels) has two entries, got {len(data)}")
            x, labels = _tensor("x", data[0]), _tensor("labels", data[1])
        case Dataset():
            x, labels = data.images, data.labels
        case _:
            x, labels = _iterated(data)
    _require_fit(x, labels)
    index = torch.arange(len(x), device="cpu") if subset is None else evenly_spaced(len(x), subset)
    chosen = index.to(x.device)
    return Samples(x[chosen].detach(), labels.cpu().long()[index], index)


def _iterated(data: object) -> tuple[Tensor, Tensor]:
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"data: wants a pair (x, labels), a Dataset or a DataLoader, got {type(data).__name__}")
    batched = isinstance(data, DataLoader) and data.batch_size is not None
    xs, ys = [], []
    for i, item in enumerate(_items(data)):
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            what = "batch" if batched else "item"
            raise TypeError(f"data: {what} {i} is not a pair (x, label), got {type(item).__name__}")
        x, label = _tensor("x", item[0]), _tensor("labels", item[1])
        xs.append(x if batched else x[None])
        ys.append(label.reshape(-1))
    if not xs:
        raise ValueError("data: holds no examples")
    try:
        return torch.cat(xs), torch.cat(ys)
    except RuntimeError as error:
        raise ValueError(f"data: examples differ in shape: {error}") from error


def _items(data: Any) -> Iterable[object]:
    """Map-style data sets by position: not all of them stop an iteration with IndexError."""
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return (data[i] for i in range(len(data)))
    items: Iterable[object] = data
    return items


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, (Tensor, np.ndarray, int, np.integer)):
        found = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        require_dense("data", name, found)
        return found
    raise TypeError(f"data: {name} must be a tensor or an array, got {type(value).__name__}")


def _integers(labels: Tensor) -> str:
    return "labels.argmax(1), if they are one-hot" if labels.dim() == 2 else "labels.long()"


def _require_fit(x: Tensor, labels: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"data: x must be float32 or float64, got {x.dtype}; scale pixels, such as x / 255")
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"data: x must be [n, *input_shape] with n >= 1, got {tuple(x.shape)}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"data: labels must be integers, got {labels.dtype}; use {_integers(labels)}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"data: labels must be [{x.shape[0]}], one an example, got {tuple(labels.shape)}")
