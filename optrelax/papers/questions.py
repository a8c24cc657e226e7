"""What a row asks of a network: one frozen object a question, whose answer is JSON-ready.

Each calls a function that users can call themselves; the numbers of a question are all that decides its answer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from optrelax.data.splits import Dataset
from optrelax.networks.graph import Network

__all__ = ["Certified", "Degrees", "Jumps", "Measurement", "Tight", "WeightSteps"]

Json = dict[str, object]


class Measurement(ABC):
    """Something to measure on a network, or on none."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of a file's name, the same for the same question of one network."""

    @abstractmethod
    def ask(self, network: Network | None, test: Dataset) -> Json:
        """The answer, JSON-ready."""


def safe(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^\w.=-]+", "-", text)


def _some(test: Dataset, images: int) -> int | None:
    return images if images < len(test) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified(Measurement):
    """Natural, certified and attacked accuracy on evenly spaced test images; bounds rounded outward."""

    relaxations: tuple[str, ...]
    eps: float
    images: int

    @property
    def name(self) -> str:
        """One a network."""
        return "certified"

    def ask(self, network: Network | None, test: Dataset) -> Json:
        """Fractions, by relaxation and by any of them."""
        from optrelax.certification.attacks import PGD
        from optrelax.certification.certifying import certify

        assert network is not None
        report = certify(
            network,
            test,
            self.eps,
            relaxation=list(self.relaxations),
            attack=PGD(restarts=1),
            subset=_some(test, self.images),
        )
        return report.summary()


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaxationQuestion(Measurement):
    """A question of one relaxation on one network; the other fields are options of what answers it, by their names."""

    kind: ClassVar[str]
    relaxation: str

    @property
    def name(self) -> str:
        """One a relaxation."""
        return f"{self.kind}-{safe(self.relaxation)}"

    def options(self) -> dict[str, Any]:
        """The fields but the relaxation."""
        return {name: value for name, value in asdict(self).items() if name != "relaxation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tight(RelaxationQuestion):
    """The area under certified robustness against eps of one relaxation, and that of the attack."""

    kind = "tightness"
    images: int
    points: int
    resolution: float

    def ask(self, network: Network | None, test: Dataset) -> Json:
        """Table and radii, as `Tightness` has them."""
        from optrelax.measurements.tightness import measure_tightness

        assert network is not None
        how = self.options()
        how["subset"] = _some(test, how.pop("images"))
        found = measure_tightness(network, test, [self.relaxation], **how)
        return {**found.summary(), "radii": found.examples.to_dicts()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Jumps(RelaxationQuestion):
    """The jumps of one relaxation's bounds and loss along lines down its own gradient."""

    kind = "continuity"
    eps: float
    lines: int
    examples: int
    length: float
    cells: int
    seed: int = 0

    def ask(self, network: Network | None, test: Dataset) -> Json:
        """Table and jumps, and the first line's samples for its figure."""
        import polars as pl

        from optrelax.measurements.continuity import measure_continuity

        assert network is not None
        found = measure_continuity(network, test, relaxations=[self.relaxation], **self.options())
        first = found.lines.filter(pl.col("line") == 0)
        return {**found.summary(), "jumps": found.jumps.to_dicts(), "samples": first.to_dicts()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSteps(RelaxationQuestion):
    """How one relaxation's loss and gradient react to small steps of the weights."""

    kind = "sensitivity"
    eps: float
    steps: tuple[float, ...]
    examples: int
    draws: int
    seed: int = 0

    def ask(self, network: Network | None, test: Dataset) -> Json:
        """Table, as `Sensitivity` has it."""
        from optrelax.measurements.sensitivity import measure_sensitivity

        assert network is not None
        return measure_sensitivity(network, test, relaxations=[self.relaxation], **self.options()).summary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees(RelaxationQuestion):
    """Degrees of one relaxation's bound in a step, on a network of random weights: they belong to no trained one."""

    kind = "degrees"
    eps: float
    hidden: tuple[int, ...]
    seed: int = 0

    def ask(self, network: Network | None, test: Dataset) -> Json:
        """The greatest degrees over the margins of the first test image; None where they are not known."""
        from optrelax.margin_rows import margins
        from optrelax.measurements.degrees import greatest_degrees
        from optrelax.networks.models import fc
        from optrelax.regions import LinfBall

        x = test.images[:1].double()
        net = fc(x[0].numel(), *self.hidden, test.classes, seed=self.seed).double().eval()
        ball = LinfBall(x, self.eps, (0.0, 1.0))
        rows = margins(test.labels[:1], test.classes).to(x)
        pair, reason = greatest_degrees(net, ball, rows, self.relaxation)
        return {"degrees": None if pair is None else list(pair), "reason": reason or None}
