"""The errors the library raises at its border."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a module cannot be bounded."""

    where: str
    """Module path or graph node."""
    op: str
    """What stands there, such as `Softmax` or `torch.sin`."""
    reason: str
    """What is wrong and what to do instead."""

    def __str__(self) -> str:
        return f"{self.where}: {self.op}: {self.reason}"


class UnsupportedOpError(ValueError):
    """A network holds ops (or settings of ops) that have no rule; `problems` lists every one."""

    def __init__(self, problems: Sequence[Problem], supported: str = "") -> None:
        self.problems = tuple(problems)
        lines = [f"{len(self.problems)} op(s) of the network cannot be bounded:"]
        lines += [f"  {problem}" for problem in self.problems]
        if supported:
            lines.append(f"Supported: {supported}")
        super().__init__("\n".join(lines))


def suggest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the nearest known name, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def require_number(owner: str, what: str, value: object) -> None:
    """TypeError unless a real number (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {what} must be a number, got {value!r}")
