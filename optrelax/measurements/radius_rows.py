"""What is found of each relaxation on the way to a table of tightness: radii, gaps, widths, areas."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.certification.attacks import Attack
from optrelax.certification.preparation import milp_of
from optrelax.margin_rows import label_rows
from optrelax.measurements.margin_ranges import found_ranges
from optrelax.measurements.radii import RadiusSearch
from optrelax.regions import Region
from optrelax.relaxations import Relaxation

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp

__all__ = ["ATTACK", "BoundQuality", "RadiusRow", "fill_areas", "median_attacked", "searched_rows"]

MILP = "milp"
ATTACK = "attack"


@dataclass(slots=True, eq=False)
class RadiusRow:
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
class ExactRadii:
    """What is known beside the relaxations' own radii."""

    attack: Attack
    milp: Milp | None
    refuted: Tensor | None = None  # float64 [n]: radii at which MILP found a counterexample

    def settings(self) -> dict[str, object]:
        from optrelax.training.recording import record

        found: dict[str, object] = {"attack": record(self.attack), "milp": record(self.milp)}
        return found


def searched_rows(search: RadiusSearch, attack: Attack, milp: Milp | bool) -> tuple[list[RadiusRow], ExactRadii]:
    """Radii by every means, the attack last."""
    begin = time.perf_counter()
    reach = search.attacked(attack)
    bottom = RadiusRow(ATTACK, reach, "bisection", None, time.perf_counter() - begin)
    rows = []
    for name, relaxation in search.run.relaxations.items():
        begin = time.perf_counter()
        radii, asked = search.relaxed(name, reach)
        means = "bisection" if relaxation.monotone else "grid scan"
        rows.append(RadiusRow(name, radii, means, asked / len(radii), time.perf_counter() - begin))
    extra = ExactRadii(attack, milp_of(milp))
    if extra.milp is not None:
        begin = time.perf_counter()
        best = torch.stack([row.radii for row in rows]).amax(0)
        proved, extra.refuted = search.exact(extra.milp, best, reach)
        rows.append(RadiusRow(MILP, proved, "bisection", None, time.perf_counter() - begin))
    return [*rows, bottom], extra


def median_attacked(search: RadiusSearch, rows: Sequence[RadiusRow]) -> float:
    """Median attacked radius of the examples that are classified correctly."""
    reach = rows[-1].radii
    right = reach[reach > 0]
    return float(torch.quantile(right, 0.5)) if right.numel() else 0.0


@dataclass(frozen=True, slots=True)
class BoundQuality:
    """Gap and propagation tightness at one radius, over the correctly classified examples."""

    search: RadiusSearch
    at: float

    def fill(self, rows: Sequence[RadiusRow], extra: ExactRadii) -> None:
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

    def _interval(self, relaxation: Relaxation, ball: Region, rows: Tensor) -> tuple[Tensor, Tensor]:
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


def fill_areas(rows: Sequence[RadiusRow], confidence: float, resamples: int, seed: int) -> None:
    """100 times the mean radius, and the bootstrap's percentiles of it."""
    n = len(rows[0].radii)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed), device="cpu")
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64, device="cpu")
    for row in rows:
        low, high = torch.quantile(row.radii[draws].mean(1), tails).tolist()
        row.area = (100 * float(row.radii.mean()), 100 * low, 100 * high)
