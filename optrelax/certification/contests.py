"""Relaxations, and MILP, on the same examples: their bounds and the time that they take."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from optrelax.certification.attacks import PGD
from optrelax.certification.certifiers import Certifier
from optrelax.certification.estimates import FEW, expected_seconds
from optrelax.certification.preparation import device_of
from optrelax.disjunctions import group_bounds
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.specifications import Specification

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp
    from optrelax.layers.network_layer import NetworkLayer

__all__ = ["MILP", "ComparisonProgress", "Contest", "ContestResult", "ExactMargins"]

MILP = "milp"
"""Name of the exact answer's row."""


@dataclass(frozen=True, slots=True)
class ComparisonProgress:
    """How far a comparison has come: examples of one relaxation's run."""

    relaxation: str
    done: int
    total: int
    run: int
    """Runs of this relaxation before this one."""
    expected: float | None = None
    """In the first call, seconds that all relaxations take, by a few examples beforehand; without MILP."""


@dataclass(frozen=True, slots=True)
class ContestResult:
    """One relaxation on all examples."""

    name: str
    lower: Tensor  # float64 [n, k]
    gap: Tensor | None  # float64 [n, k], of LPs
    closed: Tensor | None  # bool [n, k], of LPs
    seconds: float  # an example
    runs: int  # timed


@dataclass(frozen=True, slots=True)
class ExactMargins:
    """MILP on all examples: the smallest margin of each lies in [lower, upper]."""

    milp: Milp
    lower: Tensor  # float64 [n]
    upper: Tensor  # float64 [n]
    seconds: Tensor  # float64 [n]

    @property
    def closed(self) -> Tensor:
        """Bool [n]: whether both ends are one."""
        return self.upper - self.lower <= 1e-6 * self.lower.abs().clamp_min(1)


@dataclass(frozen=True, slots=True)
class Contest:
    """The examples in batches, and every contestant on them."""

    run: Certifier
    size: int
    progress: Callable[[ComparisonProgress], None]

    def measured(self, name: str, repeats: int, patience: float) -> ContestResult:
        """All bounds by one relaxation, run once for them and the warmth and then for the time."""
        lower, gap, closed, seconds = self._once(name, 0)
        fitting = repeats if seconds == 0 else min(repeats, int(patience / seconds))
        times = [self._once(name, 1 + i)[3] for i in range(fitting)]
        return ContestResult(name, lower, gap, closed, statistics.median(times or [seconds]) / len(lower), fitting)

    def announce(self, repeats: int, patience: float) -> None:
        """Tell how long all of it will take, before it begins; of few examples nothing."""
        places, expected = torch.arange(len(self.run.samples), device="cpu"), 0.0
        if len(places) <= FEW:
            return
        for name in self.run.relaxations:
            once = expected_seconds(functools.partial(self._bounded, name), places, self.size)
            expected += once * (1 + (min(repeats, int(patience / once)) if once else repeats))
        self.progress(ComparisonProgress(next(iter(self.run.relaxations)), 0, len(places), 0, expected))

    def _bounded(self, name: str, positions: Tensor) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], float]:
        """One batch's bounds, gaps and which are closed, and the seconds of these alone."""
        _, ball, spec = self.run.question(positions)
        region, spec = self.run.rounded(ball), spec.to(dtype=self.run.dtype)
        self._wait()
        begin = time.perf_counter()
        found = _bound(self.run.relaxations[name], self.run.network, region, spec)
        self._wait()
        return found, time.perf_counter() - begin

    def _once(self, name: str, before: int) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        seconds = 0.0
        for positions in self._batches():
            found, spent = self._bounded(name, positions)
            seconds += spent
            parts.append(found)
            self.progress(ComparisonProgress(name, int(positions[-1]) + 1, len(self.run.samples), before))
        lower, gap, closed = (_joined([part[i] for part in parts]) for i in range(3))
        assert lower is not None
        return lower.double(), gap if gap is None else gap.double(), closed, seconds

    def _wait(self) -> None:
        device = device_of(self.run.network)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _batches(self) -> Iterator[Tensor]:
        yield from torch.arange(len(self.run.samples), device="cpu").split(self.size)

    def natural(self) -> Tensor:
        """Smallest margin at the examples themselves, float64 [n]."""
        found = []
        for positions in self._batches():
            x, _, spec = self.run.question(positions)
            found.append(spec.worst(spec.values(self.run.network(x).flatten(1))).amin(1).cpu())
        return torch.cat(found)

    def exact(self, milp: Milp, results: Sequence[ContestResult]) -> ExactMargins:
        """The smallest margin of each example; sound bounds leave most margins out of the search."""
        best = torch.stack([result.lower.nan_to_num(-math.inf) for result in results]).amax(0)
        found = []
        for position in range(len(best)):
            begin = time.perf_counter()
            lower, upper = self._smallest(milp, position, best[position])
            found.append((lower, upper, time.perf_counter() - begin))
            self.progress(ComparisonProgress(MILP, position + 1, len(best), 0))
        lowers, uppers, seconds = torch.tensor(found, dtype=torch.float64, device="cpu").unbind(1)
        return ExactMargins(milp, lowers, uppers, seconds)

    def _smallest(self, milp: Milp, position: int, sound: Tensor) -> tuple[float, float]:
        """Bounds of one example's smallest margin: the most doubtful margins first, none that cannot be it."""
        deadline = time.monotonic() + milp.time_limit
        _, ball, spec = self.run.question(torch.tensor([position], device="cpu"))
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
    relaxation: Relaxation, network: Network, region: Region, spec: Specification
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Lower bounds [batch, groups]; with an LP layer, and plain rows, their certified gaps and which are closed."""
    plain = spec.single and not bool(spec.offsets.any()) and spec.slack is None
    if not relaxation.solves or not plain:
        return group_bounds(relaxation, network, region, spec), None, None
    from optrelax.layers.solutions import Status

    solution = cast("NetworkLayer", relaxation).solve(network, region, spec.rows)
    return spec.worst(solution.lower), solution.gap, solution.status == Status.OPTIMAL


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    kept = [part.cpu() for part in parts if part is not None]
    return torch.cat(kept) if kept else None
