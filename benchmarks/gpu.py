"""All that a CUDA device can show, in eight minutes: results stored after each part, nothing taken from a network.

The parts run on a CPU too (`--quick`), so that the first run on a device is no rehearsal.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import optrelax as ox
from benchmarks import relaxation_steps
from benchmarks.lp_cases import Case, Layer, quantiles, relative
from benchmarks.measuring import ROOT, Samples, Task, interleaved, wait
from benchmarks.networks import Trained
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from benchmarks.training_steps import own_step, step
from optrelax.data.datasets import load_dataset
from optrelax.layers import DualAscent, Solution, Status, Triangle
from optrelax.networks.capturing import capture
from optrelax.papers.barrier import ROWS, barrier_lines, run_barrier
from optrelax.training import train
from optrelax.training.recipes import recipe

TITLE = "A CUDA device: tests, kernels, training steps, LPs, the barrier table, epochs"

_LOSSES = ("box", "crown-ibp", "crown", "triangle")
_TYPES = {"float32": torch.float32, "float64": torch.float64}
_LPS, _LP_MS, _BARRIER_MINUTES = 500, 50.0, 5.0
_PUBLISHED = 10_000


@dataclass
class _Found:
    """What the parts found so far."""

    parts: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


Part = Callable[[Options], tuple[Table, list[Bar]]]


def run(options: Options) -> Report:
    """Every part in turn, the quickest to tell first; a part that fails, or has no time left, is named and passed over.

    Stored after every part where the options name a folder.
    """
    facts, found, begin = environment(options), _Found(), time.monotonic()
    for name, part in PARTS.items():
        _take(name, part, options, found, begin)
        tables = [Table(title="Parts", keys=("part",), rows=found.parts), *found.tables]
        report = Report("gpu", TITLE, options, tables, found.bars, facts)
        if options.out is not None:
            report.write(Path(options.out))
    return report


def _take(name: str, part: Part, options: Options, found: _Found, begin: float) -> None:
    start = time.monotonic()
    if options.minutes is not None and start - begin > 60 * options.minutes:
        found.parts.append({"part": name, "seconds": None, "outcome": "not run: no time left"})
        return
    outcome = "done"
    try:
        table, bars = part(options)
        found.tables.append(table)
        found.bars += bars
    except Exception as error:  # noqa: BLE001 - told in the report; the other parts are worth their minutes
        first = (str(error) or "no message").strip().splitlines()[0]
        outcome = f"FAILED: {type(error).__name__}: {first}"
    if torch.device(options.device).type == "cuda":
        torch.cuda.empty_cache()
    seconds = time.monotonic() - start
    found.parts.append({"part": name, "seconds": seconds, "outcome": outcome})
    print(f"{name}: {outcome}, {seconds:.0f} s", flush=True)


def ceilings(options: Options) -> tuple[Table, list[Bar]]:
    """Memory traffic and matrix products by PyTorch: what other figures are held against."""
    n, size = (256, 2**16) if options.quick else (8192, 2**28)
    g = torch.Generator().manual_seed(options.seed)
    source = torch.rand(size, generator=g).to(options.device)
    target = torch.empty_like(source)
    single = torch.rand(n, n, generator=g).to(options.device)
    double = single.double()
    tasks: dict[str, Task] = {
        "copy": lambda: target.copy_(source),
        "float32": lambda: single @ single,
        "float64": lambda: double @ double,
    }
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    rows: list[Row] = [{"what": "copy, GB/s read and written", "rate": 8e-9 * size / timed.median("copy")}]
    rows += [{"what": f"product in {name}, TFLOP/s", "rate": 2e-12 * n**3 / timed.median(name)} for name in _TYPES]
    note = f"Copy of {4 * size / 2**20:.0f} MiB, products of {n} x {n}; TF32 off, as bounds want it."
    return Table(title="Ceilings", keys=("what",), rows=rows, notes=(note,)), []


def _tests(options: Options) -> tuple[Table, list[Bar]]:
    """The tests marked gpu, in a process of their own; on a CPU they are collected alone."""
    # Other modules of tests may want packages that a bare machine lacks.
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", *files]
    if torch.device(options.device).type != "cuda":
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.strip().splitlines()
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", " ".join(lines[-3:]))
    }
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed:
        print(done.stdout[-6000:], flush=True)
    rows: list[Row] = [
        {"tests": "passed", "count": counts.get("passed", 0)},
        {"tests": "failed", "count": counts.get("failed", 0) + counts.get("error", 0)},
    ]
    bars = [Bar("tests that failed", 0.0, None, float(rows[1]["count"]) if counts else None)]
    return Table(title="Tests of a device", keys=("tests",), rows=rows, notes=tuple(failed)), bars


def _relaxation_steps(options: Options) -> tuple[Table, list[Bar]]:
    report = relaxation_steps.run(options)
    return report.tables[0], list(report.bars)


def _lps(options: Options) -> tuple[Table, list[Bar]]:
    """LP-LAST of evenly spaced test images against the runner-up, on CONV trained naturally."""
    images = 4 if options.quick else _LPS
    net = Trained("fc-small" if options.quick else "conv", "natural", 1, options.seed).network(options)
    test = load_dataset(options.data, options.data_dir, split="test").subset(images)
    rows: list[Row] = []
    for name, dtype in _TYPES.items():
        moved = copy.deepcopy(net).to(options.device, dtype)
        x, labels = test.images.to(options.device, dtype), test.labels.to(options.device)
        case = _RunnerUp("CONV", capture(moved, test.input_shape), x, labels, 0.02)
        for tol in (1e-3, 1e-4):
            layer = Layer(Triangle(preactivation=ox.Crown(), solver=DualAscent(tol=tol)), case)
            timed = interleaved(
                {"solve": layer.solve_given, "step": layer.step_given}, runs=options.runs, device=options.device
            )
            rows.append({"type": name, "tol": tol, "LPs": images} | _solved(layer.solve_given(), timed))
    bar = Bar(f"LP-LAST of {images} on CONV, float32, tol 1e-3: ms", _LP_MS, None, rows[0]["forward ms"])
    note = "Margin of the label over the runner-up, eps 0.02, over CROWN's pre-activation bounds, which are given."
    return Table(title="LP-LAST on CONV", keys=("type", "tol"), rows=rows, notes=(note,)), [bar]


class _RunnerUp(Case):
    """One margin an image: of the label over the runner-up."""

    @cached_property
    def rows(self) -> Tensor:
        with torch.no_grad():
            scores = self.network(self.x)
        other = scores.scatter(1, self.labels[:, None], -torch.inf).argmax(1)
        eye = torch.eye(self.network.outputs).to(self.x)
        return (eye[self.labels] - eye[other])[:, None]


def _solved(found: Solution, timed: Samples) -> Row:
    return {
        "forward ms": 1e3 * timed.median("solve"),
        "forward + gradient ms": 1e3 * timed.median("step"),
        "iterations": float(found.iterations.double().mean()),
        "closed %": 100 * float((found.status == Status.OPTIMAL).double().mean()),
        **quantiles("gap", relative(found.gap, found.lower)),
    }


def _training_steps(options: Options, dtype: str) -> tuple[Table, list[Bar]]:
    """Losses of the recipes on the networks of the paper and on CNN7, random weights."""
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "fc": ((1, 28, 28), 100),
        "conv": ((1, 28, 28), 100),
        "cnn7": ((3, 32, 32), 4),
    }
    if options.quick:
        shapes = {"fc-small": ((1, 28, 28), 4)}
    rows, notes = [], []
    for model, (shape, batch) in shapes.items():
        torch.manual_seed(options.seed)
        net = ox.models.build(model, shape, 10, options.seed) if model != "cnn7" else _cnn7(options.seed)
        net = net.to(options.device, _TYPES[dtype])
        x = torch.rand(batch, *shape).to(options.device, _TYPES[dtype])
        labels = (torch.arange(batch) % 10).to(options.device)
        try:
            rows += _losses(model, net, x, labels, options)
        except torch.OutOfMemoryError:
            notes.append(f"{model}: out of memory.")
    note = "A step is the loss at eps 2/255, forward and backward, random weights. Peak memory of the device in a step."
    keys = ("network", "loss")
    table = Table(title=f"Training steps, {dtype}", keys=keys, rows=rows, smaller=("/ own step",), notes=(note, *notes))
    return table, []


def _cnn7(seed: int) -> nn.Module:
    return ox.models.cnn7(width=64, batch_norm=False, seed=seed)


def _losses(model: str, net: nn.Module, x: Tensor, labels: Tensor, options: Options) -> list[Row]:
    network = ox.capture(net, x.shape[1:])
    tasks: dict[str, Task] = {"own": own_step(net, x, labels)}
    for loss in _LOSSES:
        tasks[loss] = step(network, recipe(f"mnist-fc-small-{loss}").loss(), x, labels, 2 / 255)
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    rows = []
    for loss in _LOSSES:
        row: Row = {"network": model, "batch": len(x), "loss": loss, "ms": 1e3 * timed.median(loss)}
        row["/ own step"] = timed.ratio(loss, "own")
        rows.append(row | {"peak MiB": _peak(tasks[loss], options.device)})
    return rows


def _peak(task: Task, device: str) -> float | None:
    """Of a CUDA device, beyond what is there."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    task()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _epochs(options: Options) -> tuple[Table, list[Bar]]:
    """One epoch of training, by Box and by the triangle."""
    data = load_dataset(options.data, options.data_dir, split="train")
    data = data.subset(200) if options.quick else data
    rows = []
    for loss in ("box", "triangle"):
        wanted = recipe(f"{options.data}-fc-small-{loss}", epochs=1, warmup=0)
        net = wanted.network(data, options.seed).to(options.device)
        begin = time.perf_counter()
        result = train(net, data, wanted.training(options.seed))
        wait(options.device)
        row: Row = {"network": "fc-small", "loss": loss, "images": len(data), "seconds": time.perf_counter() - begin}
        rows.append(row | {"mean loss": result.history[-1].loss})
    note = "At the full radius from the first step on, capture and the first compilation included."
    return Table(title="One epoch", keys=("network", "loss"), rows=rows, notes=(note,)), []


def _barrier(options: Options) -> tuple[Table, list[Bar]]:
    """A tenth of the images of the published LP-ALL table."""
    images = 5 if options.quick else _PUBLISHED // 10
    folder = Path(options.data_dir or ".")
    begin = time.perf_counter()
    rows = ROWS[:1] if options.quick else ROWS
    batches = run_barrier(folder / "barrier", folder, rows=rows, subset=images, batch_size=1000, device=options.device)
    seconds = time.perf_counter() - begin
    table = Table(title="Barrier table: LP-ALL", keys=("network", "eps"), rows=barrier_lines(batches, rows))
    foreseen = seconds / 60 * _PUBLISHED / images * len(ROWS) / len(rows)
    return table, [Bar("barrier table, all images: minutes foreseen", _BARRIER_MINUTES, None, foreseen)]


PARTS: dict[str, Part] = {
    "ceilings": ceilings,
    "tests": _tests,
    "relaxation steps": _relaxation_steps,
    "LP-LAST": _lps,
    "training steps, float32": partial(_training_steps, dtype="float32"),
    "epochs": _epochs,
    "barrier table": _barrier,
    "training steps, float64": partial(_training_steps, dtype="float64"),
}
"""In the order of their worth: what comes late may find no time left."""
