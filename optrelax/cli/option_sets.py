"""Sets of options, as parameters of commands: what they ask for together is read, checked and named in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

from optrelax.cli.application import print_json, say, show_table
from optrelax.cli.inputs import Inputs, parse_number, read_data, read_dtype, read_inputs
from optrelax.cli.options import (
    BatchSize,
    Checkpoint,
    Data,
    DataDir,
    Device,
    Format,
    Json,
    Model,
    Out,
    Precision,
    option,
)

if TYPE_CHECKING:
    import polars as pl
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from optrelax.layers.milp import Milp
    from optrelax.networks.graph import Network

__all__ = [
    "AttackOptions",
    "BoundOptions",
    "DataOptions",
    "MilpOptions",
    "NetworkOptions",
    "OutputOptions",
    "RadiusOptions",
    "RegionOptions",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Examples."""

    data: Data
    data_dir: DataDir = None
    split: Annotated[
        Literal["test", "train"], option("--split", group="Data", metavar="PART", help="test or train.")
    ] = "test"

    def examples(self) -> tuple[Tensor, Tensor, int]:
        """Their inputs, their labels, and how many classes there are.  Errors as `read_data`."""
        return read_data(self.data, self.data_dir, self.split)

    @property
    def facts(self) -> dict[str, object]:
        """What a summary says of them."""
        return {"data": self.data, "split": self.split}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions(DataOptions):
    """A network and the data to use it on."""

    checkpoint: Checkpoint
    model: Model = None
    device: Device = "cpu"

    def read(self) -> Inputs:
        """The network and the examples.  Errors as `read_inputs`."""
        return read_inputs(
            self.checkpoint, self.data, self.data_dir, model=self.model, device=self.device, split=self.split
        )

    def network(self, other: Path, inputs: Inputs) -> nn.Module | Network:
        """Another checkpoint, of the same kind and for the same examples.  Errors as `read_network`."""
        from optrelax.networks.checkpoint_files import read_network

        shape = tuple(inputs.x.shape[1:])
        return read_network(other, model=self.model, input_shape=shape, classes=inputs.classes, device=self.device)

    @property
    def facts(self) -> dict[str, object]:
        """What a summary says of them."""
        return {"checkpoint": str(self.checkpoint), "data": self.data, "split": self.split}

    @property
    def title(self) -> str:
        """Both in a figure's title."""
        return f"network {self.checkpoint.stem}, data {self.data}"


class RegionSettings(TypedDict):
    norm: str
    clip: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOptions:
    """What changes of an example are allowed, but for how far."""

    norm: Annotated[
        Literal["linf", "l2", "l1"], option("--norm", group="Region", help="Of the ball around an example.")
    ] = "linf"
    clip: Annotated[
        tuple[float, float], option("--clip", group="Region", metavar="LOW HIGH", help="Legal range of a pixel.")
    ] = (0.0, 1.0)
    no_clip: Annotated[bool, option("--no-clip", group="Region", help="Pixels may take any value.")] = False

    @property
    def settings(self) -> RegionSettings:
        """For `certify` and the measurements."""
        return {"norm": self.norm, "clip": None if self.no_clip else self.clip}


@dataclass(frozen=True, slots=True, kw_only=True)
class RadiusOptions(RegionOptions):
    """The regions around examples."""

    eps: Annotated[str, option("--eps", group="Region", metavar="X", help="Radius in units of the pixels: 0.1, 8/255.")]

    @property
    def value(self) -> float:
        """eps as a number.  ValueError where it is none."""
        return parse_number("--eps", self.eps)


class BoundSettings(TypedDict):
    dtype: torch.dtype
    batch_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundOptions:
    """In what type bounds are computed, and of how many examples together."""

    precision: Precision = "float64"
    batch_size: BatchSize = None

    @property
    def settings(self) -> BoundSettings:
        """For `certify`, `compare` and `measure_tightness`."""
        return {"dtype": read_dtype(self.precision), "batch_size": self.batch_size}


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpOptions:
    """Whether HiGHS settles exactly what bounds leave open, and for how long."""

    milp: Annotated[bool, option("--milp", group="Bound", help="Exact values too, by HiGHS; small networks.")] = False
    time_limit: Annotated[
        float, option("--time-limit", group="Bound", metavar="S", min=0.001, help="Seconds an example of HiGHS.")
    ] = 60.0

    @property
    def solver(self) -> Milp | bool:
        """False: none."""
        from optrelax.layers.milp import Milp

        return Milp(time_limit=self.time_limit) if self.milp else False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackOptions:
    """How examples are attacked."""

    attack: Annotated[
        Literal["pgd", "strong", "none"],
        option("--attack", group="Attack", metavar="NAME", help="pgd, strong (APGD and Square too) or none."),
    ] = "pgd"
    no_attack: Annotated[bool, option("--no-attack", group="Attack", help="The same as --attack none.")] = False

    @property
    def name(self) -> str:
        """The one that is meant."""
        return "none" if self.no_attack else self.attack


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Where results go, if anywhere: a folder, or JSON on standard output."""

    out: Out = None
    table_format: Format = "csv"
    json: Json = False

    def require_writable(self) -> None:
        """Check the folder before the work starts."""
        from optrelax.output.tables import require_writable

        if self.out is not None:
            require_writable(self.out)

    def write(
        self,
        frames: Mapping[str, pl.DataFrame],
        facts: Mapping[str, object],
        draw: Callable[[], Mapping[str, Figure]] | None = None,
    ) -> list[Path]:
        """Tables, summary and pictures in the folder; returns the paths of the pictures."""
        from optrelax.output.plots import write_figure
        from optrelax.output.tables import write_frame, write_json
        from optrelax.training.recording import versions

        if self.out is None:
            return []
        for name, frame in frames.items():
            write_frame(frame, self.out / f"{name}.{self.table_format}")
        write_json({**facts, "versions": versions()}, self.out / "summary.json")
        drawn = {} if draw is None else draw()
        return [path for name, figure in drawn.items() for path in write_figure(figure, self.out / f"{name}.png")]

    def show(
        self,
        facts: Mapping[str, object],
        table: pl.DataFrame,
        title: str,
        notes: list[str],
        pictures: list[Path],
        decimals: Mapping[str, int] | None = None,
    ) -> None:
        """JSON for programs; the table, what its columns mean and where the pictures lie for people."""
        if self.json:
            print_json({**facts, "pictures": [str(path) for path in pictures]})
            return
        say(title)
        show_table(table, decimals)
        say(*notes, *(f"picture: {path}" for path in pictures))
