"""LP-LAST: one LP a margin. Times and accuracy of every solver on the same LPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import optrelax as ox
from benchmarks import lp_references as references
from benchmarks import products
from benchmarks.lp_cases import Case, Layer, Sizes, quantiles, relative
from benchmarks.measuring import Samples, Task, interleaved
from benchmarks.reports import Bar, Options, Row, Table
from optrelax.layers import DualAscent, InteriorPoint, Solution, Status, Triangle


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver of ours: a row of the tables."""

    name: str
    solver: Any
    dtype: torch.dtype = torch.float64
    subset: bool = False
    """Whether it is measured on a few images only."""


SOLVERS = (
    Solver("DualAscent tol 1e-4, float64", DualAscent(tol=1e-4)),
    Solver("DualAscent tol 1e-4, float32 sweeps", DualAscent(tol=1e-4, precision="float32")),
    Solver("DualAscent tol 1e-4, all float32", DualAscent(tol=1e-4), torch.float32),
    Solver("DualAscent tol 1e-3, float64", DualAscent(tol=1e-3)),
    Solver("DualAscent tol 1e-3, all float32", DualAscent(tol=1e-3), torch.float32),
    Solver("InteriorPoint", InteriorPoint(), subset=True),
)
_COLD, _WARM, _GENERIC = "HiGHS", "HiGHS warm", "cvxpylayers"
_ACCURATE = {"error 99 %": 1e-4, "gap 90 %": 1e-4, "gap 99 %": 1e-3}  # what a solver must keep for its speed to count
_TIMES = (
    "setting",
    "solver",
    "LPs",
    "iterations",
    "forward ms",
    "forward + gradient ms",
    "x cvxpylayers",
    "x HiGHS",
    "x HiGHS warm",
    "floor us",
    "forward / floor",
    "with bounds ms",
    "with bounds, x HiGHS",
    "spread",
)


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of one setting."""

    times: list[Row]
    accuracy: list[Row]


def measure(case: Case, sizes: Sizes, options: Options) -> Found:
    """Every solver on one setting, interleaved."""
    values = references.optimal_values(case, options)
    layers = {s.name: _layer(s, case, sizes, options.device) for s in SOLVERS}
    few, fewer = case.subset(sizes.highs), case.subset(sizes.cold)
    warm, cold = references.programs(few), references.programs(fewer)
    generic = references.generic(cold[0], sizes.generic, options.threads)
    tasks: dict[str, Task] = {
        _WARM: lambda: references.highs_warm(warm, options.threads),
        _COLD: lambda: references.highs_cold(cold, options.threads),
        f"{_GENERIC} forward": generic.forward,
        _GENERIC: generic.step,
    }
    for name, layer in layers.items():
        tasks |= {f"{name} forward": layer.solve_given, name: layer.step_given}
        tasks |= {f"{name} with bounds": layer.step, f"{name} sweeps": _sweeps(layer.case)}
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    lps = {name: layer.case.lps for name, layer in layers.items()}
    lps |= {_WARM: few.lps, _COLD: fewer.lps, _GENERIC: sizes.generic}
    solutions = {name: layer.solve() for name, layer in layers.items()}
    times = [_reference_times(case.name, name, timed, lps) for name in (_COLD, _WARM, _GENERIC)]
    times += [_times(case.name, solver, timed, lps, solutions[solver.name]) for solver in SOLVERS]
    accuracy = [_closed_form_accuracy(case, values)]
    accuracy.append(_generic_accuracy(case, generic.forward(), values[case.index(sizes.cold)][0]))
    for name, found in solutions.items():
        of = layers[name].case
        accuracy.append(_accuracy(case.name, name, found, values[case.index(len(of))]))
    return Found(times, accuracy)


def _layer(solver: Solver, case: Case, sizes: Sizes, device: str) -> Layer:
    of = case.subset(sizes.exact) if solver.subset else case
    return Layer(Triangle(preactivation=ox.Crown(), solver=solver.solver), of.to(device, solver.dtype))


def _sweeps(case: Case) -> Task:
    """The bare products of one iteration on all LPs at once."""
    return products.bare(case.network, products.two_sweeps(case.network, case.lps), case.x, gradient=False)


# --- rows ---------------------------------------------------------------------------------------------------------


def _reference_times(setting: str, name: str, timed: Samples, lps: dict[str, int]) -> Row:
    row: Row = {**dict.fromkeys(_TIMES), "setting": setting, "solver": name, "LPs": lps[name]}
    each = 1e3 / lps[name]
    if name == _GENERIC:
        row["forward ms"] = each * timed.median(f"{name} forward")
        row["forward + gradient ms"] = each * timed.median(name)
    else:
        row["forward ms"] = each * timed.median(name)
    return row | {"spread": timed.spread(name)}


def _times(setting: str, solver: Solver, timed: Samples, lps: dict[str, int], found: Solution) -> Row:
    name = solver.name
    each = 1e3 / lps[name]
    iterations = float(found.iterations.double().mean())
    row: Row = {**dict.fromkeys(_TIMES), "setting": setting, "solver": name, "LPs": lps[name]}
    row["iterations"] = iterations
    row["forward ms"] = each * timed.median(f"{name} forward")
    row["forward + gradient ms"] = each * timed.median(name)
    row["with bounds ms"] = each * timed.median(f"{name} with bounds")

    def faster(reference: str, task: str = name) -> float:
        return timed.ratio(reference, task) * lps[name] / lps[reference]

    row |= {"x cvxpylayers": faster(_GENERIC), "x HiGHS": faster(_COLD), "x HiGHS warm": faster(_WARM)}
    row["with bounds, x HiGHS"] = faster(_COLD, f"{name} with bounds")
    if isinstance(solver.solver, DualAscent):
        # Two sweeps an iteration, the one that evaluates the start included.
        floor = (iterations + 1) * timed.median(f"{name} sweeps")
        row["floor us"] = 1e3 * each * floor
        row["forward / floor"] = timed.median(f"{name} forward") / floor
    return row | {"spread": timed.spread(name)}


def _accuracy(setting: str, name: str, found: Solution, values: Tensor) -> Row:
    lower = found.lower.double().cpu()
    return {
        "setting": setting,
        "solver": name,
        "LPs": values.numel(),
        **quantiles("error", relative((values - lower).abs(), values)),
        **quantiles("gap", relative(found.gap.cpu(), lower)),
        "closed %": 100 * float((found.status == Status.OPTIMAL).double().mean()),
    }


def _without_gap(setting: str, name: str, error: Tensor) -> Row:
    nothing = dict.fromkeys((*quantiles("gap", torch.zeros(1)), "closed %"))
    return {"setting": setting, "solver": name, "LPs": error.numel(), **quantiles("error", error), **nothing}


def _closed_form_accuracy(case: Case, values: Tensor) -> Row:
    """What the LP buys: CROWN's own bound."""
    with torch.no_grad():
        lower = ox.lower_bounds(case.network, case.ball, case.rows, "crown")
    return _without_gap(case.name, "CROWN", relative((values - lower).abs(), values))


def _generic_accuracy(case: Case, found: Tensor, values: Tensor) -> Row:
    true = values[: len(found)]
    return _without_gap(case.name, _GENERIC, relative((true - found).abs(), true))


# --- bars and tables ----------------------------------------------------------------------------------------------


def bars(setting: str, found: Found) -> list[Bar]:
    """Speeds of the fastest solver that is accurate enough, and the default's gaps."""
    accuracy = {row["solver"]: row for row in found.accuracy}
    good = [
        row
        for row in found.times
        if row["x HiGHS"] is not None
        and all(accuracy[row["solver"]][column] <= most for column, most in _ACCURATE.items())
    ]
    best = max(good, key=lambda row: float(row["x HiGHS"]), default=dict.fromkeys(_TIMES))
    who = best["solver"] or "no solver is accurate enough"
    first = accuracy[SOLVERS[0].name]
    return [
        Bar(f"{setting}: times faster than cvxpylayers ({who})", None, 5000.0, best["x cvxpylayers"]),
        Bar(f"{setting}: times faster than HiGHS ({who})", None, 400.0, best["x HiGHS"]),
        Bar(f"{setting}: certified gap, 90 % ({SOLVERS[0].name})", 1e-4, None, first["gap 90 %"]),
        Bar(f"{setting}: certified gap, 99 % ({SOLVERS[0].name})", 1e-3, None, first["gap 99 %"]),
    ]


def tables(found: Sequence[Found], sizes: Sizes) -> list[Table]:
    """Times and accuracy of all settings."""
    what = (
        f"{sizes.images} evenly spaced test images, 9 margins. Milliseconds are those of one LP. Every solver is given "
        "CROWN's pre-activation bounds and the gradient reaches all that the LP is made of; `with bounds`: from the "
        "images to the gradient of the weights, computing and differentiating those bounds included.",
        "HiGHS: each LP from scratch, one thread an LP, as many LPs at a time as there are threads, simplex with "
        "tolerances of 1e-9; warm: the rows of an image in one model, each from the basis of the last. Exporting is "
        f"left out. cvxpylayers: SCS at 1e-4, {sizes.generic} LPs of one image only, as it is slow; compiling is left "
        "out.",
        "`x`: how many times faster our forward + gradient is than HiGHS's forward, or than cvxpylayers' forward + "
        "gradient. Floor: the bare products of two sweeps an iteration, in microseconds an LP.",
    )
    units = (
        "Relative to max(1, |value|). Error: against HiGHS's optimal value. Gap: certified, a feasible point's "
        "objective minus the bound. Closed: certified to the solver's own tolerance.",
    )
    return [
        Table(
            title="LP-LAST: times",
            keys=("setting", "solver"),
            smaller=("forward / floor",),
            greater=("x HiGHS", "with bounds, x HiGHS"),
            rows=[row for part in found for row in part.times],
            notes=what,
        ),
        Table(
            title="LP-LAST: accuracy",
            keys=("setting", "solver"),
            greater=("closed %",),
            rows=[row for part in found for row in part.accuracy],
            notes=units,
        ),
    ]
