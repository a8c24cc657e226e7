"""Tensors that do not depend on the input, read anew at each use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optrelax.networks.ops import Shape, Source


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A parameter, buffer or constant of the module, read at each use."""

    source: Source
    shape: Shape
    dtype: torch.dtype
    batched: bool = False

    def __call__(self) -> Tensor:
        return self.source()


class LiveConstant:
    """A tensor computed from parameters, buffers and constants at each use; of one example where it has a batch."""

    def __init__(self, read: Callable[[int], Any], shape: Shape, dtype: torch.dtype, batched: bool) -> None:
        self._read, self.shape, self.dtype, self.batched = read, shape, dtype, batched

    def __call__(self) -> Tensor:
        found: Tensor = self._read(1)
        return found[0] if self.batched else found

    def depends_on_batch(self) -> bool:
        """Whether another size of the batch gives an example another constant."""
        with torch.no_grad():
            wanted = self()
            return not all(
                torch.equal(row, wanted)
                for size in (2, 5)
                for row in (self._read(size) if self.batched else [self._read(size)])
            )
