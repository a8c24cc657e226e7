"""What losses around a loss share, and the memory that a loss may keep of its examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["LossMemory", "Remembering", "WrappedLoss", "memory_of"]


@runtime_checkable
class LossMemory(Protocol):
    """What a loss keeps from step to step: stored with the state of a run."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Remembering(Protocol):
    """A loss that keeps something of every example from step to step, and takes it as `memory` beside an `index`."""

    def memory(self, examples: int) -> LossMemory | None:
        """An empty memory for a data set of so many examples; None where the loss keeps nothing."""


def memory_of(loss: object, examples: int) -> LossMemory | None:
    """The memory that a loss wants for a data set of so many examples; None where it keeps none."""
    return loss.memory(examples) if isinstance(loss, Remembering) else None


@dataclass(frozen=True)
class WrappedLoss:
    """Shared by losses around a loss, which its memory and its other arguments go on to."""

    loss: Any

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"{type(self).__name__}: loss must be a loss, got {type(self.loss).__name__}")

    def memory(self, examples: int) -> LossMemory | None:
        """The memory of the loss inside; None where it keeps none."""
        return memory_of(self.loss, examples)
