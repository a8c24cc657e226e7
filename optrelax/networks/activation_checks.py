"""What an activation says about itself, held against its function: else a slip would be a wrong bound."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from optrelax.domains.lines import crown_lines
from optrelax.networks.activations import Activation, Line

_TOLERANCE = 1e-9
"""Relative to the terms, in float64: as kinks have to meet."""


def check_activation(activation: Activation) -> None:
    """Sample an activation's function against its pieces, its image, CROWN's lines and its hull, in float64.

    Intervals lie on either side of every kink and across it, touch it, and have no width. `register_activation` runs
    it.

    Args:
        activation: one of any kind.

    Raises:
        ValueError: that says where the function leaves which.
        TypeError: for what is no activation.

    Example:
        >>> ox.check_activation(ox.activations.relu())
        >>> ox.check_activation(torch.relu)
        Traceback (most recent call last):
            ...
        TypeError: check_activation: wants an Activation, got builtin_function_or_method
    """
    if not isinstance(activation, Activation):
        raise TypeError(f"check_activation: wants an Activation, got {type(activation).__name__}")
    activation.require_consistent()
    l, u = _intervals(activation)
    x = torch.lerp(l, u, torch.linspace(0, 1, 33, dtype=torch.float64, device="cpu")[:, None])
    with torch.no_grad():
        y, hull, (low, high) = activation(x), activation.hull(l, u), activation.image(l, u)
        flat, lines = torch.zeros_like(l), crown_lines(activation, l, u)
        below = {"its image": (flat, low), "CROWN's lower line": (lines.lower_slope, lines.lower_intercept)}
        above = {"its image": (flat, high), "CROWN's upper line": (lines.upper_slope, lines.upper_intercept)}
        below |= {f"line {i} below its hull": line for i, line in enumerate(hull.below)}
        above |= {f"line {i} above its hull": line for i, line in enumerate(hull.above)}
        for side, sign in ((below, 1.0), (above, -1.0)):
            for what, line in side.items():
                _require_side(activation, what, line, sign, x, y)


def _intervals(activation: Activation) -> tuple[Tensor, Tensor]:
    """Ends l <= u around the breaks, [intervals]."""
    steps = (0.0, 1e-3, 0.3, 1.0, 7.0, 1e3)
    ends = sorted({kink + sign * step for kink, sign, step in product(activation.breaks, (-1, 1), steps)})
    pairs = [(a, b) for a, b in product(ends, ends) if a <= b]
    l, u = torch.tensor(pairs, dtype=torch.float64, device="cpu").unbind(1)
    return l, u


def _require_side(activation: Activation, what: str, line: Line, sign: float, x: Tensor, y: Tensor) -> None:
    slope, intercept = line
    value = slope * x + intercept
    scale = torch.maximum((slope * x).abs(), intercept.abs().expand_as(x)).clamp_min(1)
    wrong = ~(sign * (y - value) >= -_TOLERANCE * scale)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{activation.name}: over [{float(x[0, at[1]]):g}, {float(x[-1, at[1]]):g}] the function is "
            f"{float(y[at]):g} at {float(x[at]):g}, beyond {what}, {float(value[at]):g}"
        )
