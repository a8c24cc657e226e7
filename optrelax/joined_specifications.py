"""Specifications joined by "and" and "or", and what entry points take for one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.specifications import Specification

__all__ = ["Spec", "all_of", "any_of", "as_specification"]

_MOST_GROUPS = 10_000
Spec = Specification | Tensor | Mapping[str, object]
"""What entry points take: rows, a specification, or several of these by name."""


def as_specification(spec: object) -> Specification:
    """Rows, a specification, or a mapping of these by name, all of which must hold; TypeError for another thing."""
    match spec:
        case Specification():
            return spec
        case Tensor():
            return Specification(spec)
        case Mapping() if spec:
            return all_of(*(as_specification(part).named(str(name)) for name, part in spec.items()))
    wanted = "a tensor of rows, an ox.Specification or a mapping of these by name"
    raise TypeError(f"specification: wants {wanted}, got {type(spec).__name__}")


def all_of(*parts: Specification | Tensor) -> Specification:
    """Fulfilled where all of the parts are; names stay where all parts have some.

    Args:
        parts: specifications, or rows.

    Returns:
        One specification with the groups of all.

    Raises:
        ValueError: without parts, and where they are of different outputs or batches.

    Example:
        >>> spec = ox.all_of(ox.margins(torch.tensor(0), classes=3), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> spec.groups
        ((0,), (1,), (2,))
    """
    found, places = _joined("all_of", parts)
    groups = [
        [i + place for i in group] for part, place in zip(found.parts, places, strict=True) for group in part.groups
    ]
    names = [name for part in found.parts for name in part.names]
    return found.specification(groups, names if len(names) == len(groups) else ())


def any_of(*parts: Specification | Tensor) -> Specification:
    """Fulfilled where at least one of the parts is.

    A part with several groups is distributed over the others': (a and b) or c is (a or c) and (b or c).

    Args:
        parts: specifications, or rows.

    Returns:
        One specification.

    Raises:
        ValueError: as `all_of`, and where distributing makes too many groups.

    Example:
        >>> spec = ox.any_of(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))  # y0 > 0 or y1 > 0
        >>> spec.groups
        ((0, 1),)
    """
    found, places = _joined("any_of", parts)
    count = math.prod(len(part.groups) for part in found.parts)
    if count > _MOST_GROUPS:
        raise ValueError(
            f"any_of: distributed over each other the parts make {count} groups, at most {_MOST_GROUPS} go"
        )
    moved = [
        [[i + place for i in group] for group in part.groups] for part, place in zip(found.parts, places, strict=True)
    ]
    return found.specification([[*itertools.chain(*choice)] for choice in itertools.product(*moved)], ())


@dataclass(frozen=True, slots=True)
class _JoinedParts:
    parts: list[Specification]

    def specification(self, groups: Sequence[Sequence[int]], names: Sequence[str]) -> Specification:
        batches = {part.batch for part in self.parts} - {None}
        (batch,) = batches or {torch.Size()}
        assert batch is not None
        rows = torch.cat([p.rows.expand(*batch, *p.rows.shape[-2:]) for p in self.parts], -2)
        offsets = torch.cat([p.offsets.expand(*batch, p.rows.shape[-2]) for p in self.parts], -1)
        slack = None
        if any(p.slack is not None for p in self.parts):
            zero = [torch.zeros_like(p.rows) if p.slack is None else p.slack for p in self.parts]
            slack = torch.cat([s.expand(*batch, *s.shape[-2:]) for s in zero], -2)
        closed = torch.cat([p.closed for p in self.parts])
        return Specification(rows, offsets, groups, closed=closed, names=names, slack=slack)


def _joined(owner: str, parts: Sequence[Specification | Tensor]) -> tuple[_JoinedParts, list[int]]:
    """The parts, and the place of each one's first row among all rows."""
    if not parts:
        raise ValueError(f"{owner}: give at least one specification")
    found = [as_specification(part) for part in parts]
    if len({part.rows.shape[-1] for part in found}) > 1:
        raise ValueError(f"{owner}: the parts are of {[part.rows.shape[-1] for part in found]} outputs")
    if len({part.batch for part in found} - {None}) > 1:
        raise ValueError(f"{owner}: the parts have batches {[tuple(part.batch or ()) for part in found]}")
    sizes = [part.rows.shape[-2] for part in found]
    return _JoinedParts(found), [0, *itertools.accumulate(sizes[:-1])]
