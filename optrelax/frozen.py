"""Fields of frozen objects: written once while these are made, and read together."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["field_values", "filled"]

Made = TypeVar("Made")


def filled(made: Made, **values: object) -> Made:
    """An object with these fields: one that is being made, or one of `object.__new__`, which nothing checks."""
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def field_values(record: object) -> dict[str, Any]:
    """The fields of a dataclass's object by name, as they are: `asdict` would copy what they hold."""
    return {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
