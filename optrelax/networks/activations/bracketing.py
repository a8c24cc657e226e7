"""Roots of elementwise functions between two points of different sign, all entries at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MOST = 120
_SOON = 5  # evaluations before entries that are done are left out


def root(
    function: Callable[..., Tensor],
    a: Tensor,
    b: Tensor,
    args: tuple[Tensor, ...],
    start: Tensor | float,
    tolerance: float,
    unit: float = 1.0,
) -> Tensor:
    """A point of each [a, b] within tolerance * max(unit, |x|) of where function(x, *args) leaves the sign `start`.

    It changes its sign once at most: where it has `start` throughout, b, where it never has, a.  args: like a.  Wide
    brackets are halved in their order of magnitude, so that an end at 1e300 costs a dozen evaluations more than one at
    10.  Gradient: none.
    Source: Chandrupatla 1997 (bracketed inverse quadratic interpolation).
    """
    with torch.no_grad():
        shape = a.shape
        a, b, *rest = (t.detach().reshape(-1) for t in (a, b, *args))
        args = tuple(rest)
        at_a, at_b = function(a, *args), function(b, *args)
        signed = start.reshape(-1) if isinstance(start, Tensor) else start
        best = torch.where(at_a * signed > 0, b, a)
        index = ((at_a * signed > 0) & (at_b * signed < 0)).nonzero()[:, 0]
        unit = max(unit, torch.finfo(a.dtype).tiny)
        state = [t[index] for t in (a, b, a, at_a, at_b, at_a)]
        args = tuple(t[index] for t in args)
        for i in range(_MOST):
            a, b, c, at_a, at_b, at_c = state
            width = b - a
            least = tolerance / 2 * torch.minimum(a.abs(), b.abs()).clamp_min(unit)
            if i >= _SOON or i == 0:
                going = (width.abs() > 2 * least) & (at_a != 0)
                count = int(going.sum())
                if count < 0.75 * len(a):
                    best[index] = torch.where(at_a.abs() <= at_b.abs(), a, b)
                    if count == 0:
                        break
                    keep = going.nonzero()[:, 0]
                    index, state, args = index[keep], [t[keep] for t in state], tuple(t[keep] for t in args)
                    a, b, c, at_a, at_b, at_c = state
                    width, least = width[keep], least[keep]
            x = _next(state, unit, least, bool(i))
            at_x = function(x, *args)
            same = at_x.sign() == at_a.sign()
            c, at_c = torch.where(same, a, b), torch.where(same, at_a, at_b)
            state = [x, torch.where(same, b, a), c, at_x, torch.where(same, at_b, at_a), at_c]
        else:
            best[index] = torch.where(state[3].abs() <= state[4].abs(), state[0], state[1])
        return best.reshape(shape)


def _next(state: list[Tensor], unit: float, least: Tensor, inverse: bool) -> Tensor:
    """Where the function is asked next: by inverse quadratic interpolation where that is safe, else halfway."""
    a, b, c, at_a, at_b, at_c = state
    width = b - a
    x = torch.where(_wide(a, b, unit), _between(a, b, unit), a + 0.5 * width)
    if inverse:
        xi, phi = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
        smooth = (phi * phi < xi) & ((1 - phi) ** 2 < 1 - xi)
        step = at_a / (at_b - at_a) * (at_c / (at_b - at_c))
        step = step + (c - a) / width * (at_a / (at_c - at_a)) * (at_b / (at_c - at_b))
        x = torch.where(smooth & step.isfinite(), a + step * width, x)
    least = torch.minimum(least, width.abs() / 2)
    return torch.minimum(torch.maximum(x, torch.minimum(a, b) + least), torch.maximum(a, b) - least)


def _wide(a: Tensor, b: Tensor, unit: float) -> Tensor:
    """Where the ends differ by more than two orders of magnitude."""
    small, large = torch.minimum(a.abs(), b.abs()), torch.maximum(a.abs(), b.abs())
    return large > 128 * small.clamp_min(unit)


def _between(a: Tensor, b: Tensor, unit: float) -> Tensor:
    """The geometric mean of both magnitudes, on the side of the larger."""
    small, large = torch.minimum(a.abs(), b.abs()).clamp_min(unit), torch.maximum(a.abs(), b.abs())
    return torch.copysign(small.sqrt() * large.sqrt(), torch.where(a.abs() > b.abs(), a, b))
