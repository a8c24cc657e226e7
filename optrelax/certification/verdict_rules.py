"""What an example's numbers come to, and whether a verdict that a journal holds is borne out by its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from optrelax.certification.verdicts import Example, Verdict

if TYPE_CHECKING:
    from optrelax.certification.certifiers import Certifier

__all__ = ["confirm", "with_verdict"]


def with_verdict(run: Certifier, example: Example) -> Example:
    """The example with the verdict that input, attack and bounds allow."""
    verdict, message = _verdict(run.relaxations, example)
    if message.startswith("contradiction"):
        warnings.warn(
            f"certify: example {example.index}: {message}; this is a fault of a relaxation, please report it",
            RuntimeWarning,
            stacklevel=2,
        )
    return replace(example, verdict=verdict, message=message)


def _verdict(names: Collection[str], example: Example) -> tuple[Verdict, str]:
    """What an example's numbers come to, and why where that is an error."""
    told = [(name, b) for name, b in zip(names, example.lower, strict=True) if b is not None]
    assert example.natural_margin is not None
    if math.isnan(example.natural_margin):
        return Verdict.ERROR, "the network gives NaN at the input"
    if example.attack_margin is not None and math.isnan(example.attack_margin):
        return Verdict.ERROR, "the network gives NaN within the region"
    wrong = [name for name, b in told if math.isnan(b) or b == math.inf]
    if wrong:
        message = f"the bound of {', '.join(wrong)} is not a number; the network may overflow on this region"
        return Verdict.ERROR, message
    worst = example.natural_margin
    if example.attack_margin is not None:
        worst = min(worst, example.attack_margin)
    proofs = [f"{name} ({b:.9g})" for name, b in told if b > 0]
    if worst <= 0 and proofs:
        message = f"contradiction: certified by {', '.join(proofs)}, but a point of the region has margin {worst:.9g}"
        return Verdict.ERROR, message
    if worst <= 0:
        return Verdict.ATTACKED, ""
    return (Verdict.CERTIFIED if proofs else Verdict.UNDECIDED), ""


def confirm(run: Certifier, example: Example) -> None:
    """ValueError where an example that a journal holds contradicts itself, its data set or these settings."""
    if reason := _contradiction(run, example):
        raise ValueError(
            f"example {example.index} is {str(example.verdict)!r} there, but {reason}; remove its line, and it is "
            "certified again"
        )


def _contradiction(run: Certifier, example: Example) -> str:
    """What speaks against an example's verdict, "" where nothing does."""
    places = (run.samples.index == example.index).nonzero().flatten().tolist()
    if not places:
        return "it is no example of this run"
    label = run.label(places[0])
    if example.label != label:
        return f"its label is {example.label} there and {label} in the data"
    if len(example.lower) != len(run.relaxations) or example.natural_margin is None:
        return f"it lacks bounds of {len(run.relaxations)} relaxations and a margin"
    bounded, attacked = _asked(run, example)
    if [bound is not None for bound in example.lower] != bounded:
        return "it lacks a bound that this run asks for, or has one more"
    if (example.attack_margin is not None) != attacked:
        return "it was attacked and this run attacks none, or the other way round"
    if example.attack_margin is not None and example.attack_margin > example.natural_margin:
        return "its attack found less than its input"
    right = example.prediction == label
    if run.spec is None and ((example.natural_margin > 0 and not right) or (example.natural_margin < 0 and right)):
        return f"its prediction is {example.prediction} at a margin of {example.natural_margin:.9g}"
    allowed = _verdict(run.relaxations, example)[0]
    if allowed == Verdict.UNDECIDED and run.exact is not None:
        if example.milp_lower is None:
            return "it was not given to the MILP solver"
        # Its upper bound, which may attack, is not kept; a lower bound above 0 proves.
        proved = example.milp_lower > 0
        wanted = (Verdict.CERTIFIED_MILP,) if proved else (Verdict.UNDECIDED, Verdict.ATTACKED)
    else:
        wanted = (allowed,)
    if example.verdict not in wanted:
        return f"its own bounds and margins make it {' or '.join(map(repr, map(str, wanted)))}"
    return ""


def _asked(run: Certifier, example: Example) -> tuple[list[bool], bool]:
    """Of which relaxations a run asks an example with these numbers, and whether it attacks it (see `Answers.ask`)."""
    attack = run.attack is not None
    if not run.cascade:
        return [True] * len(run.relaxations), attack
    assert example.natural_margin is not None
    still, asked, attacked = example.natural_margin > 0, [], False
    for i, bound in enumerate(example.lower):
        asked.append(still)
        still = still and (bound is None or not bound > 0)
        if i == 0 and attack:
            attacked = still
            still = still and example.attack_margin is not None and example.attack_margin > 0
    return asked, attacked
