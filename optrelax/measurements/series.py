"""Series: what relaxations make of the loss at every checkpoint of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optrelax.analysis import Net
from optrelax.certification.journals import tensor_digest
from optrelax.data.samples import gather
from optrelax.measurements.questions import ask, require_positive
from optrelax.measurements.records import Records
from optrelax.measurements.series_files import PathLike, series_networks
from optrelax.measurements.series_runs import SeriesDirection, SeriesRun, require_direction
from optrelax.measurements.stages import DEFAULT, MeasuredTable, ReportProgress
from optrelax.relaxations import NamedRelaxations

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["Series", "measure_series"]

_OWNER = "measure_series"


@dataclass(frozen=True, slots=True, eq=False)
class Series(MeasuredTable):
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
    settings: Mapping[str, object]
    """JSON-ready."""

    def figure(self, title: str = "") -> Figure:
        """Everything against epochs: a panel a quantity, a line a relaxation."""
        from optrelax.measurements.figures import series_panels

        return series_panels(self.table, title=title)


def measure_series(
    checkpoints: PathLike | Sequence[PathLike] | Mapping[int, Net],
    data: object,
    eps: float,
    relaxations: NamedRelaxations = DEFAULT,
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
    require_direction(_OWNER, direction)
    # What would else be refused after the first hours of work, or under another name.
    require_positive(_OWNER, step=step, lines=lines, examples=examples, subset=subset)
    require_positive(_OWNER, resolution=resolution, points=points)
    everything = gather(data)
    everything.require_range(clip, _OWNER)
    networks = series_networks(checkpoints, tuple(everything.x.shape[1:]))
    count = len(everything) if subset is None else subset
    most = max(count, examples if direction == "next" else lines * examples)
    named = ask(_OWNER, next(iter(networks.values())), data, relaxations, eps, clip, most, norm).relaxations
    lining = {"length": length, "lines": lines, "examples": examples, "least": least, "cells": cells, "budget": budget}
    work = SeriesRun(
        networks=networks,
        data=(everything.x, everything.labels),
        eps=float(eps),
        relaxations=named,
        direction=direction,
        shared={"clip": clip, "norm": norm, "seed": seed},
        lining=lining,
        stepping={"step": step, "ascent": ascent, "examples": count},
        scanning={"resolution": resolution, "points": points},
        tightness=tightness,
    )
    table = work.run(Records(journal, work.settings() | {"data": tensor_digest(*work.data)}), progress)
    return Series(table, work.settings() | work.scope() | {"threads": torch.get_num_threads()})
