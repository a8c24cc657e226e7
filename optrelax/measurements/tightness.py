"""Tightness: how much each relaxation certifies on one fixed network, as a function of eps, in one number."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.attacks import PGD, Attack
from optrelax.certification.certifiers import Certifier, default_batch_size
from optrelax.data.samples import gather
from optrelax.measurements.margin_ranges import found_ranges
from optrelax.measurements.radii import RadiusSearch
from optrelax.measurements.stages import MeasurementProgress, ReportProgress
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.rounding import Rounding
from optrelax.specifications import label_rows

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from optrelax.layers.milp import Milp

__all__ = ["DEFAULT", "Tightness", "measure_tightness"]

DEFAULT = ("box", "hbox", "crown-ibp", "deepz", "crown")
"""The five relaxations of the paper's table, from loose to tight."""
_PGD = PGD(restarts=1)
MILP = "milp"
ATTACK = "attack"


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

    def summary(self) -> dict[str, Any]:
        """Settings and table, JSON-ready."""
        return {**self.settings, "examples": self.examples.height, "table": self.table.to_dicts()}

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Corners of the step curve: radii ascending from 0, and the fraction certified up to each."""
        everything = self.examples[f"radius:{name}"]
        radii = sorted(everything.filter(everything > 0).to_list())
        total, left = len(everything), len(radii)
        return [0.0, *radii], [left / total, *((left - 1 - i) / total for i in range(left))]

    def figure(self, title: str = "") -> Figure:
        """Certified fraction against eps, one step curve a relaxation, the tightest first; the attack in grey."""
        from optrelax.measurements.figures import tightness_curves

        areas = dict(self.table.select("relaxation", "area").iter_rows())
        curves = {name: self.curve(name) for name in areas}
        return tightness_curves(curves, areas, title=title, reference=ATTACK, norm=self.settings["norm"])


def measure_tightness(
    net: Net,
    data: Any,
    relaxations: Relaxation | str | Sequence[Relaxation | str] | Mapping[str, Relaxation | str] = DEFAULT,
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
    size = batch_size if batch_size is not None else default_batch_size(run.network)
    if size < 1:
        raise ValueError(f"{owner}: batch_size must be at least 1, got {batch_size}")

    def tell(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(MeasurementProgress(stage, done, total))

    search = RadiusSearch(run, size, top, resolution, points, tell)
    with torch.no_grad():
        rows, extra = _radii(search, attack, milp)
        where = _median(search, rows) if at is None else at
        _Quality(search, where).fill(rows, extra)
    _areas(rows, confidence, resamples, seed)
    settings = {
        "clip": run.settings()["clip"],
        "norm": norm,
        "relaxations": list(run.relaxations),
        "dtype": run.settings()["dtype"],
        "rounding": rounding,
        "limit": top,
        "resolution": resolution,
        "points": points,
        "at": where,
        "confidence": confidence,
        "resamples": resamples,
        "seed": seed,
        "batch_size": size,
        "threads": torch.get_num_threads(),
    } | extra.settings()
    return Tightness(_table(rows), _examples(run, rows), settings)


def _limit(owner: str, limit: float | None, clip: tuple[float, float] | None) -> float:
    if limit is None:
        if clip is None:
            raise ValueError(f"{owner}: without clip say the largest eps of interest, limit=...")
        limit = float(clip[1]) - float(clip[0])
    if not 0 < limit < math.inf:
        raise ValueError(f"{owner}: limit must be positive and finite, got {limit}")
    return float(limit)


def _require(owner: str, resolution: float, points: int, confidence: float, resamples: int, at: float | None) -> None:
    if not 0 < resolution < math.inf:
        raise ValueError(f"{owner}: resolution must be positive, got {resolution}")
    if points < 1:
        raise ValueError(f"{owner}: points must be at least 1, got {points}")
    if not 0 < confidence < 1:
        raise ValueError(f"{owner}: confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"{owner}: resamples must be at least 1, got {resamples}")
    if at is not None and not 0 <= at < math.inf:
        raise ValueError(f"{owner}: at must be a finite eps >= 0, got {at}")


@dataclass(slots=True, eq=False)
class _Row:
    """One line of the table while it fills."""

    name: str
    radii: Tensor  # float64 [n]
    search: str | None
    bounds: float | None
    seconds: float
    area: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    gap: float | None = None
    propagation: float | None = None


@dataclass(slots=True, eq=False)
class _Extra:
    """What is known beside the relaxations' own radii."""

    attack: Attack
    milp: Milp | None
    refuted: Tensor | None = None  # float64 [n]: radii at which MILP found a counterexample

    def settings(self) -> dict[str, Any]:
        from optrelax.training.runs import record

        found: dict[str, Any] = {"attack": record(self.attack), "milp": record(self.milp)}
        return found


def _radii(search: RadiusSearch, attack: Attack, milp: Milp | bool) -> tuple[list[_Row], _Extra]:
    """Radii by every means, the attack last."""
    begin = time.perf_counter()
    reach = search.attacked(attack)
    bottom = _Row(ATTACK, reach, "bisection", None, time.perf_counter() - begin)
    rows = []
    for name, relaxation in search.run.relaxations.items():
        begin = time.perf_counter()
        radii, asked = search.relaxed(name, reach)
        means = "bisection" if relaxation.monotone else "grid scan"
        rows.append(_Row(name, radii, means, asked / len(radii), time.perf_counter() - begin))
    extra = _Extra(attack, _milp(milp))
    if extra.milp is not None:
        begin = time.perf_counter()
        best = torch.stack([row.radii for row in rows]).amax(0)
        proved, extra.refuted = search.exact(extra.milp, best, reach)
        rows.append(_Row(MILP, proved, "bisection", None, time.perf_counter() - begin))
    return [*rows, bottom], extra


def _milp(milp: Milp | bool) -> Milp | None:
    from optrelax.layers.milp import Milp

    if milp is False:
        return None
    return Milp() if milp is True else milp


def _median(search: RadiusSearch, rows: Sequence[_Row]) -> float:
    """Median attacked radius of the examples that are classified correctly."""
    reach = rows[-1].radii
    right = reach[reach > 0]
    return float(torch.quantile(right, 0.5)) if right.numel() else 0.0


@dataclass(frozen=True, slots=True)
class _Quality:
    """Gap and propagation tightness at one radius, over the correctly classified examples."""

    search: RadiusSearch
    at: float

    def fill(self, rows: Sequence[_Row], extra: _Extra) -> None:
        """Write both into the rows of the relaxations."""
        run = self.search.run
        right = (rows[-1].radii > 0).nonzero()[:, 0]
        if right.numel() == 0:
            return
        named = {row.name: row for row in rows}
        gaps: dict[str, list[Tensor]] = {name: [] for name in run.relaxations}
        shares: dict[str, list[Tensor]] = {name: [] for name in run.relaxations}
        for p in self.search._batches(right):
            rows_of, ball = self._question(p)
            least, most = found_ranges(run.network, ball, rows_of)
            smallest = least.amin(1) if extra.milp is None else self._exact(extra.milp, ball, rows_of, least)
            for name, relaxation in run.relaxations.items():
                lower, upper = self._interval(relaxation, ball, rows_of)
                gaps[name].append((smallest - lower.amin(1)).cpu())
                # An interval of no width is exact; the widths found never exceed those proved but by rounding.
                width = upper - lower
                share = torch.where(width > 0, (most - least) / width.clamp_min(1e-300), 1.0)
                shares[name].append(share.clamp_max(1.0).flatten().cpu())
        for name in run.relaxations:
            named[name].gap = float(torch.cat(gaps[name]).mean())
            named[name].propagation = 100 * float(torch.cat(shares[name]).mean())

    def _question(self, positions: Tensor) -> tuple[Tensor, Region]:
        run = self.search.run
        x = self.search._x(positions)
        rows = label_rows(run.samples.labels[positions], run.network.output_shape, "measure_tightness").to(x)
        return rows.reshape(*rows.shape[:2], *run.network.output_shape), run.ball(x, self.at)

    def _interval(self, relaxation: Any, ball: Region, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both bounds of every margin: float64 [batch, k]."""
        run = self.search.run
        both = torch.cat([rows, -rows], 1).to(run.dtype)
        lower = relaxation.lower_bounds(run.network, run.rounded(ball), both).double()
        k = rows.shape[1]
        return lower[:, :k], -lower[:, k:]

    def _exact(self, milp: Milp, ball: Region, rows: Tensor, least: Tensor) -> Tensor:
        """The exact smallest margin of each example, as far as the solver's claim goes: [batch]."""
        found = least.amin(1)
        for i in range(len(found)):
            one = ball.select(slice(i, i + 1))
            answer = milp.minima(self.search.run.network, one, rows[i : i + 1])
            found[i] = torch.minimum(found[i].cpu(), answer.upper.amin())
        return found


def _areas(rows: Sequence[_Row], confidence: float, resamples: int, seed: int) -> None:
    """100 times the mean radius, and the bootstrap's percentiles of it."""
    n = len(rows[0].radii)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    for row in rows:
        low, high = torch.quantile(row.radii[draws].mean(1), tails).tolist()
        row.area = (100 * float(row.radii.mean()), 100 * low, 100 * high)


def _table(rows: Sequence[_Row]) -> pl.DataFrame:
    import polars as pl

    kinds = {"relaxation": pl.String, "search": pl.String}
    names = (
        "relaxation",
        "area",
        "low",
        "high",
        "median radius",
        "gap",
        "propagation %",
        "search",
        "bounds",
        "seconds",
    )
    values = [
        (
            row.name,
            *row.area,
            float(torch.quantile(row.radii, 0.5)),
            row.gap,
            row.propagation,
            row.search,
            row.bounds,
            row.seconds,
        )
        for row in rows
    ]
    return pl.DataFrame(values, schema={name: kinds.get(name, pl.Float64) for name in names}, orient="row")


def _examples(run: Certifier, rows: Sequence[_Row]) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, Any] = {"index": run.samples.index.numpy(), "label": run.samples.labels.numpy()}
    columns |= {f"radius:{row.name}": row.radii.numpy() for row in rows}
    return pl.DataFrame(columns)
