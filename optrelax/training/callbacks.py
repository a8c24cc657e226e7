"""Who is told while a run trains: the one door for loggers, early looks at the network, and whatever else.

TensorBoard comes with it; Weights & Biases, Lightning's loggers and all others whose method takes a dictionary and a
step are a `Logged` each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optrelax.training.meters import EpochMetrics

if TYPE_CHECKING:
    from optrelax.networks.graph import Network

__all__ = ["Callback", "Logged", "TensorBoard"]


class Callback:
    """Override what is wanted; `optrelax.training.train(..., callbacks=[...])` calls it on the first process.

    What a callback does to the network's weights is part of no stored state: let it look only.

    Example:
        >>> from optrelax.training import Callback
        >>> class Certified(Callback):
        ...     def on_epoch(self, metrics, network):
        ...         test = ox.load_dataset("digits").subset(50)
        ...         print(metrics.epoch, ox.certify(network, test, eps=0.02, attack=None).certified)
    """

    def on_start(self, history: Sequence[EpochMetrics]) -> None:
        """Before the first step; history: the epochs that a resumed run has behind it."""

    def on_epoch(self, metrics: EpochMetrics, network: Network) -> None:
        """After an epoch, its state stored."""

    def on_end(self) -> None:
        """After the last epoch, an error or Ctrl-C: to close what is open."""


class Logged(Callback):
    """Every epoch's metrics to a logger.

    write: takes the numbers by name and the epoch, such as `wandb.init(...).log`, or `log_metrics` of any logger of
    Lightning. Epochs that an interrupted run has told already do not come again.

    Example:
        >>> from optrelax.training import Logged
        >>> callback = Logged(lambda numbers, epoch: print(epoch, sorted(numbers)[:2]))
    """

    def __init__(self, write: Callable[[dict[str, float], int], object]) -> None:
        self.write = write

    def on_epoch(self, metrics: EpochMetrics, network: Network) -> None:
        """The numbers of one epoch, those that it has."""
        self.write(_numbers(metrics), metrics.epoch)


class TensorBoard(Callback):
    """TensorBoard's event file in a folder, one point an epoch.

    An event file of the same run, before it was interrupted, may hold epochs that come again: it gives way to one
    that holds what the run's metrics do.  RuntimeError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise RuntimeError("train: tensorboard is not installed; pip install 'optrelax[tensorboard]'")
        self.folder = folder
        self.writer: Any = None

    def on_start(self, history: Sequence[EpochMetrics]) -> None:
        """A new file with the epochs so far."""
        from torch.utils.tensorboard import SummaryWriter

        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(self.folder))
        for metrics in history:
            self._add(metrics)

    def on_epoch(self, metrics: EpochMetrics, network: Network) -> None:
        """One point a number."""
        self._add(metrics)

    def on_end(self) -> None:
        """Close the file."""
        self.writer.close()

    def _add(self, metrics: EpochMetrics) -> None:
        for name, value in _numbers(metrics).items():
            self.writer.add_scalar(name, value, metrics.epoch)
        self.writer.flush()


def _numbers(metrics: EpochMetrics) -> dict[str, float]:
    return {name: value for name, value in asdict(metrics).items() if name != "epoch" and value is not None}
