"""Training by any loss, reproducible from a seed: to the bit on one machine's CPU with as many threads, through
interruptions too.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optrelax.faults import gradient_fault, loss_fault, origin, relaxations_of
from optrelax.graph import Network
from optrelax.journals import tensor_digest
from optrelax.losses import LossTerms
from optrelax.meters import EpochMetrics, Meter, Progress
from optrelax.processes import Processes
from optrelax.regions import LinfBall
from optrelax.relaxations import name_of
from optrelax.runs import RunFolder, record
from optrelax.samples import gather
from optrelax.tracing import capture
from optrelax.training_settings import Training

__all__ = ["EpochMetrics", "Progress", "Training", "TrainingError", "TrainingResult", "train"]

_log = logging.getLogger(__name__)


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
    Where torch.distributed is initialised, its processes share every batch; the first one writes the folder.
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
    facts = dict(facts or {})
    kept = None if folder is None else RunFolder(Path(folder))
    done = 0
    if kept is not None:
        seen = {"examples": list(images.shape), "digest": tensor_digest(images, labels)}
        if run.processes.rank == 0:
            kept.open({"training": record(training), **seen, **facts}, resume)
        run.processes.wait()
        done = run.restore(kept, facts) if resume else 0
    run.processes.agree([*network.module.parameters(), *network.module.buffers()])
    history = [] if kept is None else [EpochMetrics(**line) for line in kept.metrics(done)]
    for epoch in range(done, training.epochs):
        metrics = run.epoch(epoch, kept, watch)
        history.append(metrics)
        _log.info("epoch %d of %d: %s", epoch + 1, training.epochs, metrics)
        if kept is not None and run.processes.rank == 0:
            kept.append(asdict(metrics))
            kept.save(network, run.optimizer, epoch + 1, facts, run.memory_tensors())
        run.processes.wait()
    return TrainingResult(network, tuple(history))


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone: any step can be drawn again without the steps before it."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class _Run:
    """The loop: one network, its optimiser, the data and the settings."""

    def __init__(self, network: Network, images: Tensor, labels: Tensor, training: Training) -> None:
        self.network, self.images, self.labels, self.training = network, images, labels, training
        self.parameters = {name: p for name, p in network.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("train: the network has no trainable parameters")
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=training.lr(0.0))
        self.steps = math.ceil(len(images) / training.batch)
        self.processes = Processes.current()
        if training.pieces % self.processes.count:
            raise ValueError(
                f"train: pieces must be a multiple of the {self.processes.count} processes, which share them, got "
                f"{training.pieces}"
            )
        self.memory: Any = None

    def restore(self, kept: RunFolder, facts: Mapping[str, Any]) -> int:
        """Take up the stored state; the number of finished epochs."""
        first = self.processes.rank == 0
        done, memory = kept.restore(self.network.module, self.optimizer, repair=first)
        if memory:
            for loss in self.training.losses:
                self._remember(loss)
            if self.memory is not None:
                self.memory.load_state_dict(memory)
        if done and first and kept.stored_epochs() != done:
            # Interrupted between the state and the network.
            kept.save_network(self.network, done, facts)
        self.processes.wait()
        return done

    def memory_tensors(self) -> dict[str, Tensor]:
        """What the loss keeps from step to step, as tensors by name."""
        return {} if self.memory is None else self.memory.state_dict()

    def _remember(self, loss: Any) -> bool:
        """Whether a loss keeps a memory, which is then there.

        Examples change places between processes: several keep none.
        """
        make = getattr(loss, "memory", None)
        made = None if make is None or self.processes.count > 1 else make(len(self.images))
        if made is None:
            return False
        self.memory = made if self.memory is None else self.memory
        return True

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """The images of each step, by their places in the data set, in this epoch's order."""
        order = torch.randperm(len(self.images), generator=_generator(self.training.seed, 0, epoch))
        return iter(order.split(self.training.batch))

    def epoch(self, epoch: int, kept: RunFolder | None, watch: Callable[[Progress], None] | None) -> EpochMetrics:
        meter, training = Meter(), self.training
        eps = lr = 0.0
        for step, index in enumerate(self.batches(epoch)):
            position = epoch + step / self.steps
            eps, lr = training.eps(position), training.lr(position)
            self.optimizer.zero_grad(set_to_none=True)
            self._gradients(index, eps, epoch, step, meter, kept)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if watch is not None:
                watch(meter.progress(epoch, training.epochs, step, self.steps, eps))
        if self.processes.count > 1:
            total = meter.tensor().to(next(iter(self.parameters.values())).device)
            self.processes.add_up([total])
            meter.load(total.cpu())
        return meter.metrics(epoch, eps, lr)

    def _gradients(
        self, index: Tensor, eps: float, epoch: int, step: int, meter: Meter, kept: RunFolder | None
    ) -> None:
        """Leave the batch's gradient in the parameters: piece by piece, over all processes.

        Raises TrainingError where it is not finite, on every process.
        """
        like = next(iter(self.parameters.values()))
        fault: str | None = None
        broken = (self.images[index[:1]].to(like), self.labels[index[:1]].to(like.device))
        for place, piece in self.processes.mine(index.tensor_split(self.training.pieces)):
            if not len(piece):
                continue
            x, labels = self.images[piece].to(like), self.labels[piece].to(like.device)
            terms = self.terms(x, labels, eps, epoch, step, place, piece)
            (terms.total * (len(piece) / len(index))).backward()
            if fault is None:
                broken, fault = (x, labels), loss_fault(terms)
                fault = fault or gradient_fault(self.parameters)
            meter.add(terms, labels)
        if self.processes.count > 1 and self._add_up(fault is not None) and fault is None:
            # Its batch is with the process that saw it break.
            fault, kept = "the loss or gradient of another process is not finite", None
        if fault is not None:
            raise self._failure(fault, epoch, step, eps, *broken, kept)

    def _add_up(self, fault: bool) -> bool:
        """Sum the gradients over the processes; whether any of them has a fault."""
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flag = gradients[0].new_full((1,), float(fault))
        self.processes.add_up([*gradients, flag])
        return bool(flag > 0)

    def terms(
        self, x: Tensor, labels: Tensor, eps: float, epoch: int, step: int, place: int, index: Tensor
    ) -> LossTerms:
        """The loss of one piece at its place in training."""
        loss = self.training.loss_at(epoch + step / self.steps)
        region = LinfBall(x, eps, self.training.clip)
        draws = _generator(self.training.seed, 1, epoch, step, *((place,) if place else ()))
        known = {"memory": self.memory, "index": index} if self._remember(loss) else {}
        terms: LossTerms = loss(self.network, region, labels, x, generator=draws, **known)
        return terms

    def _failure(
        self, fault: str, epoch: int, step: int, eps: float, x: Tensor, labels: Tensor, kept: RunFolder | None
    ) -> TrainingError:
        loss = self.training.loss_at(epoch + step / self.steps)
        first = origin(self.network, LinfBall(x, eps, self.training.clip), x, loss)
        relaxation = ", ".join(name_of(r) for r in relaxations_of(loss)) or "none"
        facts = {"epoch": epoch + 1, "step": step + 1, "eps": eps, "loss": record(loss), "fault": fault, "first": first}
        where = f"epoch {epoch + 1}, batch {step + 1} of {self.steps} (relaxation {relaxation}, eps {eps:g})"
        stored = "pass a folder to keep the batch"
        if kept is not None:
            stored = f"the batch is in {kept.save_failure(self.network, {'images': x, 'labels': labels}, facts)}"
        return TrainingError(f"train: {fault}{', ' + first if first else ''} at {where}; {stored}", epoch + 1, step + 1)
