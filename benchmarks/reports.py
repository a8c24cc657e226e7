"""Reports: what was measured, on which machine, against which bars; printed, and stored as Markdown and JSON."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.measuring import ROOT, cores
from optrelax import __version__
from optrelax.output.files import write_whole
from optrelax.output.tables import write_json

FORMAT = "optrelax benchmark 1"
_PACKAGES = ("torch", "numpy", "scipy", "highspy", "cvxpy", "cvxpylayers", "diffcp", "scs")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run is asked for."""

    threads: int
    quick: bool = False
    device: str = "cpu"
    runs: int = 5
    seed: int = 0
    data: str = "mnist"
    data_dir: str | None = None
    cache: str = str(ROOT / "benchmarks" / "cache")
    """Folder of trained weights and optimal values, made again where they are missing."""
    auto_lirpa: str | None = None
    """A checkout of auto_LiRPA to compare with; `deep` wants one."""
    trained: str | None = None
    """A run of a CNN7 of width 16 on CIFAR-10, for `deep`."""
    out: str | None = None
    """Folder of the results, for suites that store what they have before they end."""
    processor_time: bool = False
    """`deep`, `alpha_crown` and `smooth_steps` count processor time, which other work does not lengthen."""
    minutes: float | None = None
    """No part of `gpu` begins after these."""
    networks: tuple[str, ...] = ()
    """Those that closed_forms measures, and nothing else; none given: all, growth and first use."""
    relaxations: tuple[str, ...] = ()
    """Those that closed_forms measures, box and crown among them; none given: all."""

    def __post_init__(self) -> None:
        for name in ("threads", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Options: {name} must be >= 1, got {getattr(self, name)}")
        if self.processor_time and (self.threads > 1 or self.device != "cpu"):
            raise ValueError("Options: processor_time adds up threads; it wants one, on a CPU")

    @property
    def clock(self) -> Callable[[], float]:
        """Of times."""
        return time.process_time if self.processor_time else time.perf_counter


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of figures under the same columns.

    keys: columns that say what a row is about.  smaller, greater: columns that a regression check compares, by which
    way is better; ratios and bytes, not times, so that runs on different days compare.
    """

    title: str
    keys: tuple[str, ...]
    rows: Sequence[Row]
    smaller: tuple[str, ...] = ()
    greater: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that is to be reached; `got` is None where there is none to compare."""

    what: str
    at_most: float | None
    at_least: float | None
    got: float | None

    @property
    def held(self) -> bool:
        """Whether it is reached."""
        if self.got is None:
            return False
        return not (self.at_most is not None and self.got > self.at_most) and not (
            self.at_least is not None and self.got < self.at_least
        )

    @property
    def row(self) -> Row:
        """For tables."""
        wanted = f"<= {_number(self.at_most)}" if self.at_most is not None else f">= {_number(self.at_least)}"
        return {"bar": self.what, "wanted": wanted, "got": self.got, "held": "yes" if self.held else "NO"}


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one suite."""

    suite: str
    title: str
    options: Options
    tables: Sequence[Table]
    bars: Sequence[Bar] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File name without ending: quick runs and other devices have files of their own."""
        device = "" if self.options.device == "cpu" else f"-{self.options.device.replace(':', '')}"
        return f"{self.suite}{device}{'-quick' if self.options.quick else ''}"

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        options = asdict(self.options)
        # Where files lie says nothing about the figures.
        for where in ("data_dir", "cache", "auto_lirpa", "trained", "out"):
            del options[where]
        return {
            "format": FORMAT,
            "suite": self.suite,
            "title": self.title,
            "environment": dict(self.environment),
            "options": options,
            "tables": [asdict(table) for table in self.tables],
            "bars": [{**asdict(bar), "held": bar.held} for bar in self.bars],
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Store as NAME.md and NAME.json in `folder`; returns both paths."""
        markdown, data = (folder / f"{self.name}.{ending}" for ending in ("md", "json"))
        write_whole(markdown, self.markdown().encode())
        return markdown, write_json(self.record(), data)

    def markdown(self) -> str:
        """The report as Markdown."""
        parts = [f"# {self.title}"]
        if self.options.quick:
            parts.append("A quick run, to see that all works: its figures are no result.")
        parts.append("\n".join(f"- {key}: {_cell(value)}" for key, value in self.environment.items()))
        if self.bars:
            parts.append(f"## Bars\n\n{_markdown_table([bar.row for bar in self.bars])}")
        for table in self.tables:
            notes = "".join(f"\n\n{note}" for note in table.notes)
            parts.append(f"## {table.title}{notes}\n\n{_markdown_table(table.rows)}")
        return "\n\n".join(parts) + "\n"

    def show(self) -> None:
        """Print on the terminal."""
        from rich.console import Console
        from rich.markdown import Markdown

        # Wide tables are cut to the terminal's width by default; a log or a pipe takes them whole.
        console = Console(width=None if os.isatty(1) else 320)
        console.print(Markdown(self.markdown()))


def _markdown_table(rows: Sequence[Row]) -> str:
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    numbers = {name: all(isinstance(row[name], int | float | None) for row in rows) for name in columns}
    lines = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---:' if numbers[name] else '---' for name in columns)} |",
    ]
    lines += [f"| {' | '.join(_cell(row[name]) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return str(value)


def _number(value: float | None) -> str:
    """Three significant digits; thousands in full."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def environment(options: Options) -> dict[str, Any]:
    """Everything about the machine and the moment that figures depend on."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load average at start": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
    }
    if options.processor_time:
        facts["times"] = "of the processor"
    if torch.device(options.device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(options.device)
    versions = {"python": platform.python_version(), "optrelax": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    theirs = peers.auto_lirpa_version()  # of a checkout too, which no package index knows
    versions |= {"auto_LiRPA": theirs} if theirs else {}
    return facts | {"versions": versions, "seed": options.seed, "runs": options.runs}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
