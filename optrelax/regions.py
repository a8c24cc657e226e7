"""Input regions: boxes of pixels, one an example."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optrelax.enclosures import check_order
from optrelax.rounding import down, up

Number = float | Tensor | Any  # a Python or NumPy number, or a tensor or array of one
Numbers = float | Tensor | Any  # these, or a tensor, array or nested list that broadcasts


@dataclass(frozen=True, slots=True)
class InputBox:
    """All inputs x with lower <= x <= upper, elementwise.

    Shapes [batch, *input_shape]; float32 or float64; differentiable in both ends.
    Raises ValueError for NaN, infinite ends, ends that cross, unlike shapes or dtypes.
    """

    lower: Tensor
    upper: Tensor

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
    def dtype(self) -> torch.dtype:
        """Type of both ends, and of every bound computed over this region."""
        return self.lower.dtype

    @property
    def device(self) -> torch.device:
        """Device of both ends."""
        return self.lower.device

    @property
    def center(self) -> Tensor:
        """Midpoint, [batch, *input_shape]."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half width, [batch, *input_shape]."""
        return (self.upper - self.lower) / 2

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
        found = object.__new__(InputBox)
        object.__setattr__(found, "lower", self.lower.reshape(shape))
        object.__setattr__(found, "upper", self.upper.reshape(shape))
        return found

    def select(self, index: Tensor | slice) -> InputBox:
        """The region of some of the examples."""
        return InputBox(self.lower[index], self.upper[index])


@dataclass(frozen=True, slots=True, init=False)
class LinfBall(InputBox):
    """All inputs within eps of x in the maximum norm, clipped to the legal range.

    x [batch, *input_shape]; eps a number, [batch], or what broadcasts against an example or x ([channels, 1, 1]), in
    the units of x; clip (low, high), each a number or what broadcasts against an example, or None.
    Raises ValueError for eps < 0, NaN, or an x outside clip.
    """

    x: Tensor = field(repr=False)
    eps: float | Tensor
    clip: tuple[float | Tensor, float | Tensor] | None

    def __init__(self, x: Tensor, eps: Numbers, clip: tuple[Numbers, Numbers] | None = None) -> None:
        check_floating("LinfBall", "x", x)
        if x.dim() == 0:
            raise ValueError("LinfBall: needs a batch dimension, got a scalar; pass x[None]")
        least, greatest = _extremes(x)
        size: float | Tensor = float(eps) if isinstance(eps, numbers.Real) else _numbers("eps", eps)
        radius = _radius(x, size)
        lower, upper = x - radius, x + radius
        low: float | Tensor = -math.inf
        high: float | Tensor = math.inf
        if clip is not None:
            clip = low, high = _range(x, clip)
            # In the type of x, as the ends of the box are.
            bottom, top = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high))
            if x.numel() and not (bool((bottom <= least).all()) and bool((greatest <= top).all())):
                outside = (x.detach() < bottom) | (x.detach() > top)
                if bool(outside.any()):
                    raise ValueError(
                        f"LinfBall: x lies outside clip [{_shown(low)}, {_shown(high)}] in {int(outside.sum())} of "
                        f"{outside.numel()} entries (first at {outside.nonzero()[0].tolist()}); scale pixels to the "
                        "range of clip"
                    )
            lower, upper = lower.clamp_min_(low), upper.clamp_max_(high)
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "upper", upper)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "eps", size)
        object.__setattr__(self, "clip", clip)
        # Between finite ends the box is finite and in order: only an infinite clip or an overflow needs another look.
        if clip is None or not all(bool(torch.as_tensor(end).isfinite().all()) for end in clip):
            InputBox.__post_init__(self)

    def outward(self) -> InputBox:
        """The box around the ball in real arithmetic: every point within eps, a Python number as it is, and clip."""
        # In float64 eps and clip are exact, and a sum rounds by less than one float.
        x, radius = self.x.double(), _radius(self.x.double(), self.eps)
        lower, upper = down(x - radius), up(x + radius)
        if self.clip is not None:
            lower, upper = lower.clamp_min(self.clip[0]), upper.clamp_max(self.clip[1])
        still = radius.expand_as(x) == 0
        low, high = lower.to(self.x), upper.to(self.x)
        low = torch.where(low.double() > lower, down(low), low)
        high = torch.where(high.double() < upper, up(high), high)
        return InputBox(torch.where(still, self.x, low), torch.where(still, self.x, high))


def _extremes(x: Tensor) -> tuple[float, float]:
    """Least and greatest entry; ValueError for NaN or infinite ones."""
    if not x.numel():
        return 0.0, 0.0
    least, greatest = (float(t) for t in torch.aminmax(x.detach()))
    if not (math.isfinite(least) and math.isfinite(greatest)):
        check_finite("LinfBall", "x", x)
    return least, greatest


def _numbers(what: str, value: object) -> Tensor:
    """A tensor of an array or of nested lists of numbers, in float64; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
        raise TypeError(f"LinfBall: {what} must be a number or a tensor, got {type(value).__name__}")
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"LinfBall: {what} must be numbers, got {value!r}") from error


def as_number(owner: str, what: str, value: object) -> float:
    """One number: a Python or NumPy one, or a tensor or array of one entry; TypeError or ValueError for others."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        found = torch.as_tensor(value)
        if found.numel() != 1:
            raise ValueError(f"{owner}: {what} must be one number, got shape {tuple(found.shape)}")
        return float(found.detach())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{owner}: {what} must be a finite number, got {value!r}")
    return float(value)


def _range(x: Tensor, clip: object) -> tuple[float | Tensor, float | Tensor]:
    """The ends of clip, as numbers or as tensors of x's type that broadcast against x."""
    if isinstance(clip, str) or not isinstance(clip, (Sequence, Tensor)) or len(clip) != 2:
        raise TypeError(f"LinfBall: clip must be (low, high) or None, got {clip!r}")
    ends: list[float | Tensor] = []
    for name, end in zip(("low", "high"), clip, strict=True):
        if isinstance(end, numbers.Real):
            ends.append(float(end))
            continue
        found = _numbers(f"clip's {name} end", end).to(x.device, torch.float64)
        ends.append(float(found.detach()) if found.dim() == 0 else _against(x, found, f"clip's {name} end"))
    low, high = ends
    if not bool((torch.as_tensor(low) <= torch.as_tensor(high)).all()):
        raise ValueError(f"LinfBall: clip must be (low, high) with low <= high, got {clip}")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return tuple(torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in ends)  # type: ignore[return-value]
    return low, high


def _against(x: Tensor, value: Tensor, what: str) -> Tensor:
    """A tensor that broadcasts against x or an example of it; ValueError says what to type instead."""
    rank = x.dim()
    fits = (value.dim() in (rank, rank - 1) and value.dim() > 1) or value.dim() == rank
    if fits and all(v in (1, n) for v, n in zip(reversed(value.shape), reversed(x.shape), strict=False)):
        return value
    raise ValueError(
        f"LinfBall: {what} must be a number, [batch] (eps alone), or broadcast against an example of x "
        f"{tuple(x.shape)} or x itself, got {tuple(value.shape)}{_channel_hint(x, value, what)}"
    )


def _channel_hint(x: Tensor, value: Tensor, what: str) -> str:
    if value.dim() != 1 or x.dim() < 3 or len(value) != x.shape[1]:
        return ""
    shape = ", ".join(map(str, (len(value), *[1] * (x.dim() - 2))))
    return f"; for one a channel type {'eps' if what == 'eps' else 'torch.tensor(...)'}.reshape({shape})"


def _shown(end: float | Tensor) -> object:
    return end if isinstance(end, float) else end.flatten().tolist()


def _radius(x: Tensor, eps: float | Tensor) -> Tensor:
    """eps as a tensor that broadcasts against x."""
    radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if radius.dim() == 1 and x.dim() > 1:
        if radius.shape[0] != x.shape[0]:
            hint = _channel_hint(x, radius, "eps")
            raise ValueError(f"LinfBall: eps has {radius.shape[0]} entries for a batch of {x.shape[0]}{hint}")
        radius = radius.reshape(-1, *[1] * (x.dim() - 1))
    elif radius.dim() != 0:
        radius = _against(x, radius, "eps")
    if not isinstance(eps, Tensor):
        if not eps >= 0:
            raise ValueError(f"LinfBall: eps must be >= 0, got {float(eps)}")
        return radius
    worst = radius.detach().min() if radius.numel() else torch.zeros(())
    if bool(radius.detach().isnan().any()) or not bool(worst >= 0):
        raise ValueError(f"LinfBall: eps must be >= 0, got {float(worst)}")
    return radius


def check_floating(owner: str, what: str, value: object) -> None:
    """TypeError unless a tensor, ValueError unless float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {what} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{owner}: {what} must be float32 or float64, got {value.dtype}; use {what}.float()")


def check_finite(owner: str, what: str, value: Tensor) -> None:
    """ValueError for NaN or infinite entries, saying how many and where first."""
    # One cheap pass where all is well: a sum is finite only of finite terms.
    if bool(value.detach().sum().isfinite()):
        return
    wrong = ~value.detach().isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"{owner}: {what} has {int(wrong.sum())} NaN or infinite of {wrong.numel()} entries "
            f"(first at {wrong.nonzero()[0].tolist()})"
        )
