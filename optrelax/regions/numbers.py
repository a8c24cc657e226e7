"""The numbers that regions are given: checked once, refused by the name of the region."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optrelax.checks import is_number, require_dense

Number = float | Tensor | object  # a Python or NumPy number, or a tensor or array of one
Numbers = float | Tensor | object  # these, or a tensor, array or nested list that broadcasts


def extremes(owner: str, x: Tensor) -> tuple[float, float]:
    """Least and greatest entry; ValueError for NaN or infinite ones."""
    if not x.numel():
        return 0.0, 0.0
    least, greatest = (float(t) for t in torch.aminmax(x.detach()))
    if not (math.isfinite(least) and math.isfinite(greatest)):
        check_finite(owner, "x", x)
    return least, greatest


def as_tensor(owner: str, what: str, value: object) -> Tensor:
    """A tensor of an array or of nested lists of numbers, in float64; a tensor as it is."""
    if isinstance(value, Tensor):
        require_dense(owner, what, value)
        return value
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
        raise TypeError(f"{owner}: {what} must be a number or a tensor, got {type(value).__name__}")
    try:
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{owner}: {what} must be numbers, got {value!r}") from error


def as_number(owner: str, what: str, value: object) -> float:
    """One number: a Python or NumPy one, or a tensor or array of one entry; TypeError or ValueError for others."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        found = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        if found.numel() != 1:
            raise ValueError(f"{owner}: {what} must be one number, got shape {tuple(found.shape)}")
        return float(found.detach())
    if not is_number(value):
        raise ValueError(f"{owner}: {what} must be a finite number, got {value!r}")
    return float(value)


def as_range(owner: str, x: Tensor, clip: object) -> tuple[float | Tensor, float | Tensor]:
    """The ends of clip, as numbers or as tensors of x's type that broadcast against x."""
    if isinstance(clip, str) or not isinstance(clip, (Sequence, Tensor)) or len(clip) != 2:
        raise TypeError(f"{owner}: clip must be (low, high) or None, got {clip!r}")
    ends: list[float | Tensor] = []
    for name, end in zip(("low", "high"), clip, strict=True):
        if is_number(end):
            ends.append(float(end))
            continue
        found = as_tensor(owner, f"clip's {name} end", end).to(x.device, torch.float64)
        ends.append(float(found.detach()) if found.dim() == 0 else _against(owner, x, found, f"clip's {name} end"))
    low, high = ends
    if not bool((torch.as_tensor(low, device=x.device) <= torch.as_tensor(high, device=x.device)).all()):
        raise ValueError(f"{owner}: clip must be (low, high) with low <= high, got {clip}")
    if any(isinstance(end, Tensor) for end in ends):
        return tuple(torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in ends)  # type: ignore[return-value]
    return low, high


def _against(owner: str, x: Tensor, value: Tensor, what: str) -> Tensor:
    """A tensor that broadcasts against x or an example of it; ValueError says what to type instead."""
    rank = x.dim()
    fits = (value.dim() in (rank, rank - 1) and value.dim() > 1) or value.dim() == rank
    if fits and all(v in (1, n) for v, n in zip(reversed(value.shape), reversed(x.shape), strict=False)):
        return value
    raise ValueError(
        f"{owner}: {what} must be a number, [batch] (eps alone), or broadcast against an example of x "
        f"{tuple(x.shape)} or x itself, got {tuple(value.shape)}{_channel_hint(x, value, what)}"
    )


def _channel_hint(x: Tensor, value: Tensor, what: str) -> str:
    if value.dim() != 1 or x.dim() < 2 or len(value) != x.shape[1]:
        return ""
    if x.dim() == 2:
        return f"; for one a feature type {what}[None]" if what == "eps" else ""
    shape = ", ".join(map(str, (len(value), *[1] * (x.dim() - 2))))
    return f"; for one a channel type {'eps' if what == 'eps' else 'torch.tensor(...)'}.reshape({shape})"


def shown(end: float | Tensor) -> object:
    return end if isinstance(end, float) else end.flatten().tolist()


def as_radius(owner: str, x: Tensor, eps: float | Tensor) -> Tensor:
    """eps as a tensor that broadcasts against x."""
    radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if radius.dim() == 1 and x.dim() > 1:
        if radius.shape[0] != x.shape[0]:
            hint = _channel_hint(x, radius, "eps")
            raise ValueError(f"{owner}: eps has {radius.shape[0]} entries for a batch of {x.shape[0]}{hint}")
        radius = radius.reshape(-1, *[1] * (x.dim() - 1))
    elif radius.dim() != 0:
        radius = _against(owner, x, radius, "eps")
    if not isinstance(eps, Tensor):
        if not eps >= 0:
            raise ValueError(f"{owner}: eps must be >= 0, got {float(eps)}")
        return radius
    worst = radius.detach().min() if radius.numel() else torch.zeros((), device="cpu")
    if bool(radius.detach().isnan().any()) or not bool(worst >= 0):
        raise ValueError(f"{owner}: eps must be >= 0, got {float(worst)}")
    return radius


def check_floating(owner: str, what: str, value: object) -> None:
    """TypeError unless a tensor, ValueError unless float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {what} must be a tensor, got {type(value).__name__}; use torch.as_tensor({what})")
    require_dense(owner, what, value)
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
