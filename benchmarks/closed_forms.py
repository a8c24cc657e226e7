"""Closed forms: time and memory of every relaxation against the network's own step and the bare products it needs."""

from __future__ import annotations

import os
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import optrelax as ox
from benchmarks import peers, products
from benchmarks.measuring import Samples, Task, interleaved, peak_bytes
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax import layers, relaxations
from optrelax.kernels import native

TITLE = "Closed forms: relaxations against the network's own step and the bare products"
CLIP = (0.0, 1.0)
EPS = 0.1
CLASSES = 10

_LAYERS = ("alpha-crown", "triangle", "layerwise")  # measured by lp_layers
_NETWORKS = {"FC": "fc", "CONV": "conv"}
_COVERED = {"FC": ("fc", 100), "CONV": ("conv", 100), "CONVPLUS": ("convplus", 100), "RESIDUAL": ("residual", 10)}
"""Networks of the table of batches, and the greatest batch at which rows are pulled back from every neuron."""
_GROWTH = ("box", "crown-ibp", "crown", "deepz")
_EVERY_NEURON = ("crown", "deepz")
_QUICK = ("box", "hbox", "deepz", "crown-ibp", "crown", "cauchy")


@dataclass(frozen=True)
class Case:
    """A network at MNIST's shape with random weights, and random images: nothing here depends on data."""

    model: str
    batch: int
    device: str
    network: ox.Network
    x: Tensor
    labels: Tensor

    def natural(self) -> None:
        """The network's own step: cross-entropy, forward and backward."""
        self._forget()
        F.cross_entropy(self.network(self.x), self.labels).backward()

    def margins(self, relaxation: relaxations.Relaxation) -> Tensor:
        """Lower bounds of the margins, from the images on: region and specification belong to the step."""
        region = ox.LinfBall(self.x, EPS, CLIP)
        return ox.lower_bounds(self.network, region, ox.margins(self.labels, CLASSES), relaxation)

    def forward(self, relaxation: relaxations.Relaxation) -> None:
        """The bounds alone."""
        with torch.no_grad():
            self.margins(relaxation)

    def step(self, relaxation: relaxations.Relaxation) -> None:
        """The certified loss, forward and backward."""
        self._descend(self.margins(relaxation))

    def peer(self, method: str) -> Task:
        """The certified loss by auto_LiRPA, forward and backward."""
        lower = peers.auto_lirpa(self.network.module, self.x, EPS, CLIP, method)
        return lambda: self._descend(lower(self.labels))

    def _descend(self, margins: Tensor) -> None:
        self._forget()
        ox.certified_cross_entropy(margins).backward()

    def _forget(self) -> None:
        for p in self.network.module.parameters():
            p.grad = None

    def crossing(self) -> float:
        """Share of hidden neurons that cross under CROWN's bounds."""
        with torch.no_grad():
            found = ox.preactivation_bounds(self.network, ox.LinfBall(self.x, EPS, CLIP), "crown")
        cross = [(b.lower < 0) & (b.upper > 0) for b in found.values()]
        return sum(int(c.sum()) for c in cross) / sum(c.numel() for c in cross)


def case(model: str, batch: int, seed: int, device: str) -> Case:
    """Weights and images from `seed`."""
    net = ox.models.build(model, seed=seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, *ox.models.MNIST, generator=generator).to(device)
    labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    return Case(model, batch, device, ox.capture(net, ox.models.MNIST), x, labels)


def probe(model: str, batch: int, seed: int, device: str, name: str, peer: bool = False) -> Task:
    """One step of a relaxation (peer: of a method of auto_LiRPA), for `peak_bytes`; warmed up on a single example."""
    small, whole = (case(model, size, seed, device) for size in (1, batch))

    def task(of: Case) -> Task:
        if peer:
            return of.peer(name)
        relaxation = relaxations.resolve(name)
        return lambda: of.step(relaxation)

    task(small)()
    return task(whole)


def run(options: Options) -> Report:
    """Both networks at batch 100, and steps of all networks at several batch sizes."""
    batch = 4 if options.quick else 100
    facts = environment(options)
    tables, bars = [], []
    for label in options.networks or _NETWORKS:
        table = _table(label, _NETWORKS[label], batch, options)
        tables.append(table)
        bars += _bars(label, {row["relaxation"]: row for row in table.rows}, batch)
    if options.networks:
        return Report("closed_forms", TITLE, options, tables, bars, facts)
    tables.append(_growth_table((1, 2) if options.quick else (1, 10, 100, 500), options))
    tables.append(_first_use(_QUICK_KERNELS if options.quick else None))
    return Report("closed_forms", TITLE, options, tables, bars, facts)


_OWN = {"FC": {"box": 2.5, "crown-ibp": 12.0}, "CONV": {"box": 2.5, "crown-ibp": 17.4}}
"""Steps may take this many of the network's own."""


def _bars(label: str, rows: dict[str, Row], batch: int) -> list[Bar]:
    """What was asked of closed forms; of those that were measured."""
    where, crown = f"{label}, batch {batch}", rows["crown"]
    found = [
        Bar(f"{where}: {name} step, times the network's own", most, None, rows[name]["step / own step"])
        for name, most in _OWN[label].items()
        if name in rows
    ]
    found.append(Bar(f"{where}: crown step, times its bare products", 3.0, None, crown["step / products"]))
    if "deepz" in rows:
        found.append(Bar(f"{where}: deepz step, times crown's", 1.0, None, _times(rows["deepz"], crown)))
    if "auto_LiRPA CROWN" in rows:
        faster = _times(rows["auto_LiRPA CROWN"], crown)
        found.append(Bar(f"{where}: crown step, times faster than auto_LiRPA's", None, 3.0, faster))
    if label == "CONV":
        peak = None if crown["peak MiB"] is None else crown["peak MiB"] / 1024
        found.append(Bar(f"{where}: crown step, peak memory in GiB", 4.0, None, peak))
    return found


def _times(a: Row, b: Row) -> float | None:
    return None if a["step ms"] is None or b["step ms"] is None else a["step ms"] / b["step ms"]


def _names(options: Options) -> list[str]:
    wanted = options.relaxations or (_QUICK if options.quick else relaxations.names())
    # The bars are about these two.
    return [name for name in relaxations.names() if name not in _LAYERS and name in {"box", "crown", *wanted}]


def _table(label: str, model: str, batch: int, options: Options) -> Table:
    """Every relaxation on one network."""
    of = case(model, batch, options.seed, options.device)
    given = {"model": model, "batch": batch, "seed": options.seed}
    measured: dict[str, int | None] = {}
    for name in _names(options):
        measured[name] = peak_bytes(probe, threads=options.threads, device=options.device, name=name, **given)
    # What does not fit is not timed either: it would take the machine down with it.
    fits = [name for name, peak in measured.items() if peak is not None]
    timed = _time(of, fits, options)
    rows = [_row(of, name, timed, peak) for name, peak in measured.items()]
    for name in _peers(measured):
        method = peers.AUTO_LIRPA[name]
        size = peak_bytes(probe, threads=options.threads, device=options.device, name=method, peer=True, **given)
        rows.append(_peer_row(of, name, timed, size))
    own = timed.groups[0].median("own step")
    notes = (
        f"The network's own step (cross-entropy, forward and backward) takes {1e3 * own:.3g} ms. "
        f"eps {EPS}, random weights and images; {100 * of.crossing():.0f} % of the hidden neurons cross.",
        "A step is a region, its margins' bounds, the certified cross-entropy and its backward pass; forward is "
        "without gradients. `products` are the bare matrix products and convolutions that the relaxation needs. Peak "
        "memory is that of one step in a fresh process, beyond what was there before it; `-`: did not fit.",
    )
    return Table(
        title=f"{label}, batch {batch}",
        keys=("relaxation",),
        rows=rows,
        smaller=("step / own step", "step / products", "forward / products", "peak MiB"),
        notes=notes,
    )


def _peers(measured: dict[str, int | None]) -> list[str]:
    return [name for name in peers.AUTO_LIRPA if name in measured] if peers.has_auto_lirpa() else []


_SHORT = 0.1  # seconds
_TURNS = 5  # rounds of short tasks for one of long ones: milliseconds are noisier, and cost nothing


@dataclass(frozen=True)
class Timed:
    """Samples of short and of long steps, apart: each group has the network's own step and the floors it needs."""

    groups: tuple[Samples, ...]

    def of(self, name: str) -> Samples:
        """The group that a task is in."""
        return next(samples for samples in self.groups if name in samples.seconds)


def _time(of: Case, names: list[str], options: Options) -> Timed:
    """Own step, every relaxation forward and as a step, and the bare products of each, interleaved."""
    short = [name for name in names if _seconds(of, name, options) < _SHORT]
    rest = [name for name in names if name not in short]
    turns = options.runs * (1 if options.quick else _TURNS)
    runs = ((short, turns), (rest, options.runs))
    groups = [interleaved(_tasks(of, each), runs=n, device=of.device) for each, n in runs if each]
    return Timed(tuple(groups))


def _seconds(of: Case, name: str, options: Options) -> float:
    """A step's time, about."""
    task = {name: _call(of.step, relaxations.resolve(name))}
    return interleaved(task, runs=1, device=options.device, least=0.0).median(name)


def _tasks(of: Case, names: list[str]) -> dict[str, Task]:
    tasks: dict[str, Task] = {"own step": of.natural}
    for name in names:
        relaxation = relaxations.resolve(name)
        tasks[f"{name} forward"] = _call(of.forward, relaxation)
        tasks[f"{name} step"] = _call(of.step, relaxation)
        need = _needed(of, name)
        for gradient in (False, True):
            # Relaxations with the same products share a floor.
            tasks.setdefault(_floor(need, gradient), products.bare(of.network, need, of.x, gradient=gradient))
    for name in _peers(dict.fromkeys(names)):
        tasks[f"auto_LiRPA {name}"] = of.peer(peers.AUTO_LIRPA[name])
    return tasks


def _call(method: Callable[[relaxations.Relaxation], None], relaxation: relaxations.Relaxation) -> Task:
    return lambda: method(relaxation)


def _needed(of: Case, name: str) -> products.Products:
    return products.needed(of.network, relaxations.resolve(name), of.batch, CLASSES - 1)


def _floor(need: products.Products, gradient: bool) -> str:
    return f"products {need} {'step' if gradient else 'forward'}"


def _row(of: Case, name: str, found: Timed, peak: int | None) -> Row:
    row: Row = {"relaxation": name}
    forward, step = f"{name} forward", f"{name} step"
    known = peak is not None
    timed = found.of(step) if known else found.groups[0]
    need = _needed(of, name)
    bare_forward, bare_step = _floor(need, False), _floor(need, True)
    row["forward ms"] = 1e3 * timed.median(forward) if known else None
    row["step ms"] = 1e3 * timed.median(step) if known else None
    row["step / own step"] = timed.ratio(step, "own step") if known else None
    row["products ms"] = 1e3 * timed.median(bare_step) if known else None
    row["forward / products"] = timed.ratio(forward, bare_forward) if known else None
    row["step / products"] = timed.ratio(step, bare_step) if known else None
    work = 2 * products.multiply_adds(of.network, need)
    row["products GFLOP/s"] = work / timed.median(bare_forward) / 1e9 if known else None
    row["peak MiB"] = peak / 2**20 if peak is not None else None
    row["spread"] = timed.spread(step) if known else None
    return row


def _peer_row(of: Case, name: str, found: Timed, peak: int | None) -> Row:
    """auto_LiRPA's step in the same columns; its floor is that of the same bounds."""
    task, bare_step = f"auto_LiRPA {name}", _floor(_needed(of, name), True)
    timed = found.of(task)
    return {
        "relaxation": f"auto_LiRPA {peers.AUTO_LIRPA[name]}",
        "forward ms": None,
        "step ms": 1e3 * timed.median(task),
        "step / own step": timed.ratio(task, "own step"),
        "products ms": 1e3 * timed.median(bare_step),
        "forward / products": None,
        "step / products": timed.ratio(task, bare_step),
        "products GFLOP/s": None,
        "peak MiB": peak / 2**20 if peak is not None else None,
        "spread": timed.spread(task),
    }


_QUICK_KERNELS = frozenset({"ascent", "band_step", "relax_step"})
"""Sources that a quick run compiles; all of them take ten seconds."""


def _first_use(only: frozenset[str] | None) -> Table:
    """What a machine's first use of each kernel costs, and every later process's; only: of these sources."""
    rows: list[Row] = []
    folders = (Path(ox.__file__).parent, Path(layers.__file__).parent)
    with tempfile.TemporaryDirectory() as cache, unittest.mock.patch.dict(os.environ, OPTRELAX_CACHE=cache):
        sources = {path for folder in folders for path in folder.rglob("*.c") if only is None or path.stem in only}
        for source in sorted(sources):
            seconds = []
            for _ in range(2):
                begin = time.perf_counter()
                built = native.build.__wrapped__(source)
                seconds.append(time.perf_counter() - begin)
            first, again = (1e3 * s if built.library is not None else None for s in seconds)
            rows.append({"kernels": source.stem, "compile ms": first, "load ms": again})
    return Table(
        title="First use",
        keys=("kernels",),
        rows=rows,
        smaller=(),
        notes=("Compiled once a machine and kept; no kernel is compiled again for another batch or shape.",),
    )


def _growth_table(batches: tuple[int, ...], options: Options) -> Table:
    """Steps at several batch sizes, as ratios to the network's own step at the same size."""
    rows = [
        _growth_row(label, case(model, batch, options.seed, options.device), most, options)
        for label, (model, most) in _COVERED.items()
        for batch in batches
    ]
    theirs = [name for name in peers.AUTO_LIRPA if name in _GROWTH] if peers.has_auto_lirpa() else []
    return Table(
        title="Growth with the batch",
        keys=("network", "batch"),
        rows=rows,
        smaller=(*(f"{name} / own step" for name in _GROWTH), *(_peer_column(name) for name in theirs)),
        notes=(
            "`-`: not measured at this batch: beyond 100 intervals alone, or the memory did not suffice, or auto_LiRPA "
            "failed on this network.",
        ),
    )


def _growth_row(label: str, of: Case, most: int, options: Options) -> Row:
    chosen = options.relaxations or _GROWTH
    names = [name for name in _GROWTH if of.batch <= (most if name in _EVERY_NEURON else 100) or name == "box"]
    names = [name for name in names if name in chosen]
    theirs = [name for name in _peers(dict.fromkeys(names)) if _peer_fits(of, name, options)]
    tasks: dict[str, Task] = {"own step": of.natural}
    tasks |= {name: _call(of.step, relaxations.resolve(name)) for name in names}
    tasks |= {_peer_column(name): of.peer(peers.AUTO_LIRPA[name]) for name in theirs}
    timed = interleaved(tasks, runs=min(options.runs, 3), device=of.device)
    row: Row = {"network": label, "batch": of.batch, "own step ms": 1e3 * timed.median("own step")}
    row |= {f"{name} / own step": timed.ratio(name, "own step") if name in names else None for name in _GROWTH}
    every = _peers(dict.fromkeys(_GROWTH))
    return row | {
        _peer_column(name): timed.ratio(_peer_column(name), "own step") if name in theirs else None for name in every
    }


def _peer_column(name: str) -> str:
    return f"auto_LiRPA {peers.AUTO_LIRPA[name]} / own step"


def _peer_fits(of: Case, name: str, options: Options) -> bool:
    """Whether the machine's memory suffices: a process of its own finds out, where every neuron has rows."""
    if name not in _EVERY_NEURON:
        return True
    given = {"model": of.model, "batch": of.batch, "seed": options.seed, "name": peers.AUTO_LIRPA[name], "peer": True}
    try:
        return peak_bytes(probe, threads=options.threads, device=options.device, **given) is not None
    except RuntimeError:  # auto_LiRPA and this PyTorch need not agree on every network
        return False
