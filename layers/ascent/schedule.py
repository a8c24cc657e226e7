"""How an ascent moves and when it stops, whatever its passes: Adam's rates, weights of averages, the stopping rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optrelax.layers.ascent.dual_ascent import DualAscent

FIRST, SECOND = 0.7, 0.9
"""Adam's memories: short, since the active lines change within a few iterations (docs/lp-layers.md compares)."""
MARGIN = 0.95
"""Share of the tolerance that an ascent goes to: both points are evaluated once more, in another order of sums."""


class Rates(NamedTuple):
    """Of one iteration: the share of the averages, Adam's correction of the second moment, and its step."""

    average: float
    correction: float
    step: float


def rates(options: DualAscent, step: int) -> Rates:
    """Of iteration `step`, from 0: averages of weight n^4, n = step + 1, forget the start; steps decay to a floor."""
    n = float(step + 1)
    # n^4 over its sum: 1^4 + ... + n^4 = n (n + 1) (2 n + 1) (3 n^2 + 3 n - 1) / 30.
    average = 30 * n**3 / ((n + 1) * (2 * n + 1) * (3 * n * n + 3 * n - 1))
    size = options.step * max(options.decay**step, options.floor)
    return Rates(average, 1 / (1 - SECOND**n), size / (1 - FIRST**n))


def climbed(value: Tensor, grad: Tensor, moment: Tensor, square: Tensor, correction: float, step: float) -> Tensor:
    """`value` after a step of Adam up its gradient, in [0, 1]; both moments are moved in place."""
    moment.lerp_(grad, 1 - FIRST)
    square.mul_(SECOND).addcmul_(grad, grad, value=1 - SECOND)
    size = (square * correction).sqrt_().add_(tiny(grad.dtype))
    return torch.addcdiv(value, moment, size, value=step).clamp_(0, 1)


def finished(options: DualAscent, lower: Tensor, objective: Tensor) -> Tensor:
    """Which problems need no more: the gap is closed, or the sign of value - threshold is certain."""
    done = objective - lower <= MARGIN * options.tol * lower.abs().clamp_min(1)
    if options.threshold is not None:
        done |= (lower > options.threshold) | (objective <= options.threshold)
    return done


def tiny(dtype: torch.dtype) -> float:
    """What keeps Adam's quotient finite."""
    return float(torch.finfo(dtype).tiny ** 0.5)
