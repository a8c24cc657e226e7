"""What a region of inputs is: all that relaxations, layers, attacks and losses ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from optrelax.errors import UnsupportedRegionError
from optrelax.frozen import field_values, filled

if TYPE_CHECKING:
    from optrelax.regions.boxes import InputBox

R = TypeVar("R", bound="Region")


class Support(NamedTuple):
    """Least values of rows with what their rounding scales with, [batch, k] each.

    value - gamma(terms + 2) * magnitude - underflow(terms + 2) is a lower bound in real arithmetic.
    """

    value: Tensor
    magnitude: Tensor
    terms: int


class Polyhedron(NamedTuple):
    """The hull of one example, n numbers within the region's box, as rows: least <= A x + B y <= greatest.

    A [m, n], B [m, e]; y are e numbers between lower and upper; whole numbers where the region is not its hull.
    """

    A: Tensor
    B: Tensor
    least: Tensor
    greatest: Tensor
    lower: Tensor
    upper: Tensor
    whole: bool = False

    @classmethod
    def of_box(cls, like: Tensor) -> Polyhedron:
        """No rows beside the box, [n] like this."""
        none, n = like.new_zeros(0), len(like)
        return cls(like.new_zeros(0, n), like.new_zeros(0, 0), none, none, none, none)


class Region(ABC):
    """A set of inputs for each example of a batch: a frozen dataclass whose tensors begin with the batch.

    A new one states its support function, the box around it, and its points; everything else follows. Rows
    [batch or 1, k, *input_shape] are linear functions of the input. What is bounded is the convex hull.

    Sound: `outward_support` holds in real arithmetic.  Exact: `support`, to rounding.  Gradient: in the region's
    numbers and the rows, at the points of `lowest`.

    Example:
        >>> region = ox.L2Ball(torch.zeros(2, 3), eps=1.0)
        >>> isinstance(region, ox.Region), tuple(region.shape)
        (True, (2, 3))
        >>> region.support(torch.tensor([[[3.0, 0.0, 4.0]]])).tolist()  # -eps |a|, of each example
        [[-5.0], [-5.0]]
        >>> inside = region.project(torch.full((2, 3), 9.0))
        >>> region.contains(inside)
        tensor([True, True])
    """

    __slots__ = ()

    @property
    @abstractmethod
    def center(self) -> Tensor:
        """A point of the region's hull, its middle as far as it has one: [batch, *input_shape]."""

    @abstractmethod
    def box(self, outward: bool = False) -> InputBox:
        """A box around the region, outward in real arithmetic; the smallest where that is cheap.

        Differentiable to nearest.
        """

    @abstractmethod
    def support(self, rows: Tensor) -> Tensor:
        """Least value of each row over the region: [batch, k].  Exact to rounding; gradient: `lowest`, and the ends."""

    @abstractmethod
    def outward_support(self, rows: Tensor) -> Support:
        """A lower bound of the least value with what its rounding scales with."""

    @abstractmethod
    def lowest(self, rows: Tensor) -> Tensor:
        """Where a row takes its least value, to rounding, [batch, k, *input_shape]; without gradient."""

    @abstractmethod
    def contains(self, x: Tensor) -> Tensor:
        """Which examples of x [batch, *input_shape] lie in the region, with no tolerance: [batch] of bool."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Points of the region near x [batch, *input_shape]; `contains` says so."""

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Random points of the region, [count, *shape], of which `project` has to be taken for `contains`.

        Drawn in `dtype` (default: the region's) on the generator's device.
        """

    # --- what follows ---

    @property
    def shape(self) -> torch.Size:
        """[batch, *input_shape]."""
        return self.center.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the region's numbers, and of every bound computed over it."""
        return self.center.dtype

    @property
    def device(self) -> torch.device:
        """Device of the region's numbers."""
        return self.center.device

    @property
    def like(self) -> Tensor:
        """Some tensor of the region's type and device."""
        return self.center

    @property
    def origin(self) -> Tensor:
        """The input that the region is about: that of a ball, else the middle; [batch, *input_shape]."""
        return self.center

    @property
    def as_box(self) -> InputBox | None:
        """The region itself where it is a box; `box` is around any."""
        return None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is asked for any of its numbers."""
        return any(isinstance(t, Tensor) and t.requires_grad for t in _parts(self))

    def extent(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each row: [batch, k] each."""
        return self.support(rows), -self.support(-rows)

    def attained(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Least values [batch, k], differentiable, and where they are taken, [batch, k, *input_shape], constants."""
        points = self.lowest(rows)
        if torch.is_grad_enabled() and self.requires_grad:
            return self.support(rows), points
        # By the minimiser (Danskin): the gradient in the rows alone.
        return (rows * points).flatten(2).sum(2), points

    def into_hull(self, x: Tensor) -> Tensor:
        """Points of the region's hull near x [batch, *input_shape]."""
        return self.project(x)

    def polyhedron(self) -> Polyhedron | None:
        """The rows that cut the hull of a single example's points out of the box; None where it is no polyhedron."""
        return None

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of steepest descent that leads from the middle to the edge, [batch, *input_shape]."""
        return self.lowest(gradient[:, None])[:, 0] - self.center

    def outward(self) -> Region:
        """A region of the same type that holds in real arithmetic what this one stands for; by default itself."""
        return self

    def enclosing(self, dtype: torch.dtype) -> Region:
        """A region of another type that holds this one in real arithmetic."""
        if dtype == self.dtype:
            return self
        raise UnsupportedRegionError(f"{type(self).__name__}: cannot be rounded to {dtype}; build it in that type")

    def reshape(self, *shape: int) -> Region:
        """The same region with its dimensions spelt out, batch first; ValueError where the batch would be another."""
        if tuple(self.center.reshape(shape).shape) != tuple(self.shape):
            raise ValueError(
                f"{type(self).__name__}: its norm is over all of {tuple(self.shape[1:])}, the network wants "
                f"{tuple(shape[1:])}; give it one batch dimension before the network's input"
            )
        return self

    def combine(self: R, change: Callable[..., Tensor], *others: R) -> R:
        """`change(mine, *theirs)` in place of every tensor, which begins with the batch before and after."""
        values = field_values(self)
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value, *(getattr(other, name) for other in others))
        return filled(object.__new__(type(self)), **values)

    def select(self: R, index: Tensor | slice) -> R:
        """The region of some of the examples."""
        return self.combine(lambda t: t[index])

    def detach(self: R) -> R:
        """The same as constants."""
        return self.combine(Tensor.detach)

    def to(self: R, dtype: torch.dtype, device: torch.device | None = None) -> R:
        """The same with its numbers rounded to another type; on this device where none is given."""
        return self.combine(lambda t: t.to(t.device if device is None else device, dtype))


def _parts(region: Region) -> list[object]:
    return list(field_values(region).values())


def require_polyhedron(owner: str, region: Region, instead: str) -> Polyhedron:
    """The rows of a region; UnsupportedRegionError where it has none, which says what takes it instead."""
    found = region.polyhedron()
    if found is not None:
        return found
    kinds = "boxes, L1Ball, Polytope, ChoiceBox"
    raise UnsupportedRegionError(f"{owner}: takes polyhedra ({kinds}), got {type(region).__name__}; {instead}")
