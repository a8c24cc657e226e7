"""Checks of options: what is wanted is said once, as it stands in the error's message."""

from __future__ import annotations

import math
import numbers
import re
from typing import TypeGuard

import torch
from torch import Tensor

__all__ = ["is_number", "require_choice", "require_dense", "require_number", "require_range"]

_HALF_LINE = re.compile(r"(at least|>=?|positive) ?([\d.]*)")
_INTERVAL = re.compile(r"([\[(])([\d.]+), ([\d.]+)([\])])")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of Python's or NumPy's; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_number(owner: str, what: str, value: object) -> None:
    """TypeError unless a real number (a bool is none)."""
    if not is_number(value):
        raise TypeError(f"{owner}: {what} must be a number, got {value!r}")


def require_dense(owner: str, what: str, value: Tensor) -> None:
    """TypeError for a tensor whose numbers do not lie in memory one by one."""
    if value.layout != torch.strided:
        raise TypeError(f"{owner}: {what} must be dense, got {value.layout}; use {what}.to_dense()")


def require_range(owner: str, wanted: str, /, *, optional: bool = False, **values: float | None) -> None:
    """ValueError unless each of the numbers, by their names, lies where `wanted` says.

    wanted: "> 0", ">= 1 and finite", "at least 1", "positive, in seconds", "in (0, 1]".  optional: None is no number to
    judge.  NaN lies nowhere.
    """
    for name, value in values.items():
        if (value is None and optional) or _lies(value, wanted):  # type: ignore[arg-type]
            continue
        verb = "lie" if wanted.startswith("in ") else "be"
        raise ValueError(f"{owner}: {name} must {verb} {wanted}, got {value}")


def _lies(value: float, wanted: str) -> bool:
    if found := _INTERVAL.search(wanted):
        opens, low, high, closes = found.groups()
        above = value >= float(low) if opens == "[" else value > float(low)
        return above and (value <= float(high) if closes == "]" else value < float(high))
    found = _HALF_LINE.search(wanted)
    assert found is not None, wanted
    low = float(found[2] or 0)
    above = value > low if found[1] in (">", "positive") else value >= low
    return above and ("finite" not in wanted or value < math.inf)


def require_choice(owner: str, name: str, value: object, *known: object) -> None:
    """ValueError for a value that is none of the known ones."""
    if value not in known:
        *most, last = map(repr, known)
        raise ValueError(f"{owner}: {name} must be {', '.join(most)} or {last}, got {value!r}")
