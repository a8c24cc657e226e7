"""Boxes with discrete choices: some coordinates take one of several values, the others move in intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.frozen import filled
from optrelax.kernels.relax_step import rows_dot
from optrelax.networks.ops import flatten_from
from optrelax.regions.base import Polyhedron, Region, Support
from optrelax.regions.boxes import InputBox
from optrelax.regions.numbers import check_finite
from optrelax.rounding import tiny


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Coordinates [g] of the flattened input that take one of the rows of `values` [m, g] together."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, init=False)
class ChoiceBox(Region):
    """All inputs of a box in which groups of coordinates take any of a few values: the region of individual fairness.

    Bounds are over the convex hull; the support function is that of the set itself: the least of the choices of each
    group, and the box.

    Args:
        lower: [batch, *input_shape], of the other coordinates; at the groups' own coordinates it is not read.
        upper: like lower.
        choices: {coordinate or tuple of coordinates of the flattened input: values [m] or [m, g]}; groups do not
            overlap.

    Raises:
        ValueError: for coordinates out of range or twice, and for values that do not fit.

    Gradient: in the rows and in the box.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 0.4]])  # two entries of a sensitive attribute, one hot, and a number
        >>> either = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> region = ox.ChoiceBox(x - 0.1, x + 0.1, {(0, 1): either})
        >>> region.support(torch.tensor([[[1.0, 2.0, 0.0]]])).tolist()
        [[1.0]]
    """

    lower: Tensor
    upper: Tensor
    """Ends of the box around: at the groups' coordinates those of their values."""
    choices: tuple[Choice, ...]

    def __init__(self, lower: Tensor, upper: Tensor, choices: Mapping[int | tuple[int, ...], Tensor]) -> None:
        InputBox(lower, upper)
        n = flatten_from(lower, 1).shape[1]
        groups = tuple(_choice(key, values, n, lower) for key, values in choices.items())
        taken = [i for group in groups for i in group.index.tolist()]
        if len(set(taken)) < len(taken):
            raise ValueError("ChoiceBox: a coordinate stands in two groups, or twice in one")
        ends = []
        for end, least in ((lower, True), (upper, False)):
            flat = flatten_from(end, 1)
            for group in groups:
                extreme = group.values.amin(0) if least else group.values.amax(0)
                flat = flat.index_copy(1, group.index, extreme.expand(len(flat), -1))
            ends.append(flat.reshape(end.shape))
        filled(self, lower=ends[0], upper=ends[1], choices=groups)

    @property
    def center(self) -> Tensor:
        """The middle of the box, and of each group's values."""
        flat = flatten_from((self.lower + self.upper) / 2, 1)
        for group in self.choices:
            flat = flat.index_copy(1, group.index, group.values.mean(0).expand(len(flat), -1))
        return flat.reshape(self.lower.shape)

    @property
    def like(self) -> Tensor:
        """An end of the box."""
        return self.lower

    def box(self, outward: bool = False) -> InputBox:
        """The smallest box around."""
        return InputBox.known(self.lower, self.upper)

    def support(self, rows: Tensor) -> Tensor:
        """Least value of each row, [batch, k]."""
        flat = flatten_from(rows, 2)
        total = self.box().support(self._without_groups(flat).reshape(rows.shape))
        for group in self.choices:
            total = total + (flat[:, :, group.index] @ group.values.mT).amin(2)
        return total

    def outward_support(self, rows: Tensor) -> Support:
        """The least value; every term is at most the coefficient times the greatest entry."""
        reach = torch.maximum(self.lower.abs(), self.upper.abs()) + tiny(rows.dtype)
        size = rows_dot(flatten_from(rows, 2).abs(), flatten_from(reach, 1))
        return Support(self.support(rows), 2 * size, 2 * reach[0].numel() + len(self.choices) + 8)

    def lowest(self, rows: Tensor) -> Tensor:
        """The corner and the choices that each row takes."""
        with torch.no_grad():
            flat = flatten_from(rows, 2)
            points = flatten_from(self.box().lowest(rows), 2)
            for group in self.choices:
                best = (flat[:, :, group.index] @ group.values.mT).argmin(2)
                points[:, :, group.index] = group.values[best].expand(*points.shape[:2], -1)
            return points.reshape(*points.shape[:2], *self.shape[1:])

    def polyhedron(self) -> Polyhedron:
        """With a share a choice: a group's coordinates are the shares' mean of its values, the shares sum to 1."""
        n, count = flatten_from(self.lower, 1).shape[1], sum(len(group.values) for group in self.choices)
        like, begin = self.lower.detach(), 0
        parts, sides = [], []
        for group in self.choices:
            size, width = len(group.values), len(group.index)
            A, B = like.new_zeros(width + 1, n), like.new_zeros(width + 1, count)
            A[torch.arange(width, device="cpu"), group.index] = -1.0
            B[:width, begin : begin + size], B[width, begin : begin + size] = group.values.mT, 1.0
            begin += size
            parts.append((A, B))
            sides.append(torch.cat([like.new_zeros(width), like.new_ones(1)]))
        if not parts:
            return Polyhedron.of_box(flatten_from(like, 1)[0])
        A, B, side = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]), torch.cat(sides)
        return Polyhedron(A, B, side, side, like.new_zeros(count), like.new_ones(count), whole=True)

    def contains(self, x: Tensor) -> Tensor:
        """Which examples lie in the set, with no tolerance: each group at one of its values, to the bit."""
        inside = self.box().contains(x)
        flat = flatten_from(x, 1)
        for group in self.choices:
            inside &= (flat[:, None, group.index] == group.values).all(2).any(1)
        return inside

    def project(self, x: Tensor) -> Tensor:
        """The nearest point: of the box, and of each group's values."""
        flat = flatten_from(x.clamp(self.lower, self.upper), 1)
        for group in self.choices:
            best = (flat[:, None, group.index] - group.values).square().sum(2).argmin(1)
            flat = flat.index_copy(1, group.index, group.values[best].to(flat))
        return flat.reshape(x.shape)

    def into_hull(self, x: Tensor) -> Tensor:
        """As `project`, but single coordinates may lie between their values: a point of the hull."""
        clamped = flatten_from(x.clamp(self.lower, self.upper), 1)
        flat = flatten_from(self.project(x), 1)
        for group in self.choices:
            if len(group.index) == 1:
                flat = flat.index_copy(1, group.index, clamped[:, group.index])
        return flat.reshape(x.shape)

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform points of the box with uniform choices: [count, *shape]."""
        points = flatten_from(self.box().sample(count, generator, dtype), 2)
        device = torch.device("cpu") if generator is None else generator.device
        for group in self.choices:
            drawn = torch.randint(len(group.values), points.shape[:2], generator=generator, device=device)
            points[:, :, group.index] = group.values[drawn.to(points.device)]
        return points.reshape(count, *self.shape)

    def enclosing(self, dtype: torch.dtype) -> Region:
        """The box rounded outward; values that another type would round are refused."""
        if dtype == self.dtype:
            return self
        box = self.box().enclosing(dtype)
        groups: dict[int | tuple[int, ...], Tensor] = {}
        for group in self.choices:
            values = group.values.to(dtype)
            if not bool((values.double() == group.values.double()).all()):
                raise ValueError(f"ChoiceBox: {dtype} would round values of the choices; compute in {self.dtype}")
            groups[tuple(group.index.tolist())] = values
        return ChoiceBox(box.lower, box.upper, groups)

    def combine(self, change: Callable[..., Tensor], *others: ChoiceBox) -> ChoiceBox:
        """As `Region.combine`; the values follow the type and the device of the box."""
        found = Region.combine(self, change, *others)
        groups = tuple(Choice(g.index.to(found.lower.device), g.values.to(found.lower)) for g in self.choices)
        return filled(found, choices=groups)

    def _without_groups(self, flat: Tensor) -> Tensor:
        if not self.choices:
            return flat
        return flat.index_fill(2, torch.cat([group.index for group in self.choices]), 0.0)


def _choice(key: int | Sequence[int], values: Tensor, n: int, like: Tensor) -> Choice:
    found = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if isinstance(key, int):
        keys, found = [key], found[:, None] if found.dim() == 1 else found
    else:
        keys = list(key)
    index = torch.as_tensor(keys, dtype=torch.int64, device=like.device)
    if index.numel() == 0 or not bool(((index >= 0) & (index < n)).all()):
        raise ValueError(f"ChoiceBox: coordinates must lie in [0, {n}), got {key}")
    if found.dim() != 2 or found.shape[0] == 0 or found.shape[1] != len(index):
        raise ValueError(f"ChoiceBox: values of {key} want [choices, {len(index)}], got {tuple(found.shape)}")
    check_finite("ChoiceBox", f"values of {key}", found)
    return Choice(index, found)
