"""Training by any loss, reproducible from a seed: to the bit on one machine's CPU with as many threads, through
interruptions too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from optrelax.certification.journals import tensor_digest
from optrelax.checks import require_range
from optrelax.data.samples import gather
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.training.callbacks import Callback, TensorBoard
from optrelax.training.meters import EpochMetrics, TrainingProgress
from optrelax.training.outlook import outlook
from optrelax.training.recording import record
from optrelax.training.runs import RunFolder, State
from optrelax.training.settings import Training
from optrelax.training.training_runs import TrainingRun

__all__ = ["EpochMetrics", "Training", "TrainingProgress", "TrainingResult", "train"]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The trained network (the one given, in place) and the metrics of every epoch, resumed ones included."""

    network: Network
    history: tuple[EpochMetrics, ...]


def train(
    net: nn.Module | Network,
    data: object,
    training: Training,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: float = 5.0,
    keep_every: int | None = None,
    tensorboard: bool = False,
    callbacks: Sequence[Callback] = (),
    watch: Callable[[TrainingProgress], None] | None = None,
    before: Callable[[TrainingProgress], None] | None = None,
    facts: Mapping[str, object] | None = None,
) -> TrainingResult:
    """Train a network in place.

    data: a pair (images [n, *input_shape], labels [n]), a Dataset of such, or a DataLoader (read once, into memory;
    let it not shuffle, the order of each epoch is drawn here).
    folder: where the run is kept, see `optrelax.training.runs`; None keeps nothing.  resume: continue the run in
    `folder` after the last step that it stored (from the start where there is none), on a CPU with as many threads to
    the same weights bit for bit.
    checkpoint_every: minutes after which the state is stored within an epoch too; 0 after every step, inf never.
    keep_every: epochs after each of which the network is kept too, as `folder`/epoch-0005.safetensors; no part of what
    decides the weights, so a run may resume with another one.
    tensorboard: write every epoch's metrics to `folder`/tensorboard as well; RuntimeError where it is not installed.
    callbacks: told of the start, of every epoch and of the end, see `Callback`.
    watch: called after every step, the state stored.  before: called once before the first one, with the seconds that
    the steps left are expected to take (`expected`), by a few examples at the run's last settings.
    facts: JSON-ready facts for the configuration and the network.
    Where torch.distributed is initialised, its processes share every batch; the first one writes the folder.
    Raises TrainingError where a loss raises or it or a gradient is NaN or infinite (the batch and the weights are
    stored in `folder`), ValueError for a run in `folder` that is not to be resumed, that differs, or that
    another process trains, UnsupportedOpError for a network that cannot be bounded.
    """
    _require(folder, checkpoint_every, keep_every, {"resume": resume, "tensorboard": tensorboard})
    if tensorboard and folder is not None:
        callbacks = [*callbacks, TensorBoard(RunFolder(Path(folder)).events)]
    samples = gather(data)
    images, labels = samples.x, samples.labels
    network = capture(net, images.shape[1:])
    if not network.graph.in_training:
        network.require_eval()
    kept = None if folder is None else RunFolder(Path(folder))
    run = TrainingRun(network, images, labels, training, kept, checkpoint_every, keep_every)
    facts, state = dict(facts or {}), State()
    with contextlib.ExitStack() as stack:
        if kept is not None:
            seen = {"examples": list(images.shape), "digest": tensor_digest(images, labels)}
            if run.processes.rank == 0:
                stack.enter_context(kept.lock())
                kept.open({"training": record(training), **seen, **facts}, resume)
            run.processes.wait()
            state = run.restore(facts) if resume else state
        run.processes.agree([*network.module.parameters(), *network.module.buffers()])
        history = [] if kept is None else [EpochMetrics(**line) for line in kept.metrics(state.epochs)]
        told = callbacks if run.processes.rank == 0 else ()
        for callback in told:
            callback.on_start(history)
            stack.callback(callback.on_end)
        if before is not None and state.epochs < training.epochs:
            before(outlook(run, state))
        for metrics in run.epochs(state, facts, watch):
            history.append(metrics)
            for callback in told:
                callback.on_epoch(metrics, network)
    return TrainingResult(network, tuple(history))


def _require(folder: object, checkpoint_every: float, keep_every: int | None, wanted: Mapping[str, bool]) -> None:
    """ValueError for what needs a folder without one, and for numbers out of range."""
    for name, given in {**wanted, "keep_every": keep_every is not None}.items():
        if given and folder is None:
            raise ValueError(f"train: {name} needs the folder of the run")
    require_range("train", "at least 1 epoch", optional=True, keep_every=keep_every)
    require_range("train", ">= 0 minutes", checkpoint_every=checkpoint_every)
