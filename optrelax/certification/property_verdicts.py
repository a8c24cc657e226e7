"""The verdict on a property, and the counterexample that it rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

__all__ = ["Counterexample", "PropertyStatus", "PropertyVerdict"]


class PropertyStatus(StrEnum):
    """What verification found."""

    HOLDS = "holds"
    VIOLATED = "violated"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, eq=False)
class Counterexample:
    """An input of the property's box whose outputs meet a clause of the property, twice."""

    x: Tensor
    """[*input_shape], float64; in float32 too where the box holds such a point."""
    outputs: Tensor
    """[outputs], by the captured network in float64."""
    replayed: Tensor
    """[outputs], by the file's ONNX semantics in its own type, or by the user's module, at x in that type."""
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class PropertyVerdict:
    """holds: proved for every input; violated: a counterexample was replayed; unknown: neither.

    Args:
        status: which of the three.
        counterexample: of "violated", else None.
        cases: of the property.
        open_cases: those not proved.
        seconds: of everything.
        message: why a property stayed unknown.

    Sound: yes, see `verify`.

    Example:
        >>> net, region = ox.models.fc(2, 8, 1, seed=0), ox.InputBox(torch.zeros(1, 2), torch.ones(1, 2))
        >>> verdict = ox.verify(net, ox.Specification(torch.tensor([[1.0]]), offsets=-5.0), region=region)  # y0 > 5
        >>> verdict.status.value, bool(verdict.counterexample.outputs < 5)
        ('violated', True)
    """

    status: PropertyStatus
    counterexample: Counterexample | None
    relaxation: str
    """The one after which nothing was left open; empty where none was."""
    lower: float
    """Least bound over cases and clauses of how far outputs keep from a clause; > 0 is proved. NaN: none computed."""
    cases: int
    open_cases: int
    seconds: float
    message: str = ""

    def __str__(self) -> str:
        by = f" by {self.relaxation}" if self.relaxation else ""
        return f"{self.status}{by}{': ' if self.message else ''}{self.message}"

    def record(self) -> dict[str, object]:
        """JSON-ready."""
        found = self.counterexample
        point = None
        if found is not None:
            names = ("x", "outputs", "replayed")
            point = {name: getattr(found, name).flatten().tolist() for name in names} | {"note": found.note}
        return {
            "verdict": str(self.status),
            "counterexample": point,
            "relaxation": self.relaxation or None,
            "lower": self.lower if math.isfinite(self.lower) else None,
            "cases": self.cases,
            "open_cases": self.open_cases,
            "seconds": self.seconds,
            "message": self.message,
        }
