"""What a rule for an ONNX op sees of a node, and the registry of the rules.

A rule turns a node into a torch function of the node's inputs. Shapes are those of one example, with 1 as the batch:
the function must take any batch there, in its first dimension, and leave examples apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["MOST_ENTRIES", "RULES", "OnnxNode", "OnnxValue", "require_small", "rule"]

Function = Callable[..., object]
Rule = Callable[["OnnxNode"], Function]
RULES: dict[str, Rule] = {}
MOST_ENTRIES = 2**24
"""Most numbers of one value: a file of a kilobyte can declare more than any memory holds."""

_R = TypeVar("_R", bound=Rule)


def rule(*ops: str) -> Callable[[_R], _R]:
    """Decorator: the rule of these ops of the default ONNX domain."""

    def register(function: _R) -> _R:
        for op in ops:
            RULES[op] = function
        return function

    return register


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """A value of the graph: a constant, or the shape and type that it has for one example."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None = None


@dataclass(slots=True)
class OnnxNode:
    """One node: attributes, inputs, opset.  Rules raise ValueError for what they cannot do."""

    op: str
    attributes: Mapping[str, Any]
    inputs: Sequence[OnnxValue | None]
    outputs: int
    opset: int
    consumed: set[int] = field(default_factory=set)
    """Inputs that a rule has read as plain numbers: the function gets None there."""
    statistics: set[int] = field(default_factory=set)
    """Constant inputs that are no weights: they become buffers."""

    def get(self, name: str, default: object) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def has(self, place: int) -> bool:
        """Whether the optional input is there."""
        return place < len(self.inputs) and self.inputs[place] is not None

    def value(self, place: int) -> OnnxValue:
        """An input that must be there."""
        found = self.inputs[place] if place < len(self.inputs) else None
        if found is None:
            raise ValueError(f"lacks input {place}")
        return found

    def constant(self, place: int) -> Tensor:
        """An input that must not depend on the network's input."""
        value = self.value(place)
        if value.constant is None:
            raise ValueError(f"input {place} ({value.name}) depends on the network's input; it must be constant")
        return value.constant

    def numbers(self, place: int) -> list[Any]:
        """A constant input as plain numbers."""
        constant = self.constant(place)
        if constant.numel() > 2**16:
            raise ValueError(f"input {place} holds {constant.numel()} numbers where a few are wanted")
        self.consumed.add(place)
        found: list[object] = constant.reshape(-1).tolist()
        return found

    def integers(self, place: int) -> list[int]:
        """A constant input as integers."""
        found = self.numbers(place)
        if not all(isinstance(n, int) for n in found):
            raise ValueError(f"input {place} must hold integers")
        return found

    def axes(self, place: int, name: str = "axes") -> list[int] | None:
        """Axes that came as an attribute in older opsets and as an input in newer ones."""
        if name in self.attributes:
            return [int(a) for a in self.attributes[name]]
        return self.integers(place) if self.has(place) else None

    def axis(self, axis: int, rank: int, what: str = "axis") -> int:
        """An axis counted from 0, none of the batch unless the node is constant."""
        found = axis + rank if axis < 0 else axis
        if not 0 <= found < rank:
            raise ValueError(f"{what} {axis} is not there in {rank} dimensions")
        if found == 0 and not self.is_constant:
            raise ValueError(f"{what} {axis} is the batch dimension, and examples must stay apart")
        return found

    @property
    def is_constant(self) -> bool:
        """Whether no input depends on the network's."""
        return all(v is None or v.constant is not None for v in self.inputs)


def require_small(shape: Sequence[int]) -> None:
    """ValueError for a shape of more numbers than a network has room for."""
    if any(n < 0 for n in shape) or math.prod(shape) > MOST_ENTRIES:
        raise ValueError(f"shape {list(shape)} holds more than {MOST_ENTRIES} numbers")


def text_of(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
