"""What a certification says: one record an example, one report a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

__all__ = ["CertificationReport", "Example", "Verdict"]


class Verdict(StrEnum):
    """How the question of one example was settled."""

    CERTIFIED = "certified"
    """Every margin's lower bound by one sound relaxation is > 0."""
    CERTIFIED_MILP = "certified (MILP)"
    """A MILP solver says that every margin is > 0: its word, not a certificate."""
    ATTACKED = "attacked"
    """A point of the region (the input itself included) was replayed and has a margin <= 0."""
    UNDECIDED = "undecided"
    """Neither."""
    ERROR = "error"
    """A bound is NaN, something raised, or a bound and an attack contradict each other; never certified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of the table; margins in logits, times in seconds."""

    index: int
    """Position in the data set, before any subset was taken."""
    label: int | None
    """None where inputs come without."""
    prediction: int | None = None
    """Greatest logit at the input; None where the network gives NaN, or inputs come without labels."""
    verdict: Verdict
    natural_margin: float | None = None
    """Smallest margin at the input."""
    attack_margin: float | None = None
    """Smallest margin found by the attack, the input included; None where it was not attacked."""
    lower: tuple[float | None, ...] = ()
    """Worst margin's lower bound, one a relaxation; None where it was not asked, and after an error."""
    rows: tuple[tuple[float, ...], ...] = ()
    """Lower bounds of what a specification names, one tuple a relaxation; empty where it names nothing."""
    milp_lower: float | None = None
    """Worst margin's lower bound as the MILP solver claims it; None where it was not asked."""
    bound_seconds: tuple[float, ...] = ()
    """Time of the bounds, one a relaxation: a batch's time divided by how many it was asked of; 0 where it was not."""
    seconds: float = 0.0
    """Time of everything."""
    message: str = ""
    """Reason of an error, or what the MILP solver left open."""


@dataclass(frozen=True, slots=True, eq=False)
class CertificationReport:
    """Result of `ox.certify`: a table of examples and the fractions it comes to, all of the same number of examples.

    `certified + certified_milp + attacked + undecided + errors` is 1.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> report = ox.certify(net, (x, torch.tensor([0, 1])), eps=0.001)
        >>> report.accuracy, report.certified, report.attacked
        (0.5, 0.5, 0.5)
        >>> report.examples.columns[:4]
        ['index', 'label', 'prediction', 'verdict']
    """

    examples: pl.DataFrame
    """index, label, prediction, verdict, natural_margin, attack_margin, `lower:NAME` and `seconds:NAME` for each
    relaxation, `lower:NAME:ROW` of each row that a specification names, milp_lower, seconds, message: see `Example`."""
    settings: Mapping[str, Any]
    """JSON-ready: eps, clip, relaxations, dtype, rounding, attack, exact; region and specification where given."""

    @classmethod
    def of(cls, examples: Sequence[Example], settings: Mapping[str, Any]) -> CertificationReport:
        """Report of examples in the order of their index."""
        names = list(settings["relaxations"])
        rows = settings.get("specification", [])
        return cls(_frame(sorted(examples, key=lambda example: example.index), names, rows), dict(settings))

    @property
    def relaxations(self) -> tuple[str, ...]:
        """Names of the relaxations, in the order given."""
        return tuple(self.settings["relaxations"])

    @property
    def accuracy(self) -> float:
        """Examples whose greatest logit is the label's; of a specification, those whose input fulfils it."""
        if "specification" in self.settings:
            return self._fraction(self.examples["natural_margin"] > 0)
        return self._fraction(self.examples["prediction"] == self.examples["label"])

    @property
    def certified(self) -> float:
        """Examples that a sound relaxation certifies; those of the MILP solver are not among them."""
        return self._share(Verdict.CERTIFIED)

    @property
    def certified_milp(self) -> float:
        """Further examples that are robust by the word of the MILP solver; 0 without `exact`."""
        return self._share(Verdict.CERTIFIED_MILP)

    @property
    def attacked(self) -> float:
        """Examples with a counterexample, misclassified ones among them."""
        return self._share(Verdict.ATTACKED)

    @property
    def undecided(self) -> float:
        """Examples neither certified nor attacked."""
        return self._share(Verdict.UNDECIDED)

    @property
    def errors(self) -> float:
        """Examples that failed; `message` says why."""
        return self._share(Verdict.ERROR)

    @property
    def pgd_accuracy(self) -> float | None:
        """Examples whose input and every attacked point have margins > 0; None with the attack off.

        A cascade attacks no example that is misclassified, or certified: the input's margin is theirs.
        """
        if self.settings["attack"] is None:
            return None
        found = self.examples["attack_margin"]
        return self._fraction(found.zip_with(found.is_not_null(), self.examples["natural_margin"]) > 0)

    @property
    def asked(self) -> dict[str, int]:
        """Of how many examples each relaxation was asked: of all but those that failed, unless in a cascade."""
        return {name: int(self.examples[f"lower:{name}"].count()) for name in self.relaxations}

    @property
    def certified_by(self) -> dict[str, float]:
        """Certified fraction of each relaxation alone, of those that it was asked, as a fraction of all examples."""
        good = self.examples["verdict"] != str(Verdict.ERROR)
        return {name: self._fraction((self.examples[f"lower:{name}"] > 0) & good) for name in self.relaxations}

    @property
    def certified_rows(self) -> dict[str, float]:
        """Certified fraction of each row that the specification names, by any of the relaxations."""
        good = self.examples["verdict"] != str(Verdict.ERROR)
        found = {}
        for row in self.settings.get("specification", ()):
            columns = [f"lower:{name}:{row}" for name in self.relaxations]
            if set(columns) <= set(self.examples.columns):
                proved = self.examples.select(columns).max_horizontal() > 0
                found[row] = self._fraction(proved & good)
        return found

    @property
    def seconds(self) -> float:
        """Time of all examples, in seconds; of a resumed run both parts."""
        return float(self.examples["seconds"].sum())

    def table(self) -> pl.DataFrame:
        """One row a relaxation: what it certified of all examples, how tight it was and how long it took.

        `misclassified at most %` is 100 less what it certified: the bound on the adversarial error that papers print.
        In a cascade `certified %` is by it and those before it, and the row says how many examples it was asked and
        certified, in how many seconds.
        """
        import polars as pl

        cascade, rows, before = self.settings.get("cascade"), [], 0.0
        for (name, share), asked in zip(self.certified_by.items(), self.asked.values(), strict=True):
            bounds = [v for v in self.examples[f"lower:{name}"].to_list() if v is not None and math.isfinite(v)]
            seconds = float(self.examples[f"seconds:{name}"].sum())
            reached = before + share  # what a cascade certified is asked no more
            before = reached if cascade else 0.0
            rows.append(
                {
                    "relaxation": name,
                    "asked": asked,
                    "certified": round(share * self.examples.height),
                    "certified %": 100 * reached,
                    "misclassified at most %": 100 * (1 - reached),
                    "mean bound": sum(bounds) / len(bounds) if bounds else None,
                    "worst bound": min(bounds, default=None),
                    "ms an example": 1e3 * seconds / max(1, asked),
                    "seconds": seconds,
                }
            )
        kinds = {"relaxation": pl.String, "asked": pl.Int64, "certified": pl.Int64}
        frame = pl.DataFrame(rows, schema={name: kinds.get(name, pl.Float64) for name in _TABLE})
        return frame.drop("misclassified at most %" if cascade else ("asked", "certified", "seconds"))

    def summary(self) -> dict[str, object]:
        """Everything but the examples, JSON-ready; fractions of 1."""
        names = ("accuracy", "pgd_accuracy", "certified", "certified_milp", "attacked", "undecided", "errors")
        fractions = {name: getattr(self, name) for name in names}
        return {
            **self.settings,
            "examples": self.examples.height,
            **fractions,
            "asked": self.asked,
            "certified_by": self.certified_by,
            "seconds_by": {name: float(self.examples[f"seconds:{name}"].sum()) for name in self.relaxations},
            **({"certified_rows": self.certified_rows} if self.certified_rows else {}),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        # A misclassified image is an error too, in the field's words: what broke is called failed to people.
        said = {v: "failed" if v == "error" else str(v) for v in Verdict}
        shares = [
            f"{said[v]} {100 * self._share(v):.2f} %" for v in Verdict if self._share(v) or v != "certified (MILP)"
        ]
        eps = self.settings["eps"]
        where = self.settings.get("region", "") if eps is None else f"eps {eps:g}"
        return (
            f"{self.examples.height} examples, {where}: accuracy {100 * self.accuracy:.2f} %, "
            f"{', '.join(shares)} ({', '.join(self.relaxations)}; {self.seconds:.1f} s)"
        )

    def _share(self, verdict: Verdict) -> float:
        return self._fraction(self.examples["verdict"] == str(verdict))

    def _fraction(self, mask: pl.Series) -> float:
        """Share of true entries; a missing value is not true."""
        return float(mask.fill_null(False).sum()) / self.examples.height if self.examples.height else 0.0


_TABLE = (
    *("relaxation", "asked", "certified", "certified %", "misclassified at most %"),
    *("mean bound", "worst bound", "ms an example", "seconds"),
)


def _frame(examples: Sequence[Example], names: Sequence[str], rows: Sequence[str] = ()) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, pl.Series] = {}

    def add(name: str, kind: type[pl.DataType], values: list[Any]) -> None:
        columns[name] = pl.Series(name, values, dtype=kind)

    for name, kind in _kinds().items():
        if name == "milp_lower":  # the columns of the relaxations stand before it
            for i, relaxation in enumerate(names):
                add(f"lower:{relaxation}", pl.Float64, [e.lower[i] if e.lower else None for e in examples])
            for i, relaxation in enumerate(names if any(e.rows for e in examples) else ()):
                for j, row in enumerate(rows):
                    bounds = [e.rows[i][j] if e.rows and e.rows[i] else None for e in examples]
                    add(f"lower:{relaxation}:{row}", pl.Float64, bounds)
            for i, relaxation in enumerate(names):
                spent = [e.bound_seconds[i] if e.bound_seconds else 0.0 for e in examples]
                add(f"seconds:{relaxation}", pl.Float64, spent)
        values = [getattr(e, name) for e in examples]
        add(name, kind, [str(v) for v in values] if kind is pl.String else values)
    return pl.DataFrame(columns)


def _kinds() -> dict[str, type[pl.DataType]]:
    import polars as pl

    integer, number, text = pl.Int64, pl.Float64, pl.String
    return {
        "index": integer,
        "label": integer,
        "prediction": integer,
        "verdict": text,
        "natural_margin": number,
        "attack_margin": number,
        "milp_lower": number,
        "seconds": number,
        "message": text,
    }
