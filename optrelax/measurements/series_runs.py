"""The work of a series: every measurement of every checkpoint, what the journal holds left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from optrelax.certification.certifying import certify
from optrelax.certification.journals import weights_digest
from optrelax.measurements.continuity import measure_continuity
from optrelax.measurements.records import Records
from optrelax.measurements.sensitivity import measure_sensitivity
from optrelax.measurements.stages import ReportProgress, reporter
from optrelax.measurements.tightness import measure_tightness
from optrelax.networks.graph import Network
from optrelax.relaxations import Relaxation
from optrelax.training.recording import record

if TYPE_CHECKING:
    import polars as pl

__all__ = ["SeriesDirection", "SeriesRun", "require_direction"]

SeriesDirection = Literal["random", "gradient", "next"]

# What is taken from which measurement; every one of them has a column of the table.
_COUNTS = ("bound jumps", "loss jumps", "bound / unit", "loss / unit", "mean bound", "mean loss")
_JUMPS = ("length", *_COUNTS, "largest bound", "largest loss", "travel", "complete")
_STEPS = ("loss", "predicted", "agreement", "bound change", "gradient change")
_CERTIFIED = ("accuracy", "certified")
_TIGHTNESS = ("area", "gap", "propagation %")
_Columns = dict[str, dict[str, object]]  # by relaxation


@dataclass(frozen=True, slots=True, eq=False)
class SeriesTask:
    """One piece of work at one checkpoint; its key says all that the journal's fingerprint does not."""

    epoch: int
    stage: str
    key: Mapping[str, object]
    work: Callable[[], _Columns]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeriesRun:
    """One series: every network by every relaxation."""

    networks: Mapping[int, Network]
    data: tuple[Tensor, Tensor]
    eps: float
    relaxations: Mapping[str, Relaxation]
    direction: SeriesDirection
    shared: Mapping[str, Any]
    """clip, norm and seed, of every measurement."""
    lining: Mapping[str, object]
    """Of lines: length, lines, examples, least, cells, budget."""
    stepping: Mapping[str, object]
    """Of steps: step, ascent, and the examples, which are those of all but the lines."""
    scanning: Mapping[str, object]
    """Of radii: resolution, points."""
    tightness: bool
    """Whether it is measured."""

    def settings(self) -> dict[str, object]:
        """What decides every number, JSON-ready."""
        clip, norm, seed = (self.shared[name] for name in ("clip", "norm", "seed"))
        found = {"eps": self.eps, "clip": None if clip is None else list(clip), "norm": norm}
        found |= {"direction": self.direction, **self.lining}
        found["examples a line"] = found.pop("examples")
        return {**found, **self.stepping, **self.scanning, "seed": seed}

    def scope(self) -> dict[str, object]:
        """What is measured, JSON-ready; a journal may gain some of it."""
        return {"tightness": self.tightness, "relaxations": list(self.relaxations), "epochs": list(self.networks)}

    def run(self, records: Records, progress: ReportProgress | None) -> pl.DataFrame:
        """Do what the records lack, and collect the table."""
        tasks = [task for epoch in self.networks for task in self._tasks(epoch)]
        rows: dict[tuple[int, str], dict[str, object]] = {(e, n): {} for e in self.networks for n in self.relaxations}
        for done, task in enumerate(tasks, 1):
            found = records.get(task.key)
            if found is None:
                found = task.work()
                records.put(task.key, found)
            for name, columns in found.items():
                rows[task.epoch, name] |= columns
            reporter(progress)(task.stage, done, len(tasks))
        return _table(rows)

    def _tasks(self, epoch: int) -> Iterator[SeriesTask]:
        net = self.networks[epoch]
        following = dict(itertools.pairwise(self.networks)).get(epoch)
        after = None if following is None else self.networks[following]
        there = {"network": weights_digest(net)}
        sound = {name: relaxation for name, relaxation in self.relaxations.items() if relaxation.sound}

        def task(kind: str, which: Mapping[str, Relaxation], work: Callable[..., _Columns], **more: str) -> SeriesTask:
            key = {"measured": kind, **there, "relaxations": record(which), **more}
            stage = f"epoch {epoch}: {kind}" + (f", {next(iter(which))}" if len(which) == 1 else "")
            return SeriesTask(epoch, stage, key, work)

        if self.tightness and sound:
            yield task("tightness", sound, partial(self._tightness, net, sound))
        for name, relaxation in self.relaxations.items():
            one = {name: relaxation}
            yield task("steps", one, partial(self._steps, net, one))
            if name in sound:
                yield task("certified", one, partial(self._certified, net, one))
            if self.direction != "next":
                yield task("jumps", one, partial(self._jumps, net, one, self.direction))
            elif after is not None:
                yield task("jumps", one, partial(self._jumps, net, one, after), next=weights_digest(after))

    def _jumps(
        self, net: Network, one: Mapping[str, Relaxation], way: Literal["random", "gradient"] | Network
    ) -> _Columns:
        how = {**self.lining, **self.shared}
        (row,) = measure_continuity(net, self.data, self.eps, one, direction=way, **how).table.to_dicts()
        return {row["relaxation"]: {name: row[name] for name in _JUMPS}}

    def _steps(self, net: Network, one: Mapping[str, Relaxation]) -> _Columns:
        how: dict[str, Any] = {"steps": [self.stepping["step"]], "draws": 1, "degrees": False}
        how |= {name: self.stepping[name] for name in ("ascent", "examples")}
        rows = measure_sensitivity(net, self.data, self.eps, one, **how, **self.shared).table.to_dicts()
        kinds = {row["kind"]: row for row in rows}
        down, up = kinds["gradient step"], kinds["adversarial"]
        columns = {"loss": down["loss"], "predicted": down["predicted"], "agreement": down["agreement"]}
        columns |= {name: up[name] for name in ("bound change", "gradient change")}
        return {down["relaxation"]: {name: _finite(value) for name, value in columns.items()}}

    def _certified(self, net: Network, one: Mapping[str, Relaxation]) -> _Columns:
        how = {"clip": self.shared["clip"], "norm": self.shared["norm"], "subset": self.stepping["examples"]}
        report = certify(net, self.data, self.eps, relaxation=one, attack=None, **how)
        return {name: {"accuracy": report.accuracy, "certified": report.certified} for name in one}

    def _tightness(self, net: Network, sound: Mapping[str, Relaxation]) -> _Columns:
        how = {**self.scanning, "at": self.eps, "subset": self.stepping["examples"], **self.shared}
        rows = measure_tightness(net, self.data, sound, **how).table.to_dicts()
        return {
            row["relaxation"]: {name: _finite(row[name]) for name in _TIGHTNESS}
            for row in rows
            if row["relaxation"] in sound
        }


def require_direction(owner: str, direction: str) -> None:
    """ValueError for a direction that is none."""
    if direction not in get_args(SeriesDirection):
        raise ValueError(f"{owner}: direction must be 'random', 'gradient' or 'next', got {direction!r}")


def _finite(value: float | None) -> float | None:
    """A number; None where it is none, as a change relative to 0."""
    return value if value is not None and math.isfinite(value) else None


def _table(rows: Mapping[tuple[int, str], Mapping[str, object]]) -> pl.DataFrame:
    import polars as pl

    kinds = {"bound jumps": pl.Int64, "loss jumps": pl.Int64, "complete": pl.Boolean}
    schema: dict[str, Any] = {"epoch": pl.Int64, "relaxation": pl.String}
    schema |= {name: kinds.get(name, pl.Float64) for name in (*_JUMPS, *_STEPS, *_CERTIFIED, *_TIGHTNESS)}
    whole = [
        {"epoch": epoch, "relaxation": name, **{key: columns.get(key) for key in list(schema)[2:]}}
        for (epoch, name), columns in rows.items()
    ]
    return pl.DataFrame(whole, schema=schema)
