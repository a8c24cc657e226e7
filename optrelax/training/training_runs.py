"""The loop of training: one network, its optimiser, the data, the settings, and where it is kept."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from optrelax.errors import UnsupportedOpError
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import name_of
from optrelax.training.augmentation import augmented
from optrelax.training.faults import gradient_fault, loss_fault, origin, relaxations_of
from optrelax.training.loss_terms import LossTerms
from optrelax.training.meters import EpochMetrics, Meter, TrainingProgress
from optrelax.training.optimisation import WeightAverage, optimizer
from optrelax.training.processes import Processes
from optrelax.training.recording import record
from optrelax.training.runs import RunFolder, State
from optrelax.training.settings import Training
from optrelax.training.statistics import clean_pass
from optrelax.training.wrapped_losses import LossMemory, memory_of

__all__ = ["TrainingError", "TrainingRun"]

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A loss or gradient that is not finite, or a loss that raised (the cause): where, and where the batch is kept."""

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch, self.step = epoch, step


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone: any step can be drawn again without the steps before it."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class TrainingRun:
    """The loop: one network, its optimiser, the data, the settings, and where it is kept."""

    def __init__(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        training: Training,
        kept: RunFolder | None,
        checkpoint_every: float,
        keep_every: int | None = None,
    ) -> None:
        self.network, self.images, self.labels, self.training = network, images, labels, training
        self.kept, self.interval, self.stored = kept, 60 * checkpoint_every, time.monotonic()
        self.keep_every = keep_every
        self.parameters = {name: p for name, p in network.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("train: the network has no trainable parameters")
        self.optimizer = optimizer(
            training.optimizer, self.parameters.values(), training.lr(0.0), training.weight_decay
        )
        self.average = WeightAverage(network.module, training.average) if training.average > 0 else None
        self.steps = math.ceil(len(images) / training.batch)
        self.processes = Processes.current()
        if training.pieces % self.processes.count:
            raise ValueError(
                f"train: pieces must be a multiple of the {self.processes.count} processes, which share them, got "
                f"{training.pieces}"
            )
        self.memory: LossMemory | None = None
        self.batch = network
        """The network of the step: with the statistics of its batch, where batch norms take them."""

    def restore(self, facts: Mapping[str, object]) -> State:
        """Take up the stored state."""
        assert self.kept is not None
        first = self.processes.rank == 0
        state = self.kept.restore(self.network.module, self.optimizer, repair=first)
        if self.average is not None and (state.epochs or state.steps):
            self.average.load(state.average)
        if state.memory:
            for loss in self.training.losses:
                self._remember(loss)
            if self.memory is not None:
                self.memory.load_state_dict(state.memory)
        if state.epochs and not state.steps and first and self.kept.stored_epochs() != state.epochs:
            # Interrupted between the state and the network.
            self._keep(state.epochs, facts)
        self.processes.wait()
        return state

    def store(self, epochs: int, steps: int = 0, seconds: float = 0.0, sums: Tensor | None = None) -> None:
        """Store the state after so many finished epochs and steps of the next."""
        assert self.kept is not None
        memory = {} if self.memory is None else self.memory.state_dict()
        average = {} if self.average is None else self.average.values
        state = State(epochs, steps, seconds, sums, memory, average)
        self.kept.save_state(self.network.module, self.optimizer, state)
        self.stored = time.monotonic()

    def _keep(self, epochs: int, facts: Mapping[str, object], for_good: bool = False) -> None:
        """Store the network as it is evaluated after so many epochs: with the average of the weights, if any."""
        assert self.kept is not None
        within = contextlib.nullcontext() if self.average is None else self.average.installed(self.network.module)
        keep = self.kept.keep_network if for_good else self.kept.save_network
        with within:
            keep(self.evaluated(), epochs, facts)

    def evaluated(self) -> Network:
        """The network as evaluation takes it: batch norms by their running statistics."""
        return self.network.at_population() if self.network.graph.in_training else self.network

    def _total(self, meter: Meter) -> Tensor:
        """The sums of a meter over all processes."""
        if self.processes.count == 1:
            return meter.tensor()
        total = meter.tensor().to(next(iter(self.parameters.values())).device)
        self.processes.add_up([total])
        return total.cpu()

    def _remember(self, loss: object) -> bool:
        """Whether a loss keeps a memory, which is then there.

        Examples change places between processes: several keep none.
        """
        made = memory_of(loss, len(self.images)) if self.processes.count == 1 else None
        if made is None:
            return False
        self.memory = made if self.memory is None else self.memory
        return True

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """The images of each step, by their places in the data set, in this epoch's order."""
        order = torch.randperm(len(self.images), generator=_generator(self.training.seed, 0, epoch), device="cpu")
        return iter(order.split(self.training.batch))

    def epochs(
        self, state: State, facts: Mapping[str, object], watch: Callable[[TrainingProgress], None] | None
    ) -> Iterator[EpochMetrics]:
        """The epochs from a state on, each stored before its metrics come out."""
        for epoch in range(state.epochs, self.training.epochs):
            metrics = self.epoch(epoch, state if epoch == state.epochs else State(epoch), watch)
            _log.info("epoch %d of %d: %s", epoch + 1, self.training.epochs, metrics)
            if self.kept is not None and self.processes.rank == 0:
                # Before the state: a run killed in between takes the epoch, and writes the same file, again.
                if self.keep_every is not None and (epoch + 1) % self.keep_every == 0:
                    self._keep(epoch + 1, facts, for_good=True)
                self.kept.append(asdict(metrics))
                self.store(epoch + 1)
                self._keep(epoch + 1, facts)
            self.processes.wait()
            yield metrics
        if self.average is not None:
            self.average.install(self.network.module)

    def epoch(self, epoch: int, state: State, watch: Callable[[TrainingProgress], None] | None) -> EpochMetrics:
        """The epoch's steps, those that `state` has behind it left out."""
        meter, training = Meter(), self.training
        eps = lr = 0.0
        if state.sums is not None and self.processes.rank == 0:
            meter.load(state.sums, state.seconds)
        for step, index in enumerate(self.batches(epoch)):
            if step < state.steps:
                continue
            position = epoch + step / self.steps
            eps, lr = training.eps(position), training.lr(position)
            self.optimizer.zero_grad(set_to_none=True)
            due = self._gradients(index, eps, epoch, step, meter)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if training.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), training.clip_norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.network.module, epoch * self.steps + step)
            # What the epoch's last step leaves is stored with its metrics.
            if due and step + 1 < self.steps:
                total = self._total(meter)
                if self.processes.rank == 0:
                    self.store(epoch, step + 1, meter.seconds, total)
            if watch is not None:
                watch(meter.progress(epoch, training.epochs, step, self.steps, eps))
        if self.processes.count > 1:
            meter.load(self._total(meter))
        return meter.metrics(epoch, eps, lr)

    def _images(self, index: Tensor, epoch: int, step: int) -> Tensor:
        """The images of a step, all of them on every process, changed as `augment` says."""
        images, augment = self.images[index], self.training.augment
        return images if augment is None else augmented(augment, images, _generator(self.training.seed, 2, epoch, step))

    def _gradients(self, index: Tensor, eps: float, epoch: int, step: int, meter: Meter) -> bool:
        """Leave the batch's gradient in the parameters: piece by piece, over all processes.

        Returns whether the state is to be stored after this step: the first process says so, and all hear it.
        Raises TrainingError where the loss raises or the gradient is not finite, on every process.
        """
        kept, due = self.kept, self.kept is not None and time.monotonic() - self.stored >= self.interval
        like = next(iter(self.parameters.values()))
        fault: str | None = None
        broken = (self.images[index[:1]].to(like), self.labels[index[:1]].to(like.device), index[:1])
        images = self._images(index, epoch, step)
        self.batch, statistics = clean_pass(self.network, images, self.training.statistics)
        pieces = [part.tensor_split(self.training.pieces) for part in (index, images)]
        for place, (piece, x) in self.processes.mine(tuple(zip(*pieces, strict=True))):
            if not len(piece):
                continue
            x, labels = x.to(like), self.labels[piece].to(like.device)
            region = self.training.region(x, eps)
            try:
                terms = self.terms(region, x, labels, epoch, step, place, piece)
                (terms.total * (len(piece) / len(index))).backward()
            except UnsupportedOpError:
                raise
            except Exception as error:
                if self.processes.count > 1:
                    # The others wait for this step's sum.
                    self._add_up(False, True)
                fault = f"the loss raised {type(error).__name__}: {error}"
                raise self._failure(fault, epoch, step, eps, (x, labels, piece), kept, bounded=False) from error
            if fault is None:
                broken, fault = (x, labels, piece), loss_fault(terms)
                fault = fault or gradient_fault(self.parameters)
            meter.add(terms, labels)
        if fault is None and statistics.leaves:
            statistics.backward()
            fault = gradient_fault(self.parameters)
        if self.processes.count > 1:
            due, broke = self._add_up(due and self.processes.rank == 0, fault is not None)
            if broke and fault is None:
                # Its batch is with the process that saw it break.
                fault, kept = "the loss of another process raised, or it or its gradient is not finite", None
        if fault is not None:
            raise self._failure(fault, epoch, step, eps, broken, kept)
        return due

    def _add_up(self, *flags: bool) -> list[bool]:
        """Sum the gradients over the processes; whether each of the flags is up on any of them."""
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        sums = gradients[0].new_tensor([float(flag) for flag in flags])
        self.processes.add_up([*gradients, sums])
        return [bool(value > 0) for value in sums]

    def terms(
        self, region: Region, x: Tensor, labels: Tensor, epoch: int, step: int, place: int, index: Tensor
    ) -> LossTerms:
        """The loss of one piece at its place in training."""
        loss = self.training.loss_at(epoch + step / self.steps)
        draws = _generator(self.training.seed, 1, epoch, step, *((place,) if place else ()))
        known = {"memory": self.memory, "index": index} if self._remember(loss) else {}
        terms: LossTerms = loss(self.batch, region, labels, x, generator=draws, **known)
        return terms

    def _failure(
        self,
        fault: str,
        epoch: int,
        step: int,
        eps: float,
        batch: tuple[Tensor, ...],
        kept: RunFolder | None,
        bounded: bool = True,
    ) -> TrainingError:
        """The error, the batch stored; bounded: look for what broke first in the bounds too, which may raise again."""
        x, labels, index = batch
        loss = self.training.loss_at(epoch + step / self.steps)
        first = origin(self.batch, self.training.region(x, eps), x, loss if bounded else None)
        relaxation = ", ".join(name_of(r) for r in relaxations_of(loss)) or "none"
        facts = {"epoch": epoch + 1, "step": step + 1, "eps": eps, "loss": record(loss), "fault": fault, "first": first}
        where = f"epoch {epoch + 1}, batch {step + 1} of {self.steps} (relaxation {relaxation}, eps {eps:g})"
        stored = "pass a folder to keep the batch"
        if kept is not None:
            held = {"images": x, "labels": labels, "index": index}
            stored = f"the batch is in {kept.save_failure(self.evaluated(), held, facts)}"
        return TrainingError(f"train: {fault}{', ' + first if first else ''} at {where}; {stored}", epoch + 1, step + 1)
