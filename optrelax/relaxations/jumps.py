"""Where bounds may jump as the weights move, in words that relaxations and measurements share."""

from __future__ import annotations

LOWER, UPPER, TIE = "l = 0", "u = 0", "|l| = |u|"
"""An end of a neuron's bounds at a kink, or a tie between lines; of a ReLU's names, for any kink or tie."""
EVERYWHERE = "everywhere"

Jumps = frozenset[str] | None
"""All causes of jumps; None where they are not known."""


def joined(own: Jumps, *parts: Jumps) -> Jumps:
    """The causes of something made of parts: known where all of them are."""
    known = [part for part in (own, *parts) if part is not None]
    return frozenset().union(*known) if len(known) == 1 + len(parts) else None
