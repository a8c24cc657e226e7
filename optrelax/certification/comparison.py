"""Comparison: what each relaxation proves on one network and data set and what it costs, closed forms, LPs and MILP."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.certifiers import Certifier
from optrelax.certification.contests import MILP, ComparisonProgress, Contest, ContestResult, ExactMargins
from optrelax.certification.preparation import asked_samples, batch_size_of, device_of, milp_of
from optrelax.checks import require_range
from optrelax.joined_specifications import Spec
from optrelax.output.tables import text_table
from optrelax.regions import Region
from optrelax.relaxations import NamedRelaxations
from optrelax.rounding import Rounding
from optrelax.training.recording import record

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from optrelax.layers.milp import Milp

__all__ = ["DECIMALS", "DEFAULT", "Comparison", "compare"]

DEFAULT = ("box", "crown", "triangle", "layerwise")
"""Closed forms and LPs, from loose to tight."""
DECIMALS = {"certified %": 2, "closed %": 1, "mean bound": 4, "worst bound": 4, "ms an example": 2}
"""Places of the table's columns for people."""


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
    settings: Mapping[str, object]
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

    def summary(self) -> dict[str, object]:
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
    data: object,
    eps: float | None = None,
    relaxations: NamedRelaxations = DEFAULT,
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
        progress: called before the first batch, with the seconds to expect, and after every batch.

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
    require_range("compare", "at least 1", repeats=repeats)
    require_range("compare", ">= 0 seconds", patience=patience)
    samples, region, asked = asked_samples(data, subset, region, spec)
    solver = milp_of(milp)
    if solver is not None and asked is not None:
        raise ValueError("compare: milp takes the margins of labels, not a specification; leave it out")
    run = Certifier.prepared(
        net, samples, eps, clip, relaxations, rounding, dtype, max_bytes, "compare", norm, region=region, spec=asked
    )
    size = batch_size_of("compare", run.network, batch_size)
    with torch.no_grad():
        contest = Contest(run, size, progress or (lambda _: None))
        if progress is not None:
            contest.announce(repeats, patience)
        results = [contest.measured(name, repeats, patience) for name in run.relaxations]
        exact = None if solver is None else contest.exact(solver, results)
        natural = contest.natural()
    settings = {key: value for key, value in run.settings().items() if key not in ("attack", "exact")}
    settings |= {
        "milp": None if exact is None else record(exact.milp),
        "batch_size": size,
        "device": str(device_of(run.network)),
        "threads": torch.get_num_threads(),
        "accuracy": float((natural > 0).double().mean()),
    }
    return Comparison(_table(results, exact), _examples(run, natural, results, exact), settings)


def _table(results: Sequence[ContestResult], exact: ExactMargins | None) -> pl.DataFrame:
    import polars as pl

    rows = [_row(r.name, r.lower.amin(1), r.seconds, r.runs, r.gap, r.closed) for r in results]
    if exact is not None:
        seconds = float(exact.seconds.mean())
        rows.append(_row(MILP, exact.lower, seconds, 0, exact.upper - exact.lower, exact.closed))
    kinds = {"relaxation": pl.String, "timed runs": pl.Int64}
    return pl.DataFrame(rows, schema={name: kinds.get(name, pl.Float64) for name in rows[0]})


def _row(
    name: str, worst: Tensor, seconds: float, runs: int, gap: Tensor | None, closed: Tensor | None
) -> dict[str, object]:
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


def _examples(
    run: Certifier, natural: Tensor, results: Sequence[ContestResult], exact: ExactMargins | None
) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, object] = {
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
