"""Boxes: intervals of inputs, and the ball of the maximum norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optrelax.checks import is_number
from optrelax.enclosures import check_order
from optrelax.errors import UnsupportedRegionError
from optrelax.frozen import filled
from optrelax.kernels.band_step import range_over_box
from optrelax.kernels.relax_step import least_over_box, rows_dot
from optrelax.networks.ops import flatten_from
from optrelax.regions.base import Polyhedron, Region, Support
from optrelax.regions.numbers import (
    Numbers,
    as_radius,
    as_range,
    as_tensor,
    check_finite,
    check_floating,
    extremes,
    shown,
)
from optrelax.regions.registry import register_ball
from optrelax.rounding import cast_down, cast_up, down, tiny, up


@dataclass(frozen=True, slots=True)
class InputBox(Region):
    """All inputs x with lower <= x <= upper, elementwise.

    Args:
        lower: [batch, *input_shape], float32 or float64.
        upper: like lower.

    Raises:
        ValueError: for NaN, infinite ends, ends that cross, unlike shapes or dtypes.

    Gradient: in both ends.

    Example:
        >>> region = ox.InputBox(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
        >>> region.center, region.radius
        (tensor([[0.5000, 1.0000]]), tensor([[0.5000, 1.0000]]))
        >>> region.support(torch.tensor([[[1.0, -1.0]]]))
        tensor([[-2.]])
    """

    lower: Tensor
    upper: Tensor

    @property
    def as_box(self) -> InputBox:
        return self

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_floating(name, "lower", self.lower)
        check_floating(name, "upper", self.upper)
        if self.lower.shape != self.upper.shape:
            raise ValueError(f"{name}: lower has shape {tuple(self.lower.shape)}, upper has {tuple(self.upper.shape)}")
        if self.lower.dtype != self.upper.dtype:
            raise ValueError(f"{name}: lower is {self.lower.dtype}, upper is {self.upper.dtype}")
        if self.lower.dim() == 0:
            raise ValueError(f"{name}: needs a batch dimension, got a scalar; pass x[None]")
        check_finite(name, "lower", self.lower)
        check_finite(name, "upper", self.upper)
        check_order(name, self.lower, self.upper)

    @property
    def shape(self) -> torch.Size:
        """[batch, *input_shape]."""
        return self.lower.shape

    @property
    def like(self) -> Tensor:
        """Some tensor of the region's type and device."""
        return self.lower

    @property
    def center(self) -> Tensor:
        """Midpoint, [batch, *input_shape]."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half width, [batch, *input_shape]."""
        return (self.upper - self.lower) / 2

    @property
    def dtype(self) -> torch.dtype:
        """Type of both ends, and of every bound computed over this region."""
        return self.lower.dtype

    @property
    def device(self) -> torch.device:
        """Device of both ends."""
        return self.lower.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is asked for either end."""
        return self.lower.requires_grad or self.upper.requires_grad

    def box(self, outward: bool = False) -> InputBox:
        """Itself."""
        return self

    def support(self, rows: Tensor) -> Tensor:
        """Least value of each row, [batch, k], by a compiled pass.

        Gradient: exact, to any order; in a coefficient of 0 the middle of the box.
        """
        return least_over_box(rows, self.lower, self.upper)

    def extent(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each row, in one pass: [batch, k] each."""
        return range_over_box(rows, self.lower, self.upper)

    def outward_support(self, rows: Tensor) -> Support:
        """The least value, half sums and differences of the ends rounded by an ulp of their magnitude each."""
        # Below the normal range an ulp is that of `tiny`.
        reach = self.center.abs() + self.radius + tiny(rows.dtype)
        size = rows_dot(flatten_from(rows, 2).abs(), flatten_from(reach, 1))
        return Support(self.support(rows), size, 2 * math.prod(self.shape[1:]) + 4)

    def polyhedron(self) -> Polyhedron:
        """No rows."""
        return Polyhedron.of_box(flatten_from(self.lower, 1)[0])

    def lowest(self, rows: Tensor) -> Tensor:
        """The corner that each row chooses, [batch, k, *input_shape], to rounding."""
        with torch.no_grad():
            return self.center[:, None] - torch.copysign(self.radius[:, None], rows)

    def direction(self, gradient: Tensor) -> Tensor:
        """Against the sign of the gradient, by the radius."""
        return -self.radius * gradient.sign()

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the box."""
        return x.clamp(self.lower, self.upper)

    def sample(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform points, [count, *shape]; rounding may carry one beyond an end."""
        # Drawn on the generator's device: the same numbers wherever the region is.
        device = torch.device("cpu") if generator is None else generator.device
        uniform = torch.rand((count, *self.shape), generator=generator, dtype=dtype or self.dtype, device=device)
        return self.lower + uniform.to(self.lower) * (self.upper - self.lower)

    def contains(self, x: Tensor) -> Tensor:
        """Which examples of x [batch, *input_shape] lie in the region, with no tolerance: [batch] of bool."""
        inside = (x >= self.lower) & (x <= self.upper)
        return inside.flatten(1).all(1) if inside.dim() > 1 else inside

    def outward(self) -> InputBox:
        """The region one float wider at each end of what has a width: covers ends that were rounded once."""
        wide = self.upper > self.lower
        return InputBox(torch.where(wide, down(self.lower), self.lower), torch.where(wide, up(self.upper), self.upper))

    def reshape(self, *shape: int) -> InputBox:
        """The same ends in another shape, batch dimension included; as a plain box, which needs no second check."""
        return self.known(self.lower.reshape(shape), self.upper.reshape(shape))

    @staticmethod
    def known(lower: Tensor, upper: Tensor) -> InputBox:
        """A box of ends that are known to be in order."""
        return filled(object.__new__(InputBox), lower=lower, upper=upper)

    def combine(self, change: Callable[..., Tensor], *others: InputBox) -> InputBox:
        """As `Region.combine`; as a plain box."""
        ends = [(self.lower, *(o.lower for o in others)), (self.upper, *(o.upper for o in others))]
        return self.known(*(change(*of) for of in ends))

    def enclosing(self, dtype: torch.dtype) -> InputBox:
        """The smallest box of another type that holds this one."""
        return InputBox.known(cast_down(self.lower, dtype), cast_up(self.upper, dtype))


@register_ball("linf")
@dataclass(frozen=True, slots=True, init=False)
class LinfBall(InputBox):
    """All inputs within eps of x in the maximum norm, clipped to the legal range.

    Args:
        x: [batch, *input_shape].
        eps: a number, [batch], or what broadcasts against an example or x ([channels, 1, 1]), in the units of x.
        clip: (low, high), each a number or what broadcasts against an example, or None.

    Raises:
        ValueError: for eps < 0, NaN, or an x outside clip.

    Gradient: in x and eps.

    Example:
        >>> region = ox.LinfBall(torch.tensor([[0.0, 0.5]]), eps=0.25, clip=(0.0, 1.0))
        >>> region.lower, region.upper
        (tensor([[0.0000, 0.2500]]), tensor([[0.2500, 0.7500]]))
    """

    x: Tensor = field(repr=False)
    eps: float | Tensor
    clip: tuple[float | Tensor, float | Tensor] | None

    def __init__(self, x: Tensor, eps: Numbers, clip: tuple[Numbers, Numbers] | None = None) -> None:
        check_floating("LinfBall", "x", x)
        if x.dim() == 0:
            raise ValueError("LinfBall: needs a batch dimension, got a scalar; pass x[None]")
        least, greatest = extremes("LinfBall", x)
        size: float | Tensor = float(eps) if is_number(eps) else as_tensor("LinfBall", "eps", eps)
        radius = as_radius("LinfBall", x, size)
        lower, upper = x - radius, x + radius
        low: float | Tensor = -math.inf
        high: float | Tensor = math.inf
        if clip is not None:
            clip = low, high = as_range("LinfBall", x, clip)
            # In the type of x, as the ends of the box are.
            bottom, top = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high))
            if x.numel() and not (bool((bottom <= least).all()) and bool((greatest <= top).all())):
                outside = (x.detach() < bottom) | (x.detach() > top)
                if bool(outside.any()):
                    raise ValueError(
                        f"LinfBall: x lies outside clip [{shown(low)}, {shown(high)}] in {int(outside.sum())} of "
                        f"{outside.numel()} entries (first at {outside.nonzero()[0].tolist()}); scale pixels to the "
                        "range of clip"
                    )
            lower, upper = lower.clamp_min_(low), upper.clamp_max_(high)
        filled(self, lower=lower, upper=upper, x=x, eps=size, clip=clip)
        # Between finite ends the box is finite and in order: only an infinite clip or an overflow needs another look.
        if clip is None or not all(bool(torch.as_tensor(end, device=x.device).isfinite().all()) for end in clip):
            InputBox.__post_init__(self)

    @classmethod
    def length(cls, d: Tensor) -> Tensor:
        """Greatest absolute value over the last dimension."""
        return d.abs().amax(-1) if d.shape[-1] else d.sum(-1)

    @property
    def origin(self) -> Tensor:
        """x."""
        return self.x

    def outward(self) -> InputBox:
        """The box around the ball in real arithmetic: every point within eps, a Python number as it is, and clip."""
        # In float64 eps and clip are exact, and a sum rounds by less than one float.
        x, radius = self.x.double(), as_radius("LinfBall", self.x.double(), self.eps)
        lower, upper = down(x - radius), up(x + radius)
        if self.clip is not None:
            lower, upper = lower.clamp_min(self.clip[0]), upper.clamp_max(self.clip[1])
        still = radius.expand_as(x) == 0
        low, high = cast_down(lower, self.dtype), cast_up(upper, self.dtype)
        return InputBox(torch.where(still, self.x, low), torch.where(still, self.x, high))


def require_box(owner: str, region: Region, instead: str) -> InputBox:
    """The region, a box; UnsupportedRegionError for another kind, which says what takes it instead."""
    if (found := region.as_box) is not None:
        return found
    raise UnsupportedRegionError(f"{owner}: takes boxes (InputBox, LinfBall), got {type(region).__name__}; {instead}")
