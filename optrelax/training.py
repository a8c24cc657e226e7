"""Training by any loss, reproducible from a seed: to the bit on one machine's CPU with as many threads, through
interruptions too.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optrelax.graph import Network
from optrelax.journals import tensor_digest
from optrelax.losses import Loss, LossTerms
from optrelax.regions import LinfBall
from optrelax.runs import RunFolder, record
from optrelax.samples import gather
from optrelax.schedules import Constant, Schedule
from optrelax.tracing import capture

__all__ = ["EpochMetrics", "Progress", "Training", "TrainingError", "TrainingResult", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train: the loss, how its settings change by epoch, and the optimiser (Adam).

    eps: radius of the region around each image, in the units of the images, which lie in `clip`.
    kappa, beta: the loss's fields of these names where they change; None leaves the loss as it is.
    lr: learning rate.  batch: images a step; the last step of an epoch takes what is left.
    seed: of the order of the images and of the losses' random numbers; the initial weights are the network's own.
    """

    loss: Loss
    epochs: int
    eps: Schedule = field(default_factory=lambda: Constant(0.0))
    kappa: Schedule | None = None
    beta: Schedule | None = None
    lr: Schedule = field(default_factory=lambda: Constant(5e-4))
    batch: int = 100
    clip: tuple[float, float] | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"Training: {name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"Training: seed must be >= 0, got {self.seed}")
        known: set[str] = {f.name for f in fields(self.loss)} if is_dataclass(self.loss) else set()
        for name in ("kappa", "beta"):
            if getattr(self, name) is not None and name not in known:
                raise ValueError(f"Training: {name} has a schedule, but {type(self.loss).__name__} has no {name}")

    def loss_at(self, epoch: float) -> Any:
        """The loss with its settings at a position in epochs."""
        moving = {name: getattr(self, name) for name in ("kappa", "beta")}
        values = {name: schedule(epoch) for name, schedule in moving.items() if schedule is not None}
        return replace(self.loss, **values) if values else self.loss  # type: ignore[type-var]


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


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after a step; what a progress bar shows."""

    epoch: int  # from 1
    epochs: int
    step: int  # of the epoch, from 1
    steps: int  # of the epoch
    eps: float
    loss: float  # means since the epoch's begin
    natural_accuracy: float
    robust_accuracy: float | None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The trained network (the one given, in place) and the metrics of every epoch, resumed ones included."""

    network: Network
    history: tuple[EpochMetrics, ...]


class TrainingError(RuntimeError):
    """A loss or gradient that is not finite: where training stopped, and where the batch is kept."""

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch, self.step = epoch, step


def train(
    net: nn.Module | Network,
    data: Any,
    training: Training,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    watch: Callable[[Progress], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a network in place.

    data: a pair (images [n, *input_shape], labels [n]), a Dataset of such, or a DataLoader (read once, into memory;
    let it not shuffle, the order of each epoch is drawn here).
    folder: where the run is kept, see `optrelax.runs`; None keeps nothing.  resume: continue the run in `folder`
    after its last finished epoch (from the start where there is none), on a CPU with as many threads to the same
    weights bit for bit.
    watch: called after every step.  facts: JSON-ready facts for the configuration and the stored network.
    Raises TrainingError where a loss or gradient is NaN or infinite (the batch and the weights are stored in
    `folder`), ValueError for a run in `folder` that is not to be resumed or that differs, UnsupportedOpError for a
    network that cannot be bounded.
    """
    if resume and folder is None:
        raise ValueError("train: resume needs the folder of the run")
    samples = gather(data)
    images, labels = samples.x, samples.labels
    network = net if isinstance(net, Network) else capture(net, images.shape[1:])
    network.require_eval()
    run = _Run(network, images, labels, training)
    kept = None if folder is None else RunFolder(Path(folder))
    facts = dict(facts or {})
    done = 0
    if kept is not None:
        seen = {"examples": list(images.shape), "digest": tensor_digest(images, labels)}
        kept.open({"training": record(training), **seen, **facts}, resume)
        done = kept.restore(network.module, run.optimizer) if resume else 0
    history = [] if kept is None else [EpochMetrics(**line) for line in kept.metrics(done)]
    for epoch in range(done, training.epochs):
        metrics = run.epoch(epoch, kept, watch)
        history.append(metrics)
        _log.info("epoch %d of %d: %s", epoch + 1, training.epochs, metrics)
        if kept is not None:
            kept.append(asdict(metrics))
            kept.save(network, run.optimizer, epoch + 1, facts)
    return TrainingResult(network, tuple(history))


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone: any step can be drawn again without the steps before it."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass
class _Sums:
    """Sums over the images of an epoch so far."""

    images: int = 0
    loss: float = 0.0
    natural: float = 0.0
    correct: int = 0
    robust_images: int = 0
    robust: float = 0.0
    held: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, terms: LossTerms, labels: Tensor) -> None:
        n = len(labels)
        self.images += n
        self.loss += n * terms.total.item()
        self.natural += n * terms.natural.item()
        self.correct += int((terms.logits.argmax(1) == labels).sum())
        if terms.robust is not None and terms.margins is not None:
            self.robust_images += n
            self.robust += n * terms.robust.item()
            self.held += int((terms.margins > 0).all(1).sum())

    @property
    def robust_accuracy(self) -> float | None:
        return self.held / self.robust_images if self.robust_images else None

    def metrics(self, epoch: int, eps: float, lr: float) -> EpochMetrics:
        return EpochMetrics(
            epoch=epoch + 1,
            seconds=round(time.perf_counter() - self.started, 3),
            eps=eps,
            lr=lr,
            loss=self.loss / self.images,
            natural_loss=self.natural / self.images,
            natural_accuracy=self.correct / self.images,
            robust_loss=self.robust / self.robust_images if self.robust_images else None,
            robust_accuracy=self.robust_accuracy,
        )


class _Run:
    """The loop: one network, its optimiser, the data and the settings."""

    def __init__(self, network: Network, images: Tensor, labels: Tensor, training: Training) -> None:
        self.network, self.images, self.labels, self.training = network, images, labels, training
        self.parameters = {name: p for name, p in network.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("train: the network has no trainable parameters")
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=training.lr(0.0))
        self.steps = math.ceil(len(images) / training.batch)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels in this epoch's order, on the network's device and in its type."""
        like = next(iter(self.parameters.values()))
        order = torch.randperm(len(self.images), generator=_generator(self.training.seed, 0, epoch))
        for index in order.split(self.training.batch):
            yield self.images[index].to(like), self.labels[index].to(like.device)

    def epoch(self, epoch: int, kept: RunFolder | None, watch: Callable[[Progress], None] | None) -> EpochMetrics:
        sums, training = _Sums(), self.training
        eps = lr = 0.0
        for step, (x, labels) in enumerate(self.batches(epoch)):
            position = epoch + step / self.steps
            eps, lr = training.eps(position), training.lr(position)
            terms = self.terms(x, labels, eps, epoch, step)
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            if fault := self._fault(terms):
                raise self._failure(fault, epoch, step, eps, x, labels, kept)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            sums.add(terms, labels)
            if watch is not None:
                watch(
                    Progress(
                        epoch=epoch + 1,
                        epochs=training.epochs,
                        step=step + 1,
                        steps=self.steps,
                        eps=eps,
                        loss=sums.loss / sums.images,
                        natural_accuracy=sums.correct / sums.images,
                        robust_accuracy=sums.robust_accuracy,
                    )
                )
        return sums.metrics(epoch, eps, lr)

    def terms(self, x: Tensor, labels: Tensor, eps: float, epoch: int, step: int) -> LossTerms:
        """The loss of one batch at its place in training."""
        loss: Loss = self.training.loss_at(epoch + step / self.steps)
        region = LinfBall(x, eps, self.training.clip)
        draws = _generator(self.training.seed, 1, epoch, step)
        return loss(self.network, region, labels, x, generator=draws)

    def _fault(self, terms: LossTerms) -> str | None:
        """What is not finite: a part of the loss, or the gradient of a parameter."""
        if not bool(terms.total.isfinite()):
            parts = {"natural": terms.natural, "robust": terms.robust, "penalty": terms.penalty}
            broken = [name for name, part in parts.items() if part is not None and not bool(part.isfinite())]
            return f"the loss is {terms.total.item()} (its part: {', '.join(broken) or 'total'})"
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        # One number first: a loop over the parameters would wait for the device at each.
        if bool(torch.stack([g.abs().amax() for g in gradients]).isfinite().all()):
            return None
        names = [n for n, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        return f"the gradient of {', '.join(names)} is not finite"

    def _failure(
        self, fault: str, epoch: int, step: int, eps: float, x: Tensor, labels: Tensor, kept: RunFolder | None
    ) -> TrainingError:
        loss = record(self.training.loss_at(epoch + step / self.steps))
        relaxation = loss.get("relaxation", "none")
        facts = {"epoch": epoch + 1, "step": step + 1, "eps": eps, "loss": loss, "fault": fault}
        where = f"epoch {epoch + 1}, batch {step + 1} of {self.steps} (relaxation {relaxation}, eps {eps:g})"
        stored = "pass a folder to keep the batch"
        if kept is not None:
            stored = f"the batch is in {kept.save_failure(self.network, {'images': x, 'labels': labels}, facts)}"
        return TrainingError(f"train: {fault} at {where}; {stored}", epoch + 1, step + 1)
