"""Specifications: rows of linear functions of the network's output, with offsets, joined by "and" and "or"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.checks import require_dense
from optrelax.frozen import filled
from optrelax.rounding import cast_down, tiny, up


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Specification:
    """What outputs must do: in every group, a row's value must be > 0.

    A row's value is row . y + offset, y the flattened outputs; where a row is `closed`, a value of 0 is enough.
    `a & b` is both of two specifications, `a | b` either.

    Args:
        rows: [*batch, k, outputs], or [k, outputs] for every example.
        offsets: [*batch, k], [k] or a number.
        groups: places of the rows of each, default one a row: all of them must hold.
        closed: of all rows, or [k] of bool.
        names: of the groups.
        slack: how far the rows may be from the coefficients they stand for, or None where they are exact.

    Raises:
        ValueError: for shapes or places that do not fit, numbers that are not finite.
        TypeError: for rows that are no tensor.

    Example:
        >>> first = ox.Specification(torch.tensor([[1.0, 0.0]]), names=["first"])  # y0 > 0
        >>> either = first | ox.Specification(torch.tensor([[0.0, 1.0]]), offsets=-2.0)  # or y1 > 2
        >>> either.worst(either.values(torch.tensor([[-1.0, 3.0], [-1.0, 1.0]])))
        tensor([[ 1.],
                [-1.]], dtype=torch.float64)
    """

    rows: Tensor
    offsets: Tensor  # [k], or [*batch, k] where the rows have a batch
    groups: tuple[tuple[int, ...], ...]
    closed: Tensor  # [k] of bool
    names: tuple[str, ...]  # one a group, or none
    slack: Tensor | None  # how far the coefficients may lie from the rows that stand for them, shaped like those

    def __init__(
        self,
        rows: Tensor,
        offsets: Tensor | float = 0.0,
        groups: Sequence[Sequence[int]] | None = None,
        *,
        closed: Tensor | bool = False,
        names: Sequence[str] = (),
        slack: Tensor | None = None,
    ) -> None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"Specification: rows must be a tensor, got {type(rows).__name__}")
        require_dense("Specification", "rows", rows)
        if rows.dim() < 2:
            raise ValueError(
                f"Specification: rows must be [k, outputs] or [*batch, k, outputs], got {tuple(rows.shape)}"
            )
        rows = rows if rows.is_floating_point() else rows.double()
        k = rows.shape[-2]
        # In its own type: what is rounded is a bound of the value, when all of it is known.
        offsets = number_tensor(offsets, rows.device)
        offsets = offsets if offsets.is_floating_point() else offsets.double()
        offsets = offsets.expand(k) if offsets.dim() == 0 else offsets
        if offsets.shape == (k,):
            offsets = offsets.expand(rows.shape[:-1])
        elif rows.dim() == 2 and offsets.shape[-1:] == (k,):
            rows = rows.expand(*offsets.shape[:-1], *rows.shape)
            slack = None if slack is None else slack.expand_as(rows)
        if offsets.shape != rows.shape[:-1]:
            raise ValueError(
                f"Specification: offsets must be {tuple(rows.shape[:-1])} or a number, got {tuple(offsets.shape)}"
            )
        places = tuple((i,) for i in range(k)) if groups is None else tuple(tuple(map(int, g)) for g in groups)
        if wrong := [i for group in places for i in group if not 0 <= i < k]:
            raise ValueError(f"Specification: a group names row {wrong[0]} of {k}")
        if names and (len(names) != len(places) or len(set(names)) != len(names)):
            raise ValueError(
                f"Specification: names wants {len(places)} different names, one a group, got {list(names)}"
            )
        if not bool(rows.detach().isfinite().all()) or not bool((offsets.detach() < math.inf).all()):
            raise ValueError("Specification: rows and offsets must be finite (an offset of -inf is never fulfilled)")
        whole = torch.as_tensor(closed, dtype=torch.bool, device=rows.device)
        closed = whole.expand(k)
        filled(self, rows=rows, offsets=offsets, groups=places, closed=closed, names=tuple(names), slack=slack)

    @property
    def batch(self) -> torch.Size | None:
        """Batch shape; None where all examples share the rows."""
        return None if self.rows.dim() == 2 else self.rows.shape[:-2]

    @property
    def single(self) -> bool:
        """Whether every group is one row, in their order."""
        return self.groups == tuple((i,) for i in range(self.rows.shape[-2]))

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every group: its own, or its number."""
        return self.names or tuple(map(str, range(len(self.groups))))

    def __and__(self, other: Specification | Tensor) -> Specification:
        from optrelax.joined_specifications import all_of

        return all_of(self, other)

    def __or__(self, other: Specification | Tensor) -> Specification:
        from optrelax.joined_specifications import any_of

        return any_of(self, other)

    def named(self, name: str) -> Specification:
        """The same with names: its groups' own under this one, or this one alone."""
        names = [name] if len(self.groups) == 1 else [f"{name}.{label}" for label in self.labels]
        return self._with(self.rows, self.offsets, self.slack, names=names)

    def select(self, index: Tensor | slice | int) -> Specification:
        """Of some of the examples; shared rows stay as they are."""
        if self.batch is None:
            return self
        slack = None if self.slack is None else self.slack[index]
        return self._with(self.rows[index], self.offsets[index], slack)

    def flat(self) -> Specification:
        """With one batch dimension, or none."""
        if self.batch is None or len(self.batch) == 1:
            return self
        slack = None if self.slack is None else self.slack.flatten(0, -3)
        return self._with(self.rows.flatten(0, -3), self.offsets.flatten(0, -2), slack)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Specification:
        """On a device, in a type that may round the rows: by how much is kept in `slack`, offsets are rounded down."""
        rows, offsets = self.rows.to(device=device), self.offsets.to(device=device)
        slack = None if self.slack is None else self.slack.to(device=device)
        if dtype is not None and rows.dtype != dtype:
            near = rows.to(dtype)
            error = (rows.double() - near.double()).abs()
            if bool(error.any()):
                lost = up(error.to(dtype))
                slack = lost if slack is None else up(slack.to(dtype) + lost)
            elif slack is not None:
                slack = up(slack.to(dtype))
            rows = near
        if dtype is not None and offsets.dtype != dtype:
            offsets = cast_down(offsets, dtype)
        return filled(self._with(rows, offsets, slack), closed=self.closed.to(rows.device))

    def only(self, groups: Sequence[int]) -> Specification:
        """With some of the groups, by their numbers."""
        names = [self.names[i] for i in groups] if self.names else ()
        chosen = tuple(self.groups[i] for i in groups)
        return Specification(self.rows, self.offsets, chosen, closed=self.closed, names=names, slack=self.slack)

    def values(self, outputs: Tensor) -> Tensor:
        """Value of every row: [*batch, outputs] -> [*batch, k]."""
        if self.batch is None:
            return outputs @ self.rows.mT + self.offsets
        return (self.rows @ outputs[..., None])[..., 0] + self.offsets

    def worst(self, values: Tensor) -> Tensor:
        """Greatest value of each group, -inf in an empty one: [*batch, k] -> [*batch, groups]; > 0 is fulfilled.

        A closed row's value of exactly 0 counts as the least normal number.  Of lower bounds it is one.
        """
        if bool(self.closed.any()):
            values = torch.where(self.closed & (values == 0), values + tiny(values.dtype), values)
        if self.single:
            return values
        nothing = values.new_full(values.shape[:-1], -math.inf)
        return torch.stack([values[..., list(g)].amax(-1) if g else nothing for g in self.groups], -1)

    def excluded(self, lower: Tensor) -> list[bool]:
        """Which groups lower bounds of the rows' values [k] prove fulfilled; a NaN or +inf proves nothing."""
        proved = ((lower > 0) | (self.closed & (lower >= 0))) & lower.isfinite()
        return [bool(proved[list(group)].any()) for group in self.groups]

    def failing(self, values: Tensor) -> list[bool]:
        """Which groups the values [k] of a point leave unfulfilled; a NaN fails none."""
        bad = (values < 0) | (~self.closed & (values <= 0))
        return [bool(bad[list(group)].all()) for group in self.groups]

    def require_fit(self, owner: str, outputs: int, batch: torch.Size) -> None:
        """ValueError where the rows are of another number of outputs, or of another batch."""
        if self.rows.shape[-1] != outputs:
            raise ValueError(
                f"{owner}: the specification is of {self.rows.shape[-1]} outputs, the network has {outputs}"
            )
        if self.batch is not None and self.batch != batch:
            raise ValueError(f"{owner}: the specification has batch {tuple(self.batch)}, the inputs {tuple(batch)}")

    def _with(
        self, rows: Tensor, offsets: Tensor, slack: Tensor | None, names: Sequence[str] | None = None
    ) -> Specification:
        """The same groups of other numbers, which need no second look."""
        names = self.names if names is None else tuple(names)
        found, groups, closed = object.__new__(Specification), self.groups, self.closed
        return filled(found, rows=rows, offsets=offsets, groups=groups, closed=closed, names=names, slack=slack)


def number_tensor(value: Tensor | float, device: torch.device) -> Tensor:
    """A tensor as it is; a Python number is no float32."""
    return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64, device=device)
