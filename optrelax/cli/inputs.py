"""What options name: networks, data, devices and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from optrelax.networks.graph import Network

__all__ = ["Inputs", "legal_range", "parse_number", "read_data", "read_device", "read_dtype", "read_inputs", "size_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A network, and the examples to use it on."""

    network: nn.Module | Network
    x: Tensor
    labels: Tensor
    classes: int
    name: str


def read_inputs(
    checkpoint: Path, data: str, data_dir: Path | None, *, model: str | None, device: str, split: str = "test"
) -> Inputs:
    """The network and the data that the options name.  ValueError and FileNotFoundError say which is wrong."""
    from optrelax.networks.checkpoint_files import read_network

    where = read_device(device)
    x, labels, classes = read_data(data, data_dir, split)
    shape = tuple(x.shape[1:])
    network = read_network(checkpoint, model=model, input_shape=shape, classes=classes, device=where)
    return Inputs(network, x, labels, classes, data)


def read_data(data: str, data_dir: Path | None, split: str = "test") -> tuple[Tensor, Tensor, int]:
    """The examples that the options name, their labels, and how many classes there are.  Errors as `read_inputs`."""
    return _own_data(Path(data)) if data.endswith(".npz") else _named_data(data, data_dir, split)


def _named_data(name: str, data_dir: Path | None, split: str) -> tuple[Tensor, Tensor, int]:
    from optrelax.data.datasets import load_dataset

    found = load_dataset(name, data_dir, split)  # type: ignore[arg-type]
    return found.images, found.labels, found.classes


def _own_data(path: Path) -> tuple[Tensor, Tensor, int]:
    """A user's npz."""
    import numpy as np
    import torch

    from optrelax.networks.checkpoint_files import read_arrays

    arrays = read_arrays(path)
    x = next((arrays[name] for name in ("x", "X", "images") if name in arrays), None)
    labels = next((arrays[name] for name in ("labels", "y") if name in arrays), None)
    if x is None or labels is None:
        raise ValueError(f"{path}: expected arrays x (or X, images) and labels (or y), got {sorted(arrays)}")
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    if x.dtype not in (np.float32, np.float64):
        how = "whole numbers from 0 to 255 as x.astype(numpy.uint8), others as x.astype(float)"
        raise ValueError(f"{path}: x must be float32, float64 or bytes (uint8), got {x.dtype}; {how}")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{path}: x must be [n, *input_shape] with n >= 1, got {list(x.shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != x.shape[:1]:
        got = f"got {labels.dtype} {list(labels.shape)}{_mended(labels, len(x))}"
        raise ValueError(f"{path}: labels must be {len(x)} integers, {got}")
    if int(labels.min()) < 0:
        raise ValueError(f"{path}: labels must count classes from 0, got {int(labels.min())}")
    wrong = np.argwhere(~np.isfinite(x))
    if len(wrong):
        raise ValueError(
            f"{path}: x has {len(wrong)} NaN or infinite of {x.size} entries (first at {wrong[0].tolist()})"
        )
    return torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1


def _mended(labels: Any, count: int) -> str:
    """What makes integers of such labels, as the end of an error message."""
    if labels.shape == (count, 1):
        return "; store labels.ravel()"
    if labels.ndim == 2 and len(labels) == count:
        return "; one-hot ones as labels.argmax(1)"
    if labels.shape != (count,):
        return ""
    return (
        "; names as numpy.unique(labels, return_inverse=True)[1]"
        if labels.dtype.kind in "US"
        else ("; store labels.astype(int)")
    )


def size_of(shape: Sequence[int]) -> str:
    """What an example is made of: `12 features`, `1x8x8 pixels`."""
    return f"{'x'.join(map(str, shape))} {_entries(shape)}"


def legal_range(shape: Sequence[int], clip: Sequence[float] | None) -> str:
    """`pixels in [0, 1]`, of examples of a shape."""
    return f"{_entries(shape)} in [{clip[0]:g}, {clip[1]:g}]" if clip else f"{_entries(shape)} unlimited"


def _entries(shape: Sequence[int]) -> str:
    return {1: "features", 3: "pixels"}.get(len(shape), "entries")


def read_device(name: str) -> torch.device:
    """A torch device that is there.  ValueError otherwise."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def read_dtype(precision: str) -> torch.dtype:
    """The type of the bounds."""
    import torch

    return torch.float64 if precision == "float64" else torch.float32


def parse_number(option: str, text: str) -> float:
    """A number, or a ratio such as 8/255.  ValueError otherwise."""
    top, slash, bottom = text.partition("/")
    try:
        value: Any = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{option} must be a number or a ratio such as 8/255, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{option} must be finite, got {text!r}")
    return float(value)
