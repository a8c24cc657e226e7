"""One way to map, select, replace and join what is kept a problem: points, problems, hulls, evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from optrelax.frozen import field_values
from optrelax.regions import Region

Change = Callable[..., Tensor]
B = TypeVar("B", bound="Batched")


class Batched:
    """A frozen dataclass whose tensors, in dicts and tuples and parts of the same kind too, have one entry a problem.

    Whatever else it holds is carried along.
    """

    __slots__ = ()

    def combine(self: B, change: Change, *others: B) -> B:
        """`change(mine, *theirs)` in place of every tensor."""
        mine = field_values(self)
        made = {
            name: _combined(change, value, [getattr(other, name) for other in others]) for name, value in mine.items()
        }
        return replace(self, **{name: value for name, value in made.items() if value is not mine[name]})  # type: ignore[type-var]

    def select(self: B, index: Tensor | slice) -> B:
        """Some of the problems."""
        return self.combine(lambda t: t[index])

    def put(self: B, index: Tensor, part: B) -> B:
        """The same with some problems replaced; types stay."""
        return self.combine(lambda old, new: old.index_put((index,), new.to(old.dtype)), part)

    def where(self: B, mask: Tensor, other: B) -> B:
        """Mine where the mask [R] holds, the other's elsewhere."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(mask.reshape(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        return self.combine(choose, other)

    def to(self: B, dtype: torch.dtype) -> B:
        """The same in another floating type; masks and counts stay what they are."""
        return self.combine(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def detach(self: B) -> B:
        """The same as constants."""
        return self.combine(Tensor.detach)


def join(parts: Sequence[B]) -> B:
    """Consecutive problems as one."""
    first, *rest = parts
    return first.combine(lambda *tensors: torch.cat(tensors), *rest) if rest else first


def _combined(change: Change, value: object, others: list[Any]) -> Any:
    match value:
        case Tensor():
            return change(value, *others)
        case Batched() | Region():
            return value.combine(change, *others)
        case tuple():
            return tuple(_combined(change, item, [other[i] for other in others]) for i, item in enumerate(value))
        case Mapping():
            return {key: _combined(change, item, [other[key] for other in others]) for key, item in value.items()}
    return value
