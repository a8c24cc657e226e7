"""Fields of frozen objects, written once while these are made."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["filled"]

Made = TypeVar("Made")


def filled(made: Made, **values: object) -> Made:
    """An object with these fields: one that is being made, or one of `object.__new__`, which nothing checks."""
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
