"""Boxes cut by halfspaces: the support function is a linear program, solved by the library's own layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.frozen import filled
from optrelax.kernels.relax_step import rows_dot
from optrelax.networks.ops import flatten_from
from optrelax.regions.base import Polyhedron, Region, Support
from optrelax.regions.boxes import InputBox
from optrelax.regions.numbers import check_finite, check_floating
from optrelax.rounding import Rounding, cast_up, gamma, tiny, underflow, up

if TYPE_CHECKING:
    from optrelax.layers.programs.linear_program import LinearProgram
    from optrelax.layers.solutions import LPSolution


@dataclass(frozen=True, slots=True, init=False)
class Polytope(Region):
    """All inputs x of a box with A x <= b.

    Support: one linear program a row (`LinearProgram`, "auto"), its bound made safe from the multipliers: an inaccurate
    solver can be loose, never wrong.

    Args:
        A: [m, n] or [batch, m, n], n the entries of an input.
        b: [m] or [batch, m].
        lower: [batch, *input_shape], of the box.
        upper: like lower.

    Raises:
        ValueError: for shapes or types that do not fit, and where no point keeps all rows strictly: write equalities
            into the network instead.

    Gradient: of the optimal value, in A, b and the box.

    Example:
        >>> total = torch.ones(1, 2)  # x0 + x1 <= 1
        >>> region = ox.Polytope(total, torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
        >>> low = region.support(torch.tensor([[[-1.0, -2.0]]]))  # at (0, 1)
        >>> torch.allclose(low, torch.tensor(-2.0), atol=1e-4)
        True
    """

    lower: Tensor
    upper: Tensor
    A: Tensor
    """[batch, m, n]."""
    b: Tensor
    """[batch, m]."""
    inner: Tensor
    """The point that lies deepest behind all rows, [batch, *input_shape]; a constant."""

    def __init__(self, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor) -> None:
        box = InputBox(lower, upper)
        batch, n = lower.shape[0], flatten_from(lower, 1).shape[1]
        for name, value in (("A", A), ("b", b)):
            check_floating("Polytope", name, value)
            check_finite("Polytope", name, value)
            if value.dtype != lower.dtype:
                raise ValueError(f"Polytope: {name} is {value.dtype}, the box is {lower.dtype}")
        if A.dim() not in (2, 3) or A.shape[-1] != n or (A.dim() == 3 and len(A) != batch):
            raise ValueError(f"Polytope: A wants [m, {n}] or [{batch}, m, {n}], got {tuple(A.shape)}")
        m = A.shape[-2]
        if b.dim() not in (1, 2) or b.shape[-1] != m or (b.dim() == 2 and len(b) != batch):
            raise ValueError(f"Polytope: b wants [{m}] or [{batch}, {m}], got {tuple(b.shape)}")
        A, b = A.expand(batch, m, n), b.expand(batch, m)
        inner = _deepest(box, A.detach(), b.detach()).reshape(lower.shape)
        filled(self, lower=box.lower, upper=box.upper, A=A, b=b, inner=inner)

    @property
    def center(self) -> Tensor:
        """The point that lies deepest behind all rows."""
        return self.inner

    def box(self, outward: bool = False) -> InputBox:
        """The box that is cut: the rows may leave less of it."""
        return InputBox.known(self.lower, self.upper)

    def support(self, rows: Tensor) -> Tensor:
        """Least value of each row, [batch, k], from below by as much as the solver's gap."""
        found: Tensor = self._solved(rows, "nearest").lower
        return found

    def outward_support(self, rows: Tensor) -> Support:
        """The bound of the multipliers found, in real arithmetic."""
        value = self._solved(rows.detach(), "outward").lower.detach()
        reach = torch.maximum(self.lower.abs(), self.upper.abs()) + tiny(rows.dtype)
        return Support(value, rows_dot(flatten_from(rows, 2).abs(), flatten_from(reach, 1)), 0)

    def lowest(self, rows: Tensor) -> Tensor:
        """The solver's points."""
        with torch.no_grad():
            found = self._solved(rows, "nearest").primal
            return found.reshape(*found.shape[:2], *self.shape[1:])

    def attained(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Safe bounds, and the solver's points."""
        found = self._solved(rows, "nearest")
        return found.lower, found.primal.detach().reshape(*found.primal.shape[:2], *self.shape[1:])

    def polyhedron(self) -> Polyhedron:
        """Its own rows."""
        A, b, none = self.A[0].detach(), self.b[0].detach(), self.b.new_zeros(0)
        return Polyhedron(A, A.new_zeros(len(b), 0), torch.full_like(b, -torch.inf), b, none, none)

    def direction(self, gradient: Tensor) -> Tensor:
        """Against the sign of the gradient, by the radius of the box: no program is solved a step."""
        return self.box().direction(gradient)

    def contains(self, x: Tensor) -> Tensor:
        """Which examples keep every row and the box, with no tolerance: near a side only what provably does."""
        flat, A, b = flatten_from(x, 1).double(), self.A.double(), self.b.double()
        value = (A @ flat[..., None])[..., 0]
        size = (A.abs() @ flat.abs()[..., None])[..., 0]
        terms = A.shape[2] + 4
        inside = (value + 2 * gamma(terms, torch.float64) * size + underflow(terms, torch.float64) <= b).all(1)
        return inside & self.box().contains(x)

    def project(self, x: Tensor) -> Tensor:
        """Into the box, then towards the deepest point as far as the rows ask."""
        y = x.clamp(self.lower, self.upper)
        wide = [1] * (x.dim() - 1)

        def slack(t: Tensor) -> Tensor:
            return self.b - (self.A @ flatten_from(t, 1)[..., None])[..., 0]

        room, left = slack(self.inner), slack(y)
        share = torch.where(left < 0, room / torch.where(left < 0, room - left, 1.0), 1.0)
        share = share.amin(1) if share.shape[1] else share.new_ones(len(x))
        found = y
        for shrunk in range(60):
            inside = self.contains(found)
            if bool(inside.all()):
                return found
            moved = self.inner + share.reshape(-1, *wide) * (y - self.inner)
            found = torch.where(inside.reshape(-1, *wide), found, moved.clamp(self.lower, self.upper))
            share = share * (0.5 if shrunk else 1 - 1e-6)  # towards the deepest point: first a hair, then by halves
        return torch.where(self.contains(found).reshape(-1, *wide), found, self.inner)

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform points of the box, moved behind the rows: [count, *shape]."""
        return torch.stack([self.project(x) for x in self.box().sample(count, generator, dtype)])

    def enclosing(self, dtype: torch.dtype) -> Region:
        """A polytope of another type that holds this one: its sides move out by what their slopes lose."""
        if dtype == self.dtype:
            return self
        box = self.box().enclosing(dtype)
        reach = flatten_from(torch.maximum(self.lower.abs(), self.upper.abs()), 1).double()
        A = self.A.to(dtype)
        lost = ((self.A.double() - A.double()).abs() @ reach[..., None])[..., 0]
        b = up(self.b.double() + lost * (1 + 2 * gamma(A.shape[2] + 4, torch.float64)))
        inner = self.inner.to(dtype).clamp(box.lower, box.upper)
        found = object.__new__(Polytope)
        return filled(found, lower=box.lower, upper=box.upper, A=A, b=cast_up(b, dtype), inner=inner)

    def _solved(self, rows: Tensor, rounding: Rounding) -> LPSolution:
        flat = flatten_from(rows, 2)
        ends = (flatten_from(t, 1)[:, None] for t in (self.lower, self.upper))
        low, high = ends
        c = flat.expand(len(self.lower), *flat.shape[1:])
        return _program(rounding)(c, self.A[:, None], self.b[:, None], lower=low, upper=high)


def _program(rounding: Rounding) -> LinearProgram:
    """The layer of linear programs, on first use: the core does not import the layers."""
    from optrelax.layers.programs.linear_program import LinearProgram

    return LinearProgram(rounding=rounding)


def _deepest(box: InputBox, A: Tensor, b: Tensor) -> Tensor:
    """The centre of the largest ball behind all rows, [batch, n]; ValueError where there is none."""
    lower, upper = (flatten_from(t.detach(), 1).double() for t in (box.lower, box.upper))
    A, b = A.double(), b.double()
    batch, n = lower.shape
    if not A.shape[1] or not batch:
        return box.center.detach().flatten(1)
    length = torch.linalg.vector_norm(A, dim=2)
    reach = (A.abs() @ torch.maximum(lower.abs(), upper.abs())[..., None])[..., 0] + b.abs()
    # Deep enough for any point of the box, and far enough outside.
    most = (reach / torch.where(length > 0, length, 1.0)).amax(1, keepdim=True) + 1
    rows = torch.cat([A, length[..., None]], 2)
    c = torch.cat([lower.new_zeros(n), lower.new_full((1,), -1.0)])
    found = _program("nearest")(
        c.expand(batch, -1), rows, b, lower=torch.cat([lower, -most], 1), upper=torch.cat([upper, most], 1)
    ).primal
    inner = found[:, :n].to(box.lower.dtype).clamp(flatten_from(box.lower, 1), flatten_from(box.upper, 1))
    slack = b - (A @ inner.double()[..., None])[..., 0]
    flat = (slack <= 0).any(1)
    if bool(flat.any()):
        raise ValueError(
            f"Polytope: example {int(flat.nonzero()[0])} has no point that keeps all rows strictly; it is empty or flat"
        )
    return inner
