"""The errors the library raises at its border."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a module cannot be bounded.

    Example:
        >>> str(ox.Problem("2", "Softmax", "use no LP layer"))
        '2: Softmax: use no LP layer'
    """

    where: str
    """Module path or graph node."""
    op: str
    """What stands there, such as `Softmax` or `torch.sin`."""
    reason: str
    """What is wrong and what to do instead."""
    source: str = ""
    """FILE:LINE of the user's code that it comes from, where it is the user's and not torch's."""

    def __str__(self) -> str:
        place = f" ({os.path.basename(self.source)})" if self.source else ""
        return f"{self.where}: {self.op}: {self.reason}{place}"


class UnsupportedOpError(ValueError):
    """A network holds ops (or settings of ops) that have no rule; `problems` lists every one.

    Args:
        problems: one an op.
        supported: what has a rule, as the end of the message.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
        >>> try:
        ...     ox.bounds(net, ox.LinfBall(torch.zeros(1, 4), eps=0.1))
        ... except ox.UnsupportedOpError as error:
        ...     print(error.problems[0].reason)
        is in training mode; call .eval()
    """

    def __init__(self, problems: Sequence[Problem], supported: str = "") -> None:
        self.problems = tuple(problems)
        lines = [f"{len(self.problems)} op(s) of the network cannot be bounded:"]
        lines += [f"  {problem}" for problem in self.problems]
        if supported:
            lines.append(f"Supported: {supported}")
        super().__init__("\n".join(lines))


class UnsupportedRegionError(ValueError):
    """A relaxation, solver or loss that is not for regions of this kind; the message names what is."""


_MANY = 40  # names that a reader still looks through
_NEAR = 0.65  # a letter or two off; "nosuch" and "cauchy" share half of theirs


def suggest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the nearest known name; without one all of them, or the three nearest of many."""
    names = sorted(known)
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean {by_lower[near[0]]!r}?"
    if len(names) <= _MANY:
        return f"known: {', '.join(names)}"
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    return f"nearest of {len(names)}: {', '.join(nearest)}"
