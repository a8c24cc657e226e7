"""Tensors that do not depend on the input, read anew at each use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.networks.ops import Shape, Source


@dataclass(frozen=True, slots=True)
class Attribute:
    """Reads a tensor of a module at each use, so that it follows training, `.to()` and functional calls."""

    owner: weakref.ref[nn.Module]
    name: str

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Attribute:
        """Of a module that it does not keep alive."""
        return cls(weakref.ref(module), name)

    def __call__(self) -> Tensor:
        owner = self.owner()
        if owner is None:
            raise RuntimeError("a module that was captured is gone; capture the network again")
        found: Tensor = getattr(owner, self.name)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor that belongs to no module: one that forward makes or closes over."""

    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


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
