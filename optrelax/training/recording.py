"""What a configuration is, JSON-ready: to keep beside results, and to compare with another."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import is_dataclass

import torch

from optrelax.frozen import field_values
from optrelax.relaxations import Relaxation, name_of, resolve

__all__ = ["Json", "differences", "record", "versions"]

Json = object


def record(value: object) -> Json:
    """A JSON-ready account of a configuration: dataclasses by field with their type, relaxations by name."""
    if isinstance(value, Relaxation):
        name = name_of(value)
        try:
            return name if resolve(name) == value else repr(value)
        except ValueError:  # options that a name cannot carry
            return repr(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {name: record(item) for name, item in field_values(value).items()}
    match value:
        case Mapping():
            return {str(key): record(item) for key, item in value.items()}
        case list() | tuple():
            return [record(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return repr(value)


def versions() -> dict[str, str]:
    """What the run was made with."""
    import numpy as np

    from optrelax import __version__

    return {
        "optrelax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def differences(old: Json, new: Json, name: str = "") -> list[str]:
    """Dotted names of the settings that differ."""
    match old, new:
        case dict(), dict():
            keys = {key: f"{name}.{key}" if name else key for key in sorted(old.keys() | new.keys())}
            return [found for key, whole in keys.items() for found in differences(old.get(key), new.get(key), whole)]
    return [] if old == new else [f"{name} ({old} there, {new} here)"]
