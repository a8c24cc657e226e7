"""Options that several commands take, and what they name: networks, data, numbers, folders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from optrelax.networks.graph import Network

__all__ = [
    "Asked",
    "AttackName",
    "BatchSize",
    "Checkpoint",
    "Clip",
    "Data",
    "DataDir",
    "Device",
    "Eps",
    "Format",
    "Inputs",
    "Json",
    "Milp",
    "Model",
    "NoAttack",
    "NoClip",
    "Norm",
    "Out",
    "Pixels",
    "Precision",
    "Radius",
    "Relaxations",
    "Rounding",
    "Seed",
    "Split",
    "Subset",
    "TimeLimit",
    "option",
    "parse_number",
    "read_data",
    "read_device",
    "read_dtype",
    "read_inputs",
]


def option(*names: str, group: str, **settings: Any) -> Any:
    """An option in a group of the help."""
    return typer.Option(*names, rich_help_panel=group, **settings)


Checkpoint = Annotated[
    Path,
    typer.Argument(
        rich_help_panel="Network",
        help="Run folder, safetensors, ONNX, state_dict or npz.",
    ),
]
Model = Annotated[
    str | None,
    option("--model", group="Network", metavar="NAME", help="For a state_dict: conv, or module:function."),
]
Data = Annotated[
    str,
    option("--data", group="Data", metavar="NAME", help="Such as mnist, or FILE.npz of x, labels."),
]
DataDir = Annotated[
    Path | None,
    option("--data-dir", group="Data", metavar="DIR", envvar="OPTRELAX_DATA", help="Of the files; or OPTRELAX_DATA."),
]
Subset = Annotated[
    int | None,
    option("--subset", group="Data", metavar="N", min=1, show_default="all", help="N evenly spaced examples."),
]
Split = Annotated[Literal["test", "train"], option("--split", group="Data", metavar="PART", help="test or train.")]
Eps = Annotated[
    str,
    option("--eps", group="Region", metavar="X", help="Radius in units of the pixels: 0.1, 8/255."),
]
Norm = Annotated[Literal["linf", "l2", "l1"], option("--norm", group="Region", help="Of the ball around an example.")]
Clip = Annotated[
    tuple[float, float], option("--clip", group="Region", metavar="LOW HIGH", help="Legal range of a pixel.")
]
NoClip = Annotated[bool, option("--no-clip", group="Region", help="Pixels may take any value.")]
Relaxations = Annotated[
    list[str],
    option(
        "--relaxation",
        "--relaxations",
        group="Bound",
        metavar="NAME",
        help="`optrelax relaxations` lists them.",
    ),
]
Precision = Annotated[
    Literal["float64", "float32"],
    option("--precision", group="Bound", metavar="TYPE", help="float64 or float32."),
]
Rounding = Annotated[
    Literal["outward", "nearest"],
    option("--rounding", group="Bound", metavar="WAY", help="outward (real arithmetic) or nearest."),
]
AttackName = Annotated[
    Literal["pgd", "strong", "none"],
    option("--attack", group="Attack", metavar="NAME", help="pgd, strong (APGD and Square too) or none."),
]
NoAttack = Annotated[bool, option("--no-attack", group="Attack", help="The same as --attack none.")]
BatchSize = Annotated[
    int | None,
    option("--batch-size", group="Run", min=1, show_default="by the network", help="Examples at a time."),
]
Milp = Annotated[bool, option("--milp", group="Bound", help="Exact values too, by HiGHS; small networks.")]
TimeLimit = Annotated[
    float, option("--time-limit", group="Bound", metavar="S", min=0.001, help="Seconds an example of HiGHS.")
]
Out = Annotated[Path | None, option("--out", group="Output", metavar="DIR", help="Keep tables, summary, pictures.")]
Format = Annotated[
    Literal["csv", "json", "parquet"],
    option("--format", group="Output", metavar="KIND", help="Of DIR's tables: csv, json, parquet."),
]
Json = Annotated[bool, option("--json", group="Output", help="JSON on standard output, nothing else.")]
Seed = Annotated[int, option("--seed", group="Run", min=0, help="Of everything random.")]
Device = Annotated[str, option("--device", group="Run", metavar="NAME", help="cpu, cuda or cuda:1.")]


# --- sets of options, as parameters of commands -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A network and the data to use it on."""

    checkpoint: Checkpoint
    data: Data
    data_dir: DataDir = None
    split: Split = "test"
    model: Model = None
    seed: Seed = 0
    device: Device = "cpu"

    def read(self) -> Inputs:
        """The network and the examples.  Errors as `read_inputs`."""
        return read_inputs(
            self.checkpoint, self.data, self.data_dir, model=self.model, device=self.device, split=self.split
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a summary says of them."""
        return {"checkpoint": str(self.checkpoint), "data": self.data, "split": self.split}

    @property
    def title(self) -> str:
        """Both in a figure's title."""
        return f"network {self.checkpoint.stem}, data {self.data}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What values pixels may take."""

    clip: Clip = (0.0, 1.0)
    no_clip: NoClip = False

    @property
    def range(self) -> tuple[float, float] | None:
        """None: any."""
        return None if self.no_clip else self.clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Radius(Pixels):
    """The regions around examples."""

    eps: Eps

    @property
    def value(self) -> float:
        """eps as a number.  ValueError where it is none."""
        return parse_number("--eps", self.eps)


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
        raise ValueError(f"{path}: x must be float32, float64 or bytes (uint8), got {x.dtype}")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{path}: x must be [n, *input_shape] with n >= 1, got {list(x.shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != x.shape[:1]:
        raise ValueError(f"{path}: labels must be {len(x)} integers, got {labels.dtype} {list(labels.shape)}")
    wrong = np.argwhere(~np.isfinite(x))
    if len(wrong):
        raise ValueError(
            f"{path}: x has {len(wrong)} NaN or infinite of {x.size} entries (first at {wrong[0].tolist()})"
        )
    return torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1


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
