"""Growth: how time and memory of a step grow with the batch, the width, the depth and eps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import optrelax as ox
from benchmarks.measuring import Task, interleaved, peak_bytes
from benchmarks.reports import Options, Report, Row, Table, environment
from optrelax import relaxations

TITLE = "Growth: fully connected networks in batch, width, depth and eps"

_NAMES = ("box", "crown-ibp", "crown", "triangle")
_PROBED = ("box", "crown", "triangle")  # each figure of memory is a process of its own
_RUNS = 3
_INPUTS, _CLASSES, _CLIP = 784, 10, (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """A network with `depth` hidden layers of `width` neurons, random weights, and random images."""

    batch: int = 10
    width: int = 100
    depth: int = 2
    eps: float = 0.05
    seed: int = 0


_AXES: Mapping[str, tuple[float, ...]] = {
    "batch": (1, 10, 100),
    "width": (50, 100, 200),
    "depth": (1, 2, 4),
    "eps": (0.01, 0.05, 0.25),
}
_QUICK: Mapping[str, tuple[float, ...]] = {"batch": (1, 2), "eps": (0.01, 0.05)}


def run(options: Options) -> Report:
    """One table an axis, and by how much the last value of each costs more than the first."""
    facts = environment(options)
    axes = _QUICK if options.quick else _AXES
    tables = [_table(axis, values, options) for axis, values in axes.items()]
    tables.append(_summary(tables))
    return Report("growth", TITLE, options, tables, (), facts)


def probe(device: str, name: str, setting: Mapping[str, Any]) -> Task:
    """One step of a relaxation, for `peak_bytes`; warmed up on a single example."""
    of = Setting(**setting)
    _tasks(replace(of, batch=1), device)[name]()
    return _tasks(of, device)[name]


def _tasks(of: Setting, device: str) -> dict[str, Task]:
    """The network's own step, and that of every relaxation."""
    net = ox.models.fc(_INPUTS, *[of.width] * of.depth, _CLASSES, seed=of.seed).to(device)
    network = ox.capture(net, (_INPUTS,))
    generator = torch.Generator().manual_seed(of.seed)
    x = torch.rand(of.batch, _INPUTS, generator=generator).to(device)
    labels = torch.randint(_CLASSES, (of.batch,), generator=generator).to(device)

    def own() -> None:
        net.zero_grad()
        F.cross_entropy(network(x), labels).backward()

    def step(relaxation: relaxations.Relaxation) -> None:
        net.zero_grad()
        region = ox.LinfBall(x, of.eps, _CLIP)
        low = ox.lower_bounds(network, region, ox.margins(labels, _CLASSES), relaxation)
        ox.certified_cross_entropy(low).backward()

    def task(name: str) -> Task:
        relaxation = relaxations.resolve(name)
        return lambda: step(relaxation)

    return {"own step": own} | {name: task(name) for name in _NAMES}


def _table(axis: str, values: tuple[float, ...], options: Options) -> Table:
    rows = [_row(axis, replace(Setting(seed=options.seed), **{axis: value}), options) for value in values]
    fixed = {key: value for key, value in asdict(Setting()).items() if key not in (axis, "seed")}
    return Table(
        title=f"Growth with {axis}",
        keys=(axis,),
        rows=rows,
        smaller=(*(f"{name} / own step" for name in _NAMES), *(f"{name} peak MiB" for name in _PROBED)),
        notes=(f"Else {', '.join(f'{key} {value:g}' for key, value in fixed.items())}.",),
    )


def _row(axis: str, of: Setting, options: Options) -> Row:
    runs = min(options.runs, _RUNS)
    timed = interleaved(_tasks(of, options.device), runs=runs, device=options.device, least=0.05)
    row: Row = {axis: getattr(of, axis), "own step ms": 1e3 * timed.median("own step")}
    row |= {f"{name} ms": 1e3 * timed.median(name) for name in _NAMES}
    row |= {f"{name} / own step": timed.ratio(name, "own step") for name in _NAMES}
    for name in _PROBED:
        found = peak_bytes(probe, threads=options.threads, device=options.device, name=name, setting=asdict(of))
        row[f"{name} peak MiB"] = None if found is None else found / 2**20
    return row


def _summary(tables: list[Table]) -> Table:
    """Figures at the last value of an axis, divided by those at its first."""
    rows: list[Row] = []
    for table in tables:
        first, last = table.rows[0], table.rows[-1]
        axis = table.keys[0]
        row: Row = {"axis": axis, "from": first[axis], "to": last[axis]}
        for column in ("own step ms", *(f"{name} ms" for name in _NAMES), *(f"{name} peak MiB" for name in _PROBED)):
            a, b = first[column], last[column]
            row[f"{column.removesuffix(' ms').removesuffix(' MiB')} x"] = b / a if a and b is not None else None
        rows.append(row)
    return Table(title="Last value of each axis against its first", keys=("axis",), rows=rows)
