"""The balls by the names of their norms, as certification, training and the command line take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from optrelax.errors import suggest
from optrelax.regions.base import Region
from optrelax.regions.numbers import Numbers


class BallType(Protocol):
    """The class of the balls of a norm."""

    def __call__(self, x: Tensor, eps: Numbers, clip: tuple[Numbers, Numbers] | None = None) -> Region: ...

    def length(self, d: Tensor) -> Tensor:
        """The norm over the last dimension."""


Ball = TypeVar("Ball", bound=BallType)
_BALLS: dict[str, BallType] = {}


def register_ball(norm: str) -> Callable[[Ball], Ball]:
    """Decorator: the class `Ball(x, eps, clip)` of all inputs within eps of x in this norm, with its `length`."""

    def decorate(cls: Ball) -> Ball:
        _BALLS[norm] = cls
        return cls

    return decorate


def norms() -> list[str]:
    """Every norm by name."""
    return list(_BALLS)


def ball_of(norm: str) -> BallType:
    """The ball of a norm; ValueError for an unknown one."""
    if norm not in _BALLS:
        raise ValueError(f"norm: no ball of {norm!r}, {suggest(norm, _BALLS)}")
    return _BALLS[norm]
