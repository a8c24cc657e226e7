"""Tightness: how much each relaxation certifies on one fixed network, as a function of eps, in one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optrelax.analysis import Net
from optrelax.certification.attacks import PGD, Attack
from optrelax.certification.certifiers import Certifier
from optrelax.certification.preparation import batch_size_of
from optrelax.checks import require_range
from optrelax.data.samples import gather
from optrelax.measurements.radii import RadiusSearch
from optrelax.measurements.radius_rows import (
    ATTACK,
    BoundQuality,
    RadiusRow,
    fill_areas,
    median_attacked,
    searched_rows,
)
from optrelax.measurements.stages import DEFAULT, ReportProgress, reporter
from optrelax.relaxations import NamedRelaxations
from optrelax.rounding import Rounding

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from optrelax.layers.milp import Milp

__all__ = ["Tightness", "measure_tightness"]

_PGD = PGD(restarts=1)


@dataclass(frozen=True, slots=True, eq=False)
class Tightness:
    """Result of `measure_tightness`: certified robustness against eps on the same examples, one row a relaxation.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((2, 2), 0.5)
        >>> found = ox.measure_tightness(net, (x, net(x).argmax(1)), ["box"], resolution=0.01, resamples=10)
        >>> found.table["relaxation"].to_list()
        ['box', 'attack']
    """

    table: pl.DataFrame
    """relaxation; area: under the curve of the certified fraction over eps, times 100; low, high: confidence interval
    of the area over examples; median radius: largest certified eps; gap: mean over examples, at `at`, of the smallest
    margin's exact value (without MILP: the least found, so at most this gap) minus its lower bound, in logits;
    propagation %: mean over all margins, at `at`, of the width of the range found to the width of the interval
    proved, so the true ratio is at least this; search; bounds: of an example, in the search; seconds.
    The row `milp` holds the exact answer, `attack` the limit that no sound bound crosses."""
    examples: pl.DataFrame
    """index, label, `radius:NAME` of each row of the table, 0 for a misclassified example."""
    settings: Mapping[str, Any]
    """JSON-ready: relaxations, clip, limit, resolution, points, at, dtype, rounding, milp, attack, confidence, ..."""

    def summary(self) -> dict[str, object]:
        """Settings and table, JSON-ready."""
        return {**self.settings, "examples": self.examples.height, "table": self.table.to_dicts()}

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Corners of the step curve: radii ascending from 0, and the fraction certified up to each."""
        from optrelax.measurements.figures import certified_steps

        return certified_steps(self.examples[f"radius:{name}"].to_list())

    def figure(self, title: str = "") -> Figure:
        """Certified fraction against eps, one step curve a relaxation, the tightest first; the attack in grey."""
        from optrelax.measurements.figures import tightness_curves

        areas = dict(self.table.select("relaxation", "area").iter_rows())
        curves = {name: self.curve(name) for name in areas}
        return tightness_curves(curves, areas, title=title, reference=ATTACK, norm=self.settings["norm"])


def measure_tightness(
    net: Net,
    data: object,
    relaxations: NamedRelaxations = DEFAULT,
    *,
    clip: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
    limit: float | None = None,
    resolution: float = 1e-4,
    points: int = 64,
    at: float | None = None,
    milp: Milp | bool = False,
    attack: Attack = _PGD,
    rounding: Rounding = "nearest",
    dtype: torch.dtype = torch.float64,
    subset: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: ReportProgress | None = None,
) -> Tightness:
    """Certified robustness of a fixed network as a function of eps, by each relaxation, and the area under it.

    An example certified at some radius is robust at every smaller one, so the curve at eps counts the examples whose
    largest certified radius is at least eps, and its integral is the mean of those radii: no grid of eps enters.
    Radii are found by bisection where a relaxation is monotone in eps, else by a scan of `points` radii an example and
    bisection above the largest certified one; each is certified itself, and lies within `resolution` of one that is
    not. An island of certified radii narrower than the scan's steps may be missed: then the area is too small.

    Args:
        net: as for `certify`.
        data: as for `certify`.
        relaxations: as for `compare`.
        clip: as for `certify`.
        norm: as for `certify`.
        limit: largest eps of interest, by default the width of clip.
        resolution: of a radius.
        points: radii an example of a scan.
        at: the eps of gap and propagation tightness, by default the median radius at which the attack succeeds.
        milp: True or a `Milp` adds the exact answer, a bisection for every example: small networks only.
        attack: what the exact answer is at most.
        rounding: as for `certify`.
        dtype: as for `certify`.
        subset: as for `certify`.
        batch_size: as for `certify`.
        max_bytes: as for `certify`.
        confidence: of the intervals, by the bootstrap over examples; all rows share its draws.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        progress: called after every batch.

    Returns:
        A table of relaxations, and one of examples.

    Raises:
        ValueError: for bad input, an estimate instead of a bound, and a relaxation that certifies what the attack
            refutes.
        UnsupportedOpError: for a network that cannot be bounded.

    Sound: every radius is certified; with rounding="outward" in real arithmetic.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((2, 2), 0.5)
        >>> found = ox.measure_tightness(net, (x, net(x).argmax(1)), ["box", "crown"], resolution=0.01, resamples=10)
        >>> box, crown, attack = found.table["area"]
        >>> box <= crown <= attack
        True
    """
    owner = "measure_tightness"
    top = _limit(owner, limit, clip)
    _require(owner, resolution, points, confidence, resamples, at)
    run = Certifier.prepared(net, gather(data, subset), 0.0, clip, relaxations, rounding, dtype, max_bytes, owner, norm)
    size = batch_size_of(owner, run.network, batch_size)
    search = RadiusSearch(run, size, top, resolution, points, reporter(progress))
    with torch.no_grad():
        rows, extra = searched_rows(search, attack, milp)
        where = median_attacked(search, rows) if at is None else at
        BoundQuality(search, where).fill(rows, extra)
    fill_areas(rows, confidence, resamples, seed)
    numbers = {"limit": top, "resolution": resolution, "points": points, "at": where, "confidence": confidence}
    numbers |= {"resamples": resamples, "seed": seed, "batch_size": size}
    return Tightness(_table(rows), _examples(run, rows), _settings(run, numbers) | extra.settings())


def _settings(run: Certifier, numbers: Mapping[str, object]) -> dict[str, object]:
    """What a result says of the run, JSON-ready."""
    names = ("clip", "norm", "relaxations", "dtype", "rounding")
    said = run.settings()
    return {**{name: said[name] for name in names}, **numbers, "threads": torch.get_num_threads()}


def _limit(owner: str, limit: float | None, clip: tuple[float, float] | None) -> float:
    if limit is None:
        if clip is None:
            raise ValueError(f"{owner}: without clip say the largest eps of interest, limit=...")
        limit = float(clip[1]) - float(clip[0])
    require_range(owner, "positive and finite", limit=limit)
    return float(limit)


def _require(owner: str, resolution: float, points: int, confidence: float, resamples: int, at: float | None) -> None:
    require_range(owner, "positive and finite", resolution=resolution)
    require_range(owner, "at least 1", points=points)
    if not 0 < confidence < 1:
        raise ValueError(f"{owner}: confidence must lie between 0 and 1, got {confidence}")
    require_range(owner, "at least 1", resamples=resamples)
    require_range(owner, "a finite eps >= 0", optional=True, at=at)


def _table(rows: Sequence[RadiusRow]) -> pl.DataFrame:
    import polars as pl

    kinds = {"relaxation": pl.String, "search": pl.String}
    names = ["relaxation", "area", "low", "high", "median radius", "gap", "propagation %"]
    names += ["search", "bounds", "seconds"]
    values = [
        (r.name, *r.area, float(torch.quantile(r.radii, 0.5)), r.gap, r.propagation, r.search, r.bounds, r.seconds)
        for r in rows
    ]
    return pl.DataFrame(values, schema={name: kinds.get(name, pl.Float64) for name in names}, orient="row")


def _examples(run: Certifier, rows: Sequence[RadiusRow]) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, object] = {"index": run.samples.index.numpy(), "label": run.samples.labels.numpy()}
    columns |= {f"radius:{row.name}": row.radii.numpy() for row in rows}
    return pl.DataFrame(columns)
