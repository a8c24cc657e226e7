"""What a training run reports: means over an epoch, and where it stands after a step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.training.loss_terms import LossTerms, Solved

__all__ = ["EpochMetrics", "Meter", "TrainingProgress"]


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """Means over the images of one epoch, each at the weights of its step; settings as they were at its end."""

    epoch: int  # from 1
    seconds: float
    eps: float
    lr: float
    loss: float
    natural_loss: float
    natural_accuracy: float
    robust_loss: float | None  # None where the loss had no robust part throughout
    robust_accuracy: float | None  # every margin > 0: certified where the margins are bounds
    unfinished: float | None = None  # share of linear programs above their gap target, fallback taken; None: no LPs
    median_gap: float | None = None  # of their certified relative gaps, to within 12 %


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a run stands after a step; what a progress bar shows."""

    epoch: int  # from 1
    epochs: int
    step: int  # of the epoch, from 1
    steps: int  # of the epoch
    eps: float
    loss: float  # means since the epoch's begin
    natural_accuracy: float
    robust_accuracy: float | None
    unfinished: float | None = None
    median_gap: float | None = None
    expected: float | None = None  # seconds that the steps left take, told once before the first of them


class GapCounts:
    """Counts of gaps by size, twenty classes a decade from 1e-9 to 1e3: memory that does not grow with the epoch."""

    DECADES = (-9, 3)
    EACH = 20

    def __init__(self) -> None:
        low, high = self.DECADES
        self.counts = torch.zeros((high - low) * self.EACH + 2, dtype=torch.float64, device="cpu")

    def add(self, gaps: Tensor) -> None:
        """Count gaps >= 0, inf among them."""
        low, high = self.DECADES
        place = ((gaps.detach().double().clamp(10.0**low / 2, 10.0**high * 2).log10() - low) * self.EACH).floor() + 1
        place = place.clamp(0, len(self.counts) - 1).long().cpu()
        self.counts += torch.bincount(place, minlength=len(self.counts))

    @property
    def median(self) -> float | None:
        """The geometric middle of the median's class; 0 below 1e-9, inf above 1e3; None of nothing."""
        total = float(self.counts.sum())
        if not total:
            return None
        place = int((self.counts.cumsum(0) >= total / 2).nonzero()[0])
        if place == 0:
            return 0.0
        low = self.DECADES[0]
        return math.inf if place == len(self.counts) - 1 else float(10 ** (low + (place - 0.5) / self.EACH))


class Meter:
    """Sums over the images of an epoch so far; sums of several processes add up."""

    _FIELDS = ("images", "loss", "natural", "correct", "robust_images", "robust", "held", "problems", "unfinished")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self._FIELDS, 0.0)
        self.gaps = GapCounts()
        self.started = time.perf_counter()

    def add(self, terms: LossTerms, labels: Tensor) -> None:
        """Count one batch, or a piece of one."""
        n, sums = len(labels), self.sums
        sums["images"] += n
        sums["loss"] += n * terms.total.item()
        sums["natural"] += n * terms.natural.item()
        sums["correct"] += int((terms.logits.argmax(1) == labels).sum())
        if terms.robust is not None and terms.margins is not None:
            sums["robust_images"] += n
            sums["robust"] += n * terms.robust.item()
            sums["held"] += int((terms.margins > 0).all(1).sum())
        if terms.solved is not None:
            self._add_solved(terms.solved)

    def _add_solved(self, solved: Solved) -> None:
        self.sums["problems"] += solved.unfinished.numel()
        self.sums["unfinished"] += int(solved.unfinished.sum())
        self.gaps.add(solved.gaps)

    def tensor(self) -> Tensor:
        """Every sum as one vector."""
        return torch.cat([torch.tensor(list(self.sums.values()), dtype=torch.float64, device="cpu"), self.gaps.counts])

    @property
    def seconds(self) -> float:
        """Wall time of the epoch so far, that before an interruption included."""
        return time.perf_counter() - self.started

    def load(self, total: Tensor, seconds: float | None = None) -> None:
        """Take the sums of a vector that `tensor` gave, several of them added up, and the time spent on them."""
        if seconds is not None:
            self.started = time.perf_counter() - seconds
        numbers = total[: len(self._FIELDS)].tolist()
        self.sums = dict(zip(self._FIELDS, numbers, strict=True))
        self.gaps.counts = total[len(self._FIELDS) :].clone()

    def _mean(self, name: str, count: str) -> float | None:
        return self.sums[name] / self.sums[count] if self.sums[count] else None

    def progress(self, epoch: int, epochs: int, step: int, steps: int, eps: float) -> TrainingProgress:
        """Where the run stands: epoch and step from 0."""
        return TrainingProgress(
            epoch=epoch + 1,
            epochs=epochs,
            step=step + 1,
            steps=steps,
            eps=eps,
            loss=self.sums["loss"] / max(1, self.sums["images"]),
            natural_accuracy=self.sums["correct"] / max(1, self.sums["images"]),
            robust_accuracy=self._mean("held", "robust_images"),
            unfinished=self._mean("unfinished", "problems"),
            median_gap=self.gaps.median,
        )

    def metrics(self, epoch: int, eps: float, lr: float) -> EpochMetrics:
        """The epoch's line."""
        images = self.sums["images"]
        return EpochMetrics(
            epoch=epoch + 1,
            seconds=round(self.seconds, 3),
            eps=eps,
            lr=lr,
            loss=self.sums["loss"] / images,
            natural_loss=self.sums["natural"] / images,
            natural_accuracy=self.sums["correct"] / images,
            robust_loss=self._mean("robust", "robust_images"),
            robust_accuracy=self._mean("held", "robust_images"),
            unfinished=self._mean("unfinished", "problems"),
            median_gap=self.gaps.median,
        )
