"""LP-ALL: two LPs a crossing neuron, layer by layer, then the margins; against HiGHS on the same LPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import optrelax as ox
from benchmarks import lp_references as references
from benchmarks.lp_cases import Case, Layer, Sizes, quantiles, relative
from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Bar, Options, Row, Table
from optrelax.layers import DualAscent, Layerwise

_TYPES = {"float64": torch.float64, "float32": torch.float32}
_ACCURATE = 1e-4  # relative error of 99 % of the margins that a row must keep for its speed to count


def measure(case: Case, sizes: Sizes, options: Options) -> list[Row]:
    """The whole network by `Layerwise` on all images, and by HiGHS on a few."""
    few, one = case.subset(sizes.layerwise), case.subset(1)
    solver = Layerwise(preactivation=ox.Crown(), solver=DualAscent())
    true = references.highs_layerwise(few, options.threads)
    layers = {name: Layer(solver, case.to(options.device, dtype)) for name, dtype in _TYPES.items()}
    tasks: dict[str, Task] = {
        "HiGHS": lambda: references.highs_layerwise(one, options.threads, cold=True),
        "HiGHS warm": lambda: references.highs_layerwise(few, options.threads),
    }
    for name, layer in layers.items():
        tasks |= {f"{name} forward": layer.solve, f"{name} step": layer.step}
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    rows: list[Row] = []
    for name, dtype in _TYPES.items():
        lower = Layer(solver, few.to(options.device, dtype)).solve().lower.double().cpu()
        forward, step = f"{name} forward", f"{name} step"
        rows.append(
            {
                "setting": case.name,
                "type": name,
                "images": len(case),
                "LPs an image": true.lps / len(few),
                "forward ms": 1e3 * timed.median(forward) / len(case),
                "forward + gradient ms": 1e3 * timed.median(step) / len(case),
                "HiGHS ms": 1e3 * timed.median("HiGHS"),
                "HiGHS warm ms": 1e3 * timed.median("HiGHS warm") / len(few),
                "forward, x HiGHS": timed.ratio("HiGHS", forward) * len(case),
                "x HiGHS": timed.ratio("HiGHS", step) * len(case),
                "x HiGHS warm": timed.ratio("HiGHS warm", step) * len(case) / len(few),
                **quantiles("error", relative((true.values - lower).abs(), true.values)),
                "spread": timed.spread(step),
            }
        )
    return rows


def bars(rows: Sequence[Row]) -> list[Bar]:
    """LP-ALL against HiGHS, its LPs from scratch: the fastest row that is accurate enough."""
    good = [row for row in rows if row["error 99 %"] <= _ACCURATE]
    if not good:
        return [Bar(f"{rows[0]['setting']}: LP-ALL, times faster than HiGHS (none is accurate)", None, 200.0, None)]
    found = []
    for what, column in (("forward", "forward, x HiGHS"), ("forward + gradient", "x HiGHS")):
        best = max(good, key=lambda row: float(row[column]))
        name = f"{best['setting']}: LP-ALL {what} ({best['type']}), times faster than HiGHS"
        found.append(Bar(name, None, 200.0, best[column]))
    return found


def table(rows: Sequence[Row], sizes: Sizes) -> Table:
    """All settings."""
    notes = (
        "LP-ALL of the whole network: two LPs a neuron that crosses under CROWN's bounds, layer by layer, then the "
        "margins, those bounds included. Milliseconds an image. HiGHS does one image, each LP from scratch, one thread "
        f"an LP, as many LPs at a time as there are threads; warm: {sizes.layerwise} images, each objective of a layer "
        "from the basis of the last; LPs are counted and the error is measured there. `x`: how many times faster "
        "forward + gradient is, through the LPs of all layers, than HiGHS's forward.",
    )
    return Table(
        title="LP-ALL",
        keys=("setting", "type"),
        rows=rows,
        greater=("x HiGHS", "forward, x HiGHS"),
        notes=notes,
    )
