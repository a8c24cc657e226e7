"""Comparison: what each relaxation proves on one network and data set and what it costs, closed forms, LPs and MILP."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.attacks import PGD
from optrelax.certification.certifiers import Certifier, default_batch_size
from optrelax.data.samples import gather
from optrelax.disjunctions import group_bounds
from optrelax.output.tables import text_table
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.rounding import Rounding
from optrelax.specifications import Spec, Specification, as_specification
from optrelax.training.runs import record

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from optrelax.layers.milp import Milp

__all__ = ["DECIMALS", "DEFAULT", "Comparison", "ComparisonProgress", "compare"]

DEFAULT = ("box", "crown", "triangle", "layerwise")
"""Closed forms and LPs, from loose to tight."""
MILP = "milp"
"""Name of the exact answer's row."""
DECIMALS = {"certified %": 2, "closed %": 1, "mean bound": 4, "worst bound": 4, "ms an example": 2}
"""Places of the table's columns for people."""


@dataclass(frozen=True, slots=True)
class ComparisonProgress:
    """How far a comparison has come: examples of one relaxation's run."""

    relaxation: str
    done: int
    total: int
    run: int
    """Runs of this relaxation before this one."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Result of `compare`: one row a relaxation, all on the same examples and the same regions.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> found = ox.compare(net, (x, net(x).argmax(1)), eps=0.001, relaxations=["box", "crown"], repeats=1)
        >>> found.table["relaxation"].to_list(), found.table["certified %"].to_list()
        (['box', 'crown'], [100.0, 100.0])
    """

    table: pl.DataFrame
    """relaxation; certified %; mean bound, worst bound: of the smallest margin of each example, in logits;
    ms an example: all its margins, batched, median of `timed runs` after a warm one; median gap, 99 % gap: certified,
    absolute, over all margins; closed %: margins within the solver's tolerance. The last three of LPs only; in the
    row `milp` of the smallest margins, between the solver's claim and the best point found."""
    examples: pl.DataFrame
    """index, label, natural_margin, `lower:NAME` (smallest margin's bound) of each relaxation, `gap:NAME` (largest of
    the margins') of each LP; of MILP milp_lower, milp_upper and milp_seconds."""
    settings: Mapping[str, Any]
    """JSON-ready: eps, clip, relaxations, dtype, rounding, milp, batch_size, device, threads, accuracy."""

    def shown(self) -> pl.DataFrame:
        """The table as people are shown it: without `timed runs` and columns that say nothing here."""
        said = [name for name in self.table.columns if self.table[name].is_not_null().any()]
        return self.table.select(said).drop("timed runs")

    @property
    def legend(self) -> str:
        """What the columns mean, a line each."""
        lines = ["bound: of an example's smallest margin, in logits"]
        if "median gap" in self.shown().columns:
            lines.append("gap: certified, absolute, of all margins; closed: within the solver's tolerance")
        if MILP in self.table["relaxation"]:
            lines.append("milp: exact where closed, by the word of its solver")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{text_table(self.shown(), decimals=DECIMALS)}\n{self.legend}"

    def summary(self) -> dict[str, Any]:
        """Settings and table, JSON-ready."""
        return {**self.settings, "examples": self.examples.height, "table": self.table.to_dicts()}

    def figure(self, title: str = "") -> Figure:
        """Tightness against time, a mark a relaxation; MILP, where it was asked, as a line that no bound crosses.

        Raises ValueError where no relaxation has a finite mean bound.
        """
        from optrelax.output.plots import Point, tightness_against_time

        rows = self.table.filter(self.table["mean bound"].is_finite()).rows(named=True)
        points = [
            Point(row["relaxation"], row["ms an example"] / 1e3, row["mean bound"])
            for row in rows
            if row["relaxation"] != MILP
        ]
        if "milp_upper" not in self.examples.columns:
            return tightness_against_time(points, title=title)
        settled = self.table.filter(self.table["relaxation"] == MILP)["closed %"].item() == 100
        label = "exact (MILP)" if settled else "upper bound (MILP)"
        exact = statistics.fmean(self.examples["milp_upper"])
        return tightness_against_time(points, title=title, exact=exact, exact_label=label)


def compare(
    net: Net,
    data: Any,
    eps: float | None = None,
    relaxations: Relaxation | str | Sequence[Relaxation | str] | Mapping[str, Relaxation | str] = DEFAULT,
    *,
    clip: tuple[float, float] | None = (0.0, 1.0),
    region: Region | None = None,
    spec: Spec | None = None,
    milp: Milp | bool = False,
    rounding: Rounding = "outward",
    dtype: torch.dtype = torch.float64,
    norm: str = "linf",
    subset: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    repeats: int = 3,
    patience: float = 30.0,
    progress: Callable[[ComparisonProgress], None] | None = None,
) -> Comparison:
    """Bound the margins of the same examples over the same regions by each relaxation, and take the time.

    The LP layers start from pre-activation bounds of their own, box and Fast-Lin intersected, so the triangle LP can
    lie below CROWN; on equal ones, such as `triangle:preactivation=crown`, it cannot.

    Args:
        net: as for `certify`.
        data: as for `certify`.
        eps: as for `certify`.
        relaxations: one or several names or objects, or objects by the names that the table is to show.
        clip: as for `certify`.
        region: as for `certify`.
        spec: as for `certify`.
        milp: True or a `Milp`, whose time limit an example leaves the smallest margin between two bounds; small
            networks.
        rounding: as for `certify`.
        dtype: as for `certify`.
        norm: as for `certify`.
        subset: as for `certify`.
        batch_size: as for `certify`.
        max_bytes: as for `certify`.
        repeats: timed runs after the first, which warms up; fewer where they would take more than `patience` seconds;
            where not even one fits, the first run's time counts and `timed runs` is 0.
        patience: seconds.
        progress: called after every batch.

    Returns:
        A table of the relaxations, and one of the examples.

    Raises:
        ValueError: for bad input or an unsound relaxation.
        UnsupportedOpError: for a network that cannot be bounded.

    Sound: with rounding="outward" every bound holds in real arithmetic; "nearest" is faster and certifies nothing
    that rounding could undo. The row of MILP is its solver's word.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> found = ox.compare(net, (x, net(x).argmax(1)), eps=0.001, relaxations=["box", "crown"], repeats=1)
        >>> box, crown = found.table["mean bound"]
        >>> box <= crown
        True
    """
    if repeats < 1:
        raise ValueError(f"compare: repeats must be at least 1, got {repeats}")
    if not patience >= 0:
        raise ValueError(f"compare: patience must be >= 0 seconds, got {patience}")
    asked, samples = None if spec is None else as_specification(spec), gather(data, subset)
    if subset is not None:
        region = region if region is None else region.select(samples.index.to(region.device))
        asked = asked if asked is None else asked.flat().select(samples.index.to(asked.rows.device))
    if milp is not False and asked is not None:
        raise ValueError("compare: milp takes the margins of labels, not a specification; leave it out")
    run = Certifier.prepared(
        net,
        samples,
        eps,
        clip,
        relaxations,
        rounding,
        dtype,
        max_bytes,
        owner="compare",
        norm=norm,
        region=region,
        spec=asked,
    )
    size = batch_size if batch_size is not None else default_batch_size(run.network)
    if size < 1:
        raise ValueError(f"compare: batch_size must be at least 1, got {batch_size}")
    with torch.no_grad():
        contest = _Contest(run, size, progress or (lambda _: None))
        results = [contest.measured(name, repeats, patience) for name in run.relaxations]
        exact = contest.exact(_milp(milp), results) if milp is not False else None
        natural = contest.natural()
    settings = {key: value for key, value in run.settings().items() if key not in ("attack", "exact")}
    settings |= {
        "milp": None if exact is None else record(exact.milp),
        "batch_size": size,
        "device": str(contest.device),
        "threads": torch.get_num_threads(),
        "accuracy": float((natural > 0).double().mean()),
    }
    return Comparison(_table(results, exact), _examples(run, natural, results, exact), settings)


@dataclass(frozen=True, slots=True)
class _Result:
    """One relaxation on all examples."""

    name: str
    lower: Tensor  # float64 [n, k]
    gap: Tensor | None  # float64 [n, k], of LPs
    closed: Tensor | None  # bool [n, k], of LPs
    seconds: float  # an example
    runs: int  # timed


@dataclass(frozen=True, slots=True)
class _Exact:
    """MILP on all examples: the smallest margin of each lies in [lower, upper]."""

    milp: Milp
    lower: Tensor  # float64 [n]
    upper: Tensor  # float64 [n]
    seconds: Tensor  # float64 [n]

    @property
    def closed(self) -> Tensor:
        return self.upper - self.lower <= 1e-6 * self.lower.abs().clamp_min(1)


@dataclass(frozen=True, slots=True)
class _Contest:
    """The examples in batches, and every contestant on them."""

    run: Certifier
    size: int
    progress: Callable[[ComparisonProgress], None]

    @property
    def device(self) -> torch.device:
        return next(iter(self.run.network.module.parameters()), torch.zeros(())).device

    def measured(self, name: str, repeats: int, patience: float) -> _Result:
        """All bounds by one relaxation, run once for them and the warmth and then for the time."""
        lower, gap, closed, seconds = self._once(name, 0)
        fitting = repeats if seconds == 0 else min(repeats, int(patience / seconds))
        times = [self._once(name, 1 + i)[3] for i in range(fitting)]
        return _Result(name, lower, gap, closed, statistics.median(times or [seconds]) / len(lower), fitting)

    def _once(self, name: str, before: int) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        relaxation = self.run.relaxations[name]
        parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        seconds = 0.0
        for positions in self._batches():
            _, ball, spec = self.run.question(positions)
            region, spec = self.run.rounded(ball), spec.to(dtype=self.run.dtype)
            self._wait()
            begin = time.perf_counter()
            found = _bound(relaxation, self.run.network, region, spec)
            self._wait()
            seconds += time.perf_counter() - begin
            parts.append(found)
            self.progress(ComparisonProgress(name, int(positions[-1]) + 1, len(self.run.samples), before))
        lower, gap, closed = (_joined([part[i] for part in parts]) for i in range(3))
        assert lower is not None
        return lower.double(), gap if gap is None else gap.double(), closed, seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _batches(self) -> Iterator[Tensor]:
        yield from torch.arange(len(self.run.samples)).split(self.size)

    def natural(self) -> Tensor:
        """Smallest margin at the examples themselves, float64 [n]."""
        found = []
        for positions in self._batches():
            x, _, spec = self.run.question(positions)
            found.append(spec.worst(spec.values(self.run.network(x).flatten(1))).amin(1).cpu())
        return torch.cat(found)

    def exact(self, milp: Milp, results: Sequence[_Result]) -> _Exact:
        """The smallest margin of each example; sound bounds leave most margins out of the search."""
        best = torch.stack([result.lower.nan_to_num(-math.inf) for result in results]).amax(0)
        found = []
        for position in range(len(best)):
            begin = time.perf_counter()
            lower, upper = self._smallest(milp, position, best[position])
            found.append((lower, upper, time.perf_counter() - begin))
            self.progress(ComparisonProgress(MILP, position + 1, len(best), 0))
        lowers, uppers, seconds = torch.tensor(found, dtype=torch.float64).unbind(1)
        return _Exact(milp, lowers, uppers, seconds)

    def _smallest(self, milp: Milp, position: int, sound: Tensor) -> tuple[float, float]:
        """Bounds of one example's smallest margin: the most doubtful margins first, none that cannot be it."""
        deadline = time.monotonic() + milp.time_limit
        _, ball, spec = self.run.question(torch.tensor([position]))
        shaped = spec.rows.reshape(*spec.rows.shape[:2], *self.run.network.output_shape)
        upper = float(PGD().search(self.run.network, ball, shaped, [position]).worst)
        lower = sound.clone()
        for row in sound.argsort().tolist():
            left = deadline - time.monotonic()
            if not sound[row] < upper or left <= 0:
                break
            answer = replace(milp, time_limit=left).minima(self.run.network, ball, shaped[:, row : row + 1])
            lower[row] = torch.maximum(lower[row], answer.lower[0])
            upper = min(upper, float(answer.upper[0]))
        return min(float(lower.amin()), upper), upper


def _bound(
    relaxation: Any, network: Any, region: Region, spec: Specification
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Lower bounds [batch, groups]; with an LP layer, and plain rows, their certified gaps and which are closed."""
    plain = spec.single and not bool(spec.offsets.any()) and spec.slack is None
    if not relaxation.solves or not plain:
        return group_bounds(relaxation, network, region, spec), None, None
    from optrelax.layers.solutions import Status

    solution = relaxation.solve(network, region, spec.rows)
    return spec.worst(solution.lower), solution.gap, solution.status == Status.OPTIMAL


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    kept = [part.cpu() for part in parts if part is not None]
    return torch.cat(kept) if kept else None


def _milp(milp: Milp | bool) -> Milp:
    from optrelax.layers.milp import Milp

    return Milp() if isinstance(milp, bool) else milp


def _table(results: Sequence[_Result], exact: _Exact | None) -> pl.DataFrame:
    import polars as pl

    rows = [_row(r.name, r.lower.amin(1), r.seconds, r.runs, r.gap, r.closed) for r in results]
    if exact is not None:
        seconds = float(exact.seconds.mean())
        rows.append(_row(MILP, exact.lower, seconds, 0, exact.upper - exact.lower, exact.closed))
    kinds = {"relaxation": pl.String, "timed runs": pl.Int64}
    return pl.DataFrame(rows, schema={name: kinds.get(name, pl.Float64) for name in rows[0]})


def _row(
    name: str, worst: Tensor, seconds: float, runs: int, gap: Tensor | None, closed: Tensor | None
) -> dict[str, Any]:
    return {
        "relaxation": name,
        "certified %": 100 * float((worst > 0).double().mean()),
        "mean bound": float(worst.mean()),
        "worst bound": float(worst.amin()),
        "ms an example": 1e3 * seconds,
        "median gap": None if gap is None else _quantile(gap, 0.5),
        "99 % gap": None if gap is None else _quantile(gap, 0.99),
        "closed %": None if closed is None else 100 * float(closed.double().mean()),
        "timed runs": runs,
    }


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least this share of the values do not exceed: never between a number and inf."""
    ordered = values.flatten().sort().values
    return float(ordered[math.ceil(share * len(ordered)) - 1])


def _examples(run: Certifier, natural: Tensor, results: Sequence[_Result], exact: _Exact | None) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, Any] = {
        "index": run.samples.index.numpy(),
        "label": run.samples.labels.numpy(),
        "natural_margin": natural.numpy(),
    }
    columns |= {f"lower:{r.name}": r.lower.amin(1).numpy() for r in results}
    columns |= {f"gap:{r.name}": r.gap.amax(1).numpy() for r in results if r.gap is not None}
    if exact is not None:
        parts = {"milp_lower": exact.lower, "milp_upper": exact.upper, "milp_seconds": exact.seconds}
        columns |= {name: value.numpy() for name, value in parts.items()}
    return pl.DataFrame(columns)
