"""TensorBoard's event files: the metrics of a run, one point an epoch."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from optrelax.training.meters import EpochMetrics

__all__ = ["event_file", "require_tensorboard"]


def require_tensorboard() -> None:
    """RuntimeError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise RuntimeError("train: tensorboard is not installed; pip install 'optrelax[tensorboard]'")


@contextlib.contextmanager
def event_file(folder: Path, history: Sequence[EpochMetrics]) -> Iterator[Callable[[EpochMetrics], None]]:
    """A function that adds an epoch's metrics to the one event file in `folder`, which begins with `history`.

    An event file of the same run, before it was interrupted, may hold epochs that come again: it gives way to one
    that holds what the run's metrics do.
    """
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:

        def add(metrics: EpochMetrics) -> None:
            line = asdict(metrics)
            epoch = line.pop("epoch")
            for name, value in line.items():
                if value is not None:
                    writer.add_scalar(name, value, epoch)
            writer.flush()

        for metrics in history:
            add(metrics)
        yield add
