"""One split of a data set in memory, and evenly spaced examples of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "Split", "evenly_spaced"]


Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """One split of a data set in memory; a map-style data set for `torch.utils.data.DataLoader`.

    Raises ValueError where the parts do not fit together.
    """

    name: str
    split: str
    images: Tensor  # float32 [n, channels, height, width] in [0, 1]
    labels: Tensor  # int64 [n] in 0 .. classes - 1
    classes: int

    def __post_init__(self) -> None:
        where = f"Dataset {self.name!r} ({self.split})"
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.float32:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{where}: images must be float32 [n, channels, height, width], got {got}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{where}: labels must be int64 [{len(images)}], one an image, got {got}")
        if images.numel() == 0:
            raise ValueError(f"{where}: expected at least one image, got shape {list(images.shape)}")
        low, high = (float(end) for end in images.aminmax())
        if not (low >= 0 and high <= 1):  # so put, a NaN is refused too
            raise ValueError(f"{where}: pixels must lie in [0, 1], got [{low:g}, {high:g}]")
        least, most = (int(end) for end in labels.aminmax())
        if least < 0 or most >= self.classes:
            raise ValueError(f"{where}: labels must lie in 0 .. {self.classes - 1}, got {least} .. {most}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Image [c, h, w] and label [] at `index`; a slice or a tensor of indices gives a batch."""
        return self.images[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels, strict=True)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, n: int) -> "Dataset":
        """`n` evenly spaced examples, in order; ValueError unless 1 <= n <= size."""
        index = evenly_spaced(len(self), n)
        return replace(self, images=self.images[index], labels=self.labels[index])


def evenly_spaced(size: int, n: int) -> Tensor:
    """Indices of an evenly spaced subset: linspace(0, size - 1, n), floored. int64 [n], strictly increasing.

    Raises ValueError unless 1 <= n <= size.
    """
    if not 1 <= n <= size:
        raise ValueError(f"subset: must lie in 1 .. {size}, the examples there are, got {n}")
    # Floating point by definition: where an index is a whole number, the rounded product may fall just below
    # it (size 10000, n 40: 3332, not 3333). Results on such subsets are published, so the index stays.
    return torch.from_numpy(np.floor(np.linspace(0, size - 1, n)).astype(np.int64))
