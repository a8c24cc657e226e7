"""The checkpoints of a series: which files, of which epochs, and the networks in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from optrelax.analysis import Net
from optrelax.networks import checkpoints as files
from optrelax.networks.capturing import capture
from optrelax.networks.checkpoint_files import read_network
from optrelax.networks.graph import Network
from optrelax.training.runs import RunFolder

__all__ = ["PathLike", "series_networks", "series_paths"]

PathLike = str | os.PathLike[str]


def series_paths(checkpoints: PathLike | Sequence[PathLike]) -> dict[int, Path]:
    """Files by epoch: those that one run folder keeps, and its last network; or several files and run folders.

    Where a file does not say its epoch, or two say the same, all are numbered from 1 in the order given.
    Raises ValueError for a run folder that keeps none, FileNotFoundError.
    """
    if isinstance(checkpoints, (str, os.PathLike)):
        checkpoints = [checkpoints]
    paths = [Path(path) for path in checkpoints]
    if not paths:
        raise ValueError("measure_series: give at least one checkpoint")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; expected a checkpoint, or a run folder that keeps some")
    if len(paths) == 1 and paths[0].is_dir():
        return _of_run(paths[0])
    epochs = [_epoch(path) for path in paths]
    known = [epoch for epoch in epochs if epoch is not None]
    if len(set(known)) == len(paths):
        return dict(sorted(zip(known, paths, strict=True)))
    return dict(enumerate(paths, 1))


def _of_run(folder: Path) -> dict[int, Path]:
    run = RunFolder(folder)
    kept = run.kept_networks()
    if not kept:
        raise ValueError(
            f"{folder}: keeps no network of single epochs; train with --keep-every EPOCHS, or name several checkpoints"
        )
    last = run.stored_epochs()
    return kept if last is None or last in kept else dict(sorted({**kept, last: run.net}.items()))


def _epoch(path: Path) -> int | None:
    """The finished epochs that a file states; None where it states none."""
    if not path.is_dir() and path.suffix != ".safetensors":
        return None
    try:
        return files.read_epochs(path)
    except ValueError:  # plain weights, or damaged: reading the network says which
        return None


def series_networks(
    checkpoints: PathLike | Sequence[PathLike] | Mapping[int, Net],
    input_shape: tuple[int, ...],
    *,
    model: str | None = None,
    classes: int = 10,
    device: torch.device | str = "cpu",
) -> dict[int, Network]:
    """Captured networks by epoch, ascending; those of a mapping as they are.

    model, classes, device: as for `read_network`.  Errors as `series_paths`, `read_network` and `capture`.
    """
    if isinstance(checkpoints, Mapping):
        if not checkpoints:
            raise ValueError("measure_series: give at least one checkpoint")
        return {epoch: capture(net, input_shape) for epoch, net in sorted(checkpoints.items())}
    options = {"model": model, "input_shape": input_shape, "classes": classes, "device": device}
    return {
        epoch: capture(read_network(path, **options), input_shape)  # type: ignore[arg-type]
        for epoch, path in series_paths(checkpoints).items()
    }
