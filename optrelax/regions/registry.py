"""The balls by the names of their norms, as certification, training and the command line take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from optrelax.errors import suggest
from optrelax.regions.base import Region

Ball = TypeVar("Ball", bound=type)
_BALLS: dict[str, Any] = {}


def register_ball(norm: str) -> Callable[[Ball], Ball]:
    """Decorator: the class `Ball(x, eps, clip)` of all inputs within eps of x in this norm."""

    def decorate(cls: Ball) -> Ball:
        _BALLS[norm] = cls
        return cls

    return decorate


def norms() -> list[str]:
    """Every norm by name."""
    return list(_BALLS)


def ball_of(norm: str) -> Callable[..., Region]:
    """The ball of a norm; ValueError for an unknown one."""
    if norm not in _BALLS:
        raise ValueError(f"norm: no ball of {norm!r}, {suggest(norm, _BALLS)}")
    found: Callable[..., Region] = _BALLS[norm]
    return found
