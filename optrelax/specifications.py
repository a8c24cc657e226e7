"""Specifications: rows of linear functions of the network's output, with offsets, joined by "and" and "or"."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optrelax.rounding import down, tiny, up

_MOST_GROUPS = 10_000


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
        if rows.dim() < 2:
            raise ValueError(
                f"Specification: rows must be [k, outputs] or [*batch, k, outputs], got {tuple(rows.shape)}"
            )
        rows = rows if rows.is_floating_point() else rows.double()
        k = rows.shape[-2]
        # In its own type: what is rounded is a bound of the value, when all of it is known.
        offsets = _number(offsets, rows.device)
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
        for name, value in (
            ("rows", rows),
            ("offsets", offsets),
            ("groups", places),
            ("closed", whole.expand(k)),
            ("names", tuple(names)),
            ("slack", slack),
        ):
            object.__setattr__(self, name, value)

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
        return all_of(self, other)

    def __or__(self, other: Specification | Tensor) -> Specification:
        return any_of(self, other)

    def named(self, name: str) -> Specification:
        """The same with names: its groups' own under this one, or this one alone."""
        names = [name] if len(self.groups) == 1 else [f"{name}.{label}" for label in self.labels]
        return self._with(self.rows, self.offsets, self.slack, names=names)

    def select(self, index: Any) -> Specification:
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
            near = offsets.to(dtype)
            offsets = torch.where(near.double() > offsets.double(), down(near), near)
        found = self._with(rows, offsets, slack)
        object.__setattr__(found, "closed", self.closed.to(rows.device))
        return found

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
        found = object.__new__(Specification)
        names = self.names if names is None else tuple(names)
        parts = (rows, offsets, self.groups, self.closed, names, slack)
        for name, value in zip(("rows", "offsets", "groups", "closed", "names", "slack"), parts, strict=True):
            object.__setattr__(found, name, value)
        return found


Spec = Specification | Tensor | Mapping[str, Any]
"""What entry points take: rows, a specification, or several of these by name."""


def as_specification(spec: Any) -> Specification:
    """Rows, a specification, or a mapping of these by name, all of which must hold; TypeError for another thing."""
    if isinstance(spec, Specification):
        return spec
    if isinstance(spec, Tensor):
        return Specification(spec)
    if isinstance(spec, Mapping) and spec:
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


def within(target: Tensor, delta: Tensor | float) -> Specification:
    """Regression: |output - target| <= delta in every output; the ends belong to it.

    Args:
        target: [*batch, outputs].
        delta: a number or what broadcasts against the target, >= 0.

    Returns:
        Rows [*batch, 2 * outputs, outputs], the lower ends first.

    Raises:
        TypeError: for a target that is no tensor.
        ValueError: for a delta that is negative or not finite.

    Sound: offsets are rounded down, so that what is fulfilled holds in real arithmetic.

    Example:
        >>> spec = ox.within(torch.tensor([1.0, 2.0]), delta=0.5)
        >>> spec.values(torch.tensor([1.25, 2.0]).double()).tolist()
        [0.75, 0.5, 0.25, 0.5]
    """
    if not isinstance(target, Tensor) or target.dim() == 0:
        raise TypeError("within: target must be a tensor [*batch, outputs]")
    y = target.detach().double()
    size = _number(delta, y.device).detach().double()
    if not bool((size >= 0).all()) or not bool(size.isfinite().all()):
        raise ValueError("within: delta must be finite and >= 0")
    n = y.shape[-1]
    eye = torch.eye(n, dtype=torch.float64, device=y.device)
    rows = torch.cat([eye, -eye]).expand(*y.shape[:-1], 2 * n, n)
    size = size.expand_as(y)
    return Specification(rows, torch.cat([_sum_down(size, -y), _sum_down(size, y)], -1), closed=True)


def _number(value: Tensor | float, device: torch.device) -> Tensor:
    """A tensor as it is; a Python number is no float32."""
    return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64, device=device)


def _sum_down(a: Tensor, b: Tensor) -> Tensor:
    """a + b rounded down; the error of a float sum is a float (Knuth 1969)."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return torch.where(error < 0, down(total), total)


def ordering(order: Tensor | Sequence[int], outputs: int) -> Specification:
    """The outputs named are in strictly falling order.

    Args:
        order: [*batch, m] of integers, the greatest first.
        outputs: of the network.

    Returns:
        Rows [*batch, m - 1, outputs], e_order[i] - e_order[i + 1].

    Raises:
        ValueError: for fewer than two outputs, or one out of range.

    Example:
        >>> ox.ordering([2, 0], outputs=3).rows
        tensor([[-1.,  0.,  1.]], dtype=torch.float64)
    """
    places = _integers("ordering", torch.as_tensor(order))
    if places.shape[-1:] < (2,):
        raise ValueError("ordering: wants at least two outputs")
    if not bool(((places >= 0) & (places < outputs)).all()):
        raise ValueError(f"ordering: outputs must lie in [0, {outputs - 1}], got {places.flatten().tolist()[:9]}")
    eye = torch.eye(outputs, dtype=torch.float64, device=places.device)
    rows = eye[places.long()]
    return Specification(rows[..., :-1, :] - rows[..., 1:, :])


def margins(labels: Tensor, classes: int) -> Tensor:
    """Rows e_label - e_other, in class order without the label.

    A row's value is logit[label] - logit[other].

    Args:
        labels: [*batch] of integers in [0, classes).
        classes: at least 2; for one output, `sign_margin`.

    Returns:
        [*batch, classes - 1, classes], float32; entry points cast it to the region's dtype.

    Raises:
        ValueError: for labels out of range.
        TypeError: for labels that are not integers.

    Example:
        >>> ox.margins(torch.tensor([1]), classes=3)
        tensor([[[-1.,  1.,  0.],
                 [ 0.,  1., -1.]]])
    """
    labels = _integers("margins", labels)
    if classes < 2:
        raise ValueError(f"margins: classes must be at least 2, got {classes}; for one output, sign_margin(labels)")
    if labels.numel() and not 0 <= (ends := [int(end) for end in labels.aminmax()])[0] <= ends[1] < classes:
        wrong = (labels < 0) | (labels >= classes)
        value = int(labels[wrong][0])
        raise ValueError(f"margins: labels must lie in [0, {classes - 1}], got {value}")
    if classes <= _FEW:
        found = _table(classes, labels.device).index_select(0, labels.long().reshape(-1))
        return found.reshape(*labels.shape, classes - 1, classes)
    return _rows(labels.long(), classes)


def sign_margin(labels: Tensor) -> Tensor:
    """Rows of a network with one output, which is positive for one class and negative for the other.

    A row's value is the output where the label is 1, minus the output elsewhere.

    Args:
        labels: [*batch] of integers: 1 for the class of positive outputs, 0 (or everywhere -1) for the other.

    Returns:
        [*batch, 1, 1], float32.

    Raises:
        ValueError: for other labels.
        TypeError: for labels that are not integers.

    Example:
        >>> ox.sign_margin(torch.tensor([1, 0])).flatten().tolist()
        [1.0, -1.0]
    """
    labels = _integers("sign_margin", labels)
    found = set(labels.unique().tolist()) if labels.numel() else set()
    if not (found <= {0, 1} or found <= {-1, 1}):
        raise ValueError(f"sign_margin: labels must be 0 and 1 (or -1 and 1), got {sorted(found)[:5]}")
    return torch.where(labels > 0, 1.0, -1.0).to(torch.float32)[..., None, None]


def label_rows(labels: Tensor, output_shape: Sequence[int], owner: str) -> Tensor:
    """The rows whose values are the margins of labels: `margins`, or `sign_margin` where there is one output.

    ValueError where the outputs [batch, *output_shape] are no class scores.
    """
    if math.prod(output_shape) == 1 and len(output_shape) <= 1:
        return sign_margin(labels)
    if len(output_shape) != 1:
        raise ValueError(
            f"{owner}: labels want outputs [batch, classes], got [batch, {', '.join(map(str, output_shape))}]: "
            "end the network in class scores, or bound rows of your own by optrelax.lower_bounds"
        )
    return margins(labels, output_shape[0])


def _integers(owner: str, labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{owner}: labels must be integers, got {labels.dtype}; use labels.long()")
    return labels


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
