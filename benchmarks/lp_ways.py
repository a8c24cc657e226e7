"""Which neurons a dual ascent keeps: the ways it can go on the same LPs, and the one it chooses."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Iterable

import torch

import optrelax as ox
from benchmarks.lp_cases import Case, Layer, relative
from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Options, Row, Table
from optrelax.layers import DualAscent, Solution, Triangle
from optrelax.layers.ascent import composed_ascent
from optrelax.layers.composition import KeptNeurons

_WAYS: dict[str, KeptNeurons | None] = {"crossing": "crossing", "all but the dead": "alive", "all, in sweeps": None}


def measure(cases: Iterable[Case], options: Options) -> Table:
    """Every case in float32."""
    return Table(
        title="LP-LAST: neurons that are kept",
        keys=("setting", "kept"),
        rows=[row for case in cases for row in _rows(case.to("cpu", torch.float32), options)],
        notes=(
            "DualAscent, tol 1e-4, float32, on the CPU; microseconds of one LP, forward. `chosen`: by counted "
            "multiply-adds. `difference`: of the bounds from those of the sweeps, relative to max(1, |value|); a "
            "finished LP stops at once where its neighbours go on in the sweeps until a fifth has finished.",
        ),
    )


def _rows(case: Case, options: Options) -> list[Row]:
    layer = Layer(Triangle(preactivation=ox.Crown(), solver=DualAscent(tol=1e-4)), case)
    tasks: dict[str, Task] = {"chosen": layer.solve_given}
    tasks |= {name: _by(way, layer.solve_given) for name, way in _WAYS.items()}
    timed = interleaved(tasks, runs=options.runs)
    found = {name: task() for name, task in tasks.items()}
    sweeps = found["all, in sweeps"].lower
    return [
        {
            "setting": case.name,
            "crossing": case.crossing(),
            "kept": name,
            "forward us": 1e6 * timed.median(name) / case.lps,
            "times faster": timed.ratio("all, in sweeps", name),
            "iterations": float(solution.iterations.double().mean()),
            "difference": float(relative((solution.lower - sweeps).abs(), sweeps).max()),
            "spread": timed.spread(name),
        }
        for name, solution in found.items()
    ]


def _by(way: KeptNeurons | None, work: Callable[[], Solution]) -> Callable[[], Solution]:
    def task() -> Solution:
        with unittest.mock.patch.object(composed_ascent, "plan", return_value=way):
            return work()

    return task
