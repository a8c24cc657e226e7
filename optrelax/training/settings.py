"""How to train: the loss, its schedules, the optimiser and the images, as one frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from optrelax.checks import require_choice, require_range
from optrelax.networks.graph import Statistics
from optrelax.regions import Region, ball_of
from optrelax.training.loss_terms import Loss
from optrelax.training.optimisation import Optimisation
from optrelax.training.schedules import ConstantSchedule, Schedule, Stages

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training(Optimisation):
    """How to train: the loss, how its settings change by epoch, the optimiser and the images.

    loss: one loss, or `Stages` of losses by epoch (Box, then CROWN-IBP, then the triangle LP).
    eps: radius of the region around each image, in the units of the images, which lie in `clip`.
    norm: of the region: "linf", "l2" or "l1".
    kappa, beta, sigma: the loss's fields of these names (or those of the loss inside it) where they change; None
    leaves the loss as it is.
    lr: learning rate.  batch: images a step; the last step of an epoch takes what is left.
    optimizer, weight_decay, clip_norm, average, augment: see `Optimisation`.
    pieces: every batch is worked on in so many pieces, one at a time, whose gradients add up to the batch's: less
    memory; several processes share the pieces.
    statistics: of batch norms in training mode, see `optrelax.on_batch`: those of each whole "batch", whatever its
    pieces and processes, or of the "population", the running ones. In eval mode they stand still.
    seed: of the order of the images and of the losses' random numbers; the initial weights are the network's own.
    """

    loss: Loss | Stages[Loss]
    epochs: int
    eps: Schedule = field(default_factory=lambda: ConstantSchedule(0.0))
    kappa: Schedule | None = None
    beta: Schedule | None = None
    sigma: Schedule | None = None
    lr: Schedule = field(default_factory=lambda: ConstantSchedule(5e-4))
    batch: int = 100
    pieces: int = 1
    clip: tuple[float, float] | None = (0.0, 1.0)
    statistics: Statistics = "batch"
    norm: str = "linf"
    seed: int = 0

    def __post_init__(self) -> None:
        ball_of(self.norm)
        for name in ("eps", "kappa", "beta", "sigma", "lr"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                how = f"use ConstantSchedule({given!r}) or LinearRamp of optrelax.training.schedules"
                raise TypeError(f"Training: {name} must be a schedule, got {type(given).__name__}; {how}")
        require_range("Training", "at least 1", epochs=self.epochs, batch=self.batch, pieces=self.pieces)
        if self.pieces > self.batch:
            raise ValueError(f"Training: pieces must be at most batch {self.batch}, got {self.pieces}")
        require_choice("Training", "statistics", self.statistics, "batch", "population")
        self.require_known()
        require_range("Training", ">= 0", seed=self.seed)
        for name in self._moving():
            for loss in self.losses:
                if not _has(loss, name):
                    raise ValueError(f"Training: {name} has a schedule, but {type(loss).__name__} has no {name}")

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The loss, or those of every stage."""
        return self._stages.values

    @property
    def _stages(self) -> Stages[Loss]:
        return self.loss if isinstance(self.loss, Stages) else Stages((self.loss,), (0.0,))

    def region(self, x: Tensor, eps: float) -> Region:
        """What each image is trained in, around images [batch, *input_shape]."""
        return ball_of(self.norm)(x, eps, self.clip)

    def _moving(self) -> dict[str, Schedule]:
        moving = {name: getattr(self, name) for name in ("kappa", "beta", "sigma")}
        return {name: schedule for name, schedule in moving.items() if schedule is not None}

    def loss_at(self, epoch: float) -> Loss:
        """The loss with its settings at a position in epochs."""
        return _with(self._stages(epoch), {name: schedule(epoch) for name, schedule in self._moving().items()})


def _fields(loss: object) -> set[str]:
    return {f.name for f in fields(loss)} if is_dataclass(loss) else set()


def _has(loss: object, name: str) -> bool:
    """Whether a loss, or the loss inside it, has a field."""
    known = _fields(loss)
    return name in known or ("loss" in known and _has(loss.loss, name))  # type: ignore[attr-defined]


def _with(loss: Any, values: Mapping[str, float]) -> Loss:
    """The loss with other values of its fields, or of those of the loss inside it."""
    if not values:
        return loss
    known = _fields(loss)
    mine: dict[str, object] = {name: value for name, value in values.items() if name in known}
    rest = {name: value for name, value in values.items() if name not in known}
    if rest:
        mine["loss"] = _with(loss.loss, rest)
    return replace(loss, **mine)
