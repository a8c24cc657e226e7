"""The piecewise-linear activations of the library, and those that files hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.networks.activations.piecewise_linear import PiecewiseLinear


def relu() -> PiecewiseLinear:
    """max(x, 0)."""
    return PiecewiseLinear("relu", torch.relu, (0.0,), (0.0, 1.0), (0.0, 0.0))


def leaky_relu(negative_slope: float = 0.01) -> PiecewiseLinear:
    """x where x >= 0, negative_slope * x elsewhere."""

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x, negative_slope)

    return PiecewiseLinear("leaky_relu", function, (0.0,), (float(negative_slope), 1.0), (0.0, 0.0))


def clamp(low: float, high: float, name: str = "hardtanh") -> PiecewiseLinear:
    """min(max(x, low), high): Hardtanh, ReLU6."""
    if not low < high:
        raise ValueError(f"{name}: needs low < high, got {low} and {high}")

    def function(x: Tensor) -> Tensor:
        return x.clamp(low, high)

    return PiecewiseLinear(name, function, (low, high), (0.0, 1.0, 0.0), (low, 0.0, high))


def absolute() -> PiecewiseLinear:
    """|x|."""
    return PiecewiseLinear("abs", torch.abs, (0.0,), (-1.0, 1.0), (0.0, 0.0))


def floor(low: float) -> PiecewiseLinear:
    """max(x, low): clamp from below."""
    return PiecewiseLinear("floor", lambda x: x.clamp_min(low), (low,), (0.0, 1.0), (low, 0.0))


def ceiling(high: float) -> PiecewiseLinear:
    """min(x, high): clamp from above."""
    return PiecewiseLinear("ceiling", lambda x: x.clamp_max(high), (high,), (1.0, 0.0), (0.0, high))


def known_pieces(
    name: str, kinks: Sequence[float], slopes: Sequence[float], intercepts: Sequence[float]
) -> PiecewiseLinear | None:
    """The activation of this module that such a name and such pieces may be of; None where there is none."""
    if name == "relu":
        return relu()
    if name == "leaky_relu" and slopes:
        return leaky_relu(slopes[0])
    if name == "abs":
        return absolute()
    if name in ("floor", "ceiling") and len(kinks) == 1:
        return floor(kinks[0]) if name == "floor" else ceiling(kinks[0])
    if name in ("hardtanh", "relu6", "clamp", "softshrink", "hardsigmoid") and len(kinks) == 2 and kinks[0] < kinks[1]:
        return clamp(kinks[0], kinks[1], name)
    return None


@dataclass(frozen=True, slots=True)
class Pieces:
    """A piecewise-linear function by its pieces; at a kink the right one."""

    kinks: tuple[float, ...]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Elementwise."""
        value = _line(self.slopes[0], self.intercepts[0], x)
        for kink, slope, intercept in zip(self.kinks, self.slopes[1:], self.intercepts[1:], strict=True):
            value = torch.where(x >= kink, _line(slope, intercept, x), value)
        return value


def _line(slope: float, intercept: float, x: Tensor) -> Tensor:
    """slope * x + intercept; flat also at an infinite x, which times 0 is NaN."""
    return slope * x + intercept if slope else torch.full_like(x, intercept)
