"""A row of a report: a network to train or a question to ask of one, each a file that is there whole or not at all.

DIR/runs/NAME is a training run, DIR/rows/NAME.json an answer with the settings it was made with and a digest of the
network it is about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from optrelax.output.tables import write_json
from optrelax.papers.questions import Measurement
from optrelax.training.recording import differences, record, versions
from optrelax.training.sweeps import SweepRun

__all__ = ["Outcome", "Row"]

_FORMAT = "optrelax report row 1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row: its answer, or why there is none."""

    answer: Mapping[str, object] | None
    error: str | None = None
    seconds: float = 0.0
    """Of the clock, in one process of one thread."""
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Train a network, or ask a question of a trained one (`run` None: of none).

    data: the name of the data set whose test images the question is about.
    """

    data: str
    run: SweepRun | None
    question: Measurement | None = None

    @property
    def name(self) -> str:
        """Of its file: the run's name, and the question's."""
        parts = [None if self.run is None else self.run.name, None if self.question is None else self.question.name]
        return ".".join(part for part in parts if part is not None)

    @property
    def training(self) -> Row | None:
        """The row that must be there first."""
        return None if self.run is None or self.question is None else Row(self.data, self.run)

    def settings(self) -> dict[str, object]:
        """Everything that decides the answer, JSON-ready."""
        run = None if self.run is None else {"recipe": asdict(self.run.row), "seed": self.run.seed}
        settings = {"data": self.data, "run": run, "question": record(self.question)}
        found: dict[str, object] = json.loads(json.dumps(settings))
        return found

    def file(self, folder: Path) -> Path:
        """Of the outcome."""
        return folder / "rows" / f"{self.name}.json"

    def network(self, folder: Path) -> Path:
        """The file of the network that the row is about."""
        assert self.run is not None
        return folder / "runs" / self.run.name / "net.safetensors"

    def digest(self, folder: Path) -> str | None:
        """Of the network's file; None without one."""
        if self.run is None or not self.network(folder).exists():
            return None
        return hashlib.sha256(self.network(folder).read_bytes()).hexdigest()[:16]

    def store(self, folder: Path, answer: Mapping[str, object], seconds: float) -> None:
        """Write the outcome.  OSError where that fails."""
        content = {
            "format": _FORMAT,
            "settings": self.settings(),
            "network": self.digest(folder),
            "seconds": seconds,
            "versions": versions(),
            "answer": answer,
        }
        write_json(content, self.file(folder))

    def stored(self, folder: Path) -> Outcome | None:
        """The outcome in the folder; None where there is none, or one about another network than is there now.

        Raises ValueError for a row of other settings, or a file that is none.
        """
        file = self.file(folder)
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            was, network, answer, seconds = (found[key] for key in ("settings", "network", "answer", "seconds"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: expected a row of a report, got a file that fails: {error}; remove it"
            ) from error
        if changed := differences(was, self.settings()):
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise ValueError(f"{file}: was made with other settings: {shown}; choose another --out, or remove it")
        if network != self.digest(folder) or (self.run is not None and network is None):
            return None
        return Outcome(answer, None, float(seconds), found.get("versions"))
