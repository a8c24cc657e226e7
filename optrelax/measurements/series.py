"""Series: what relaxations make of the loss at every checkpoint of a training run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.certifying import certify
from optrelax.certification.journals import tensor_digest, weights_digest
from optrelax.data.samples import gather
from optrelax.measurements.continuity import DEFAULT, measure_continuity
from optrelax.measurements.questions import ask
from optrelax.measurements.records import Records
from optrelax.measurements.sensitivity import measure_sensitivity
from optrelax.measurements.series_files import PathLike, series_networks
from optrelax.measurements.stages import MeasurementProgress, ReportProgress
from optrelax.measurements.tightness import measure_tightness
from optrelax.networks.graph import Network
from optrelax.relaxations import Relaxation
from optrelax.training.runs import record

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["Series", "SeriesDirection", "measure_series"]

SeriesDirection = Literal["random", "gradient", "next"]
_OWNER = "measure_series"

# What is taken from which measurement; every one of them has a column of the table.
_JUMPS: tuple[str, ...] = (
    "length",
    "bound jumps",
    "loss jumps",
    "bound / unit",
    "loss / unit",
    "mean bound",
    "mean loss",
)
_JUMPS += ("largest bound", "largest loss", "travel", "complete")
_STEPS = ("loss", "predicted", "agreement", "bound change", "gradient change")
_CERTIFIED = ("accuracy", "certified")
_TIGHTNESS = ("area", "gap", "propagation %")


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Result of `measure_series`: one row a checkpoint and relaxation, on the same examples, lines and steps.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> few = {"lines": 1, "examples": 1, "subset": 1, "tightness": False, "cells": 4}
        >>> found = ox.measure_series({0: net}, (x, net(x).argmax(1)), 0.1, "box", **few)
        >>> found.table["certified"].to_list()
        [1.0]
    """

    table: pl.DataFrame
    """epoch; relaxation; of jumps along lines, as `Continuity.table`: length, bound jumps, loss jumps, bound / unit,
    loss / unit, mean bound, mean loss, largest bound, largest loss, travel, complete; of steps, as `Sensitivity.table`:
    loss, predicted and agreement (straight down the gradient), bound change and gradient change (adversarial); accuracy
    and certified: fractions of the examples; area, gap, propagation %: as `Tightness.table`, the last two at eps.
    Null: what was not measured; an estimate certifies nothing, and with "next" the last checkpoint has no line."""
    settings: Mapping[str, Any]
    """JSON-ready."""

    def summary(self) -> dict[str, Any]:
        """Settings and table, JSON-ready."""
        return {**self.settings, "table": self.table.to_dicts()}

    def figure(self, title: str = "") -> Figure:
        """Everything against epochs: a panel a quantity, a line a relaxation."""
        from optrelax.measurements.figures import series_panels

        return series_panels(self.table, title=title)


def measure_series(
    checkpoints: PathLike | Sequence[PathLike] | Mapping[int, Net],
    data: Any,
    eps: float,
    relaxations: Relaxation | str | Sequence[Relaxation | str] | Mapping[str, Relaxation | str] = DEFAULT,
    *,
    direction: SeriesDirection = "random",
    length: float | None = None,
    lines: int = 4,
    examples: int = 4,
    step: float = 1e-2,
    ascent: int = 5,
    subset: int | None = 100,
    tightness: bool = True,
    resolution: float = 1e-3,
    points: int = 16,
    clip: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
    least: float = 1e-9,
    cells: int = 32,
    budget: int = 20000,
    seed: int = 0,
    journal: PathLike | None = None,
    progress: ReportProgress | None = None,
) -> Series:
    """Continuity, sensitivity, tightness and certified accuracy of every relaxation at every checkpoint.

    Each number is what `measure_continuity`, `measure_sensitivity`, `measure_tightness` and `certify` give. All
    relaxations and checkpoints share examples and random draws, so their rows compare.

    Args:
        checkpoints: a run folder that keeps networks (`train(..., keep_every=5)`; its last one is added), several files
            or run folders, or networks by epoch. All are held in memory.
        data: as for `certify`.
        eps: as for `certify`.
        relaxations: as for `compare`.
        direction: of the lines: "random"; "gradient" (down each relaxation's own loss: lines differ from relaxation to
            relaxation); "next" (one line to the next checkpoint, the chord of the way that training took; the last
            checkpoint has none).
        length, lines, examples: as for `measure_continuity`.
        step: of `measure_sensitivity`, one size.
        ascent: as for `measure_sensitivity`.
        subset: evenly spaced examples for steps, certified fraction and tightness; None for all.
        tightness: whether to measure it too.
        resolution, points: as for `measure_tightness`.
        clip: as for `certify`.
        norm: as for `certify`.
        least, cells, budget: as for `measure_continuity`.
        seed: of all draws.
        journal: JSON lines: made if it is not there, else whatever it holds of these settings is not measured again,
            also where checkpoints or relaxations have been added since.
        progress: called as checkpoints go on.

    Returns:
        A table, one row a checkpoint and relaxation.

    Raises:
        ValueError: for bad input or a journal of other settings.
        FileNotFoundError: for checkpoints that are not there.
        UnsupportedOpError: as `capture`.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> few = {"lines": 1, "examples": 1, "subset": 1, "tightness": False, "cells": 4}
        >>> found = ox.measure_series({0: net, 1: net}, (x, net(x).argmax(1)), 0.1, "box", **few)
        >>> found.table["epoch"].to_list()
        [0, 1]
    """
    _require(direction, step=step, lines=lines, examples=examples, subset=subset, resolution=resolution, points=points)
    everything = gather(data)
    everything.require_range(clip, _OWNER)
    networks = series_networks(checkpoints, tuple(everything.x.shape[1:]))
    count = len(everything) if subset is None else subset
    first = next(iter(networks.values()))
    each = examples if direction == "next" else lines * examples
    named = ask(_OWNER, first, data, relaxations, eps, clip, max(count, each), norm).relaxations
    lining = {"length": length, "lines": lines, "examples": examples, "least": least, "cells": cells, "budget": budget}
    scanning = {"resolution": resolution, "points": points}
    shared = {"clip": clip, "norm": norm, "seed": seed}
    work = _SeriesRun(
        networks=networks,
        data=(everything.x, everything.labels),
        eps=float(eps),
        relaxations=named,
        direction=direction,
        lining={**lining, **shared},
        stepping={"steps": [step], "draws": 1, "ascent": ascent, "examples": count, "degrees": False, **shared},
        certifying={"clip": clip, "norm": norm, "subset": count},
        scanning={**scanning, "at": float(eps), "subset": count, **shared} if tightness else None,
    )
    settings: dict[str, Any] = {
        "eps": float(eps),
        "clip": None if clip is None else list(clip),
        "norm": norm,
        "direction": direction,
        **lining,
    }
    settings["examples a line"] = settings.pop("examples")
    settings |= {"step": step, "ascent": ascent, "examples": count, **scanning, "seed": seed}
    digest = tensor_digest(everything.x, everything.labels)
    table = work.run(Records(journal, {**settings, "data": digest}), progress)
    settings |= {"tightness": tightness, "relaxations": list(named), "epochs": list(networks)}
    return Series(table, {**settings, "threads": torch.get_num_threads()})


def _require(direction: str, **numbers: float | None) -> None:
    """What would else be refused after the first hours of work, or under another name."""
    if direction not in get_args(SeriesDirection):
        raise ValueError(f"{_OWNER}: direction must be 'random', 'gradient' or 'next', got {direction!r}")
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{_OWNER}: {name} must be positive and finite, got {value}")


# --- the work -----------------------------------------------------------------------------------------------------

_Columns = dict[str, dict[str, Any]]  # by relaxation


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """One piece of work at one checkpoint; its key says all that the journal's fingerprint does not."""

    epoch: int
    stage: str
    key: Mapping[str, Any]
    work: Callable[[], _Columns]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _SeriesRun:
    """One series: every network by every relaxation."""

    networks: Mapping[int, Network]
    data: tuple[Tensor, Tensor]
    eps: float
    relaxations: Mapping[str, Any]
    direction: SeriesDirection
    lining: Mapping[str, Any]
    stepping: Mapping[str, Any]
    certifying: Mapping[str, Any]
    scanning: Mapping[str, Any] | None

    def run(self, records: Records, progress: ReportProgress | None) -> pl.DataFrame:
        """Do what the records lack, and collect the table."""
        tasks = [task for epoch in self.networks for task in self._tasks(epoch)]
        rows: dict[tuple[int, str], dict[str, Any]] = {(e, n): {} for e in self.networks for n in self.relaxations}
        for done, task in enumerate(tasks, 1):
            found = records.get(task.key)
            if found is None:
                found = task.work()
                records.put(task.key, found)
            for name, columns in found.items():
                rows[task.epoch, name] |= columns
            if progress is not None:
                progress(MeasurementProgress(task.stage, done, len(tasks)))
        return _table(rows)

    def _tasks(self, epoch: int) -> Iterator[_Task]:
        net = self.networks[epoch]
        following = dict(itertools.pairwise(self.networks)).get(epoch)
        after = None if following is None else self.networks[following]
        there = {"network": weights_digest(net)}
        sound = {name: relaxation for name, relaxation in self.relaxations.items() if relaxation.sound}

        def task(kind: str, which: Mapping[str, Any], work: Callable[..., _Columns], **more: str) -> _Task:
            key = {"measured": kind, **there, "relaxations": record(which), **more}
            stage = f"epoch {epoch}: {kind}" + (f", {next(iter(which))}" if len(which) == 1 else "")
            return _Task(epoch, stage, key, work)

        if self.scanning is not None and sound:
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

    def _jumps(self, net: Network, one: Mapping[str, Any], way: Any) -> _Columns:
        (row,) = measure_continuity(net, self.data, self.eps, one, direction=way, **self.lining).table.to_dicts()
        return {row["relaxation"]: {name: row[name] for name in _JUMPS}}

    def _steps(self, net: Network, one: Mapping[str, Any]) -> _Columns:
        rows = measure_sensitivity(net, self.data, self.eps, one, **self.stepping).table.to_dicts()
        kinds = {row["kind"]: row for row in rows}
        down, up = kinds["gradient step"], kinds["adversarial"]
        columns = {"loss": down["loss"], "predicted": down["predicted"], "agreement": down["agreement"]}
        columns |= {name: up[name] for name in ("bound change", "gradient change")}
        return {down["relaxation"]: {name: _finite(value) for name, value in columns.items()}}

    def _certified(self, net: Network, one: Mapping[str, Any]) -> _Columns:
        report = certify(net, self.data, self.eps, relaxation=one, attack=None, **self.certifying)
        return {name: {"accuracy": report.accuracy, "certified": report.certified} for name in one}

    def _tightness(self, net: Network, sound: Mapping[str, Any]) -> _Columns:
        assert self.scanning is not None
        rows = measure_tightness(net, self.data, sound, **self.scanning).table.to_dicts()
        return {
            row["relaxation"]: {name: _finite(row[name]) for name in _TIGHTNESS}
            for row in rows
            if row["relaxation"] in sound
        }


def _finite(value: float | None) -> float | None:
    """A number; None where it is none, as a change relative to 0."""
    return value if value is not None and math.isfinite(value) else None


def _table(rows: Mapping[tuple[int, str], Mapping[str, Any]]) -> pl.DataFrame:
    import polars as pl

    kinds = {"bound jumps": pl.Int64, "loss jumps": pl.Int64, "complete": pl.Boolean}
    schema: dict[str, Any] = {"epoch": pl.Int64, "relaxation": pl.String}
    schema |= {name: kinds.get(name, pl.Float64) for name in (*_JUMPS, *_STEPS, *_CERTIFIED, *_TIGHTNESS)}
    whole = [
        {"epoch": epoch, "relaxation": name, **{key: columns.get(key) for key in list(schema)[2:]}}
        for (epoch, name), columns in rows.items()
    ]
    return pl.DataFrame(whole, schema=schema)
