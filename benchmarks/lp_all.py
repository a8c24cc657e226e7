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


def measure(case: Case, sizes: Sizes, options: Options) -> Row:
    """The whole network by `Layerwise` on all images, and by HiGHS on a few."""
    few, one = case.subset(sizes.layerwise), case.subset(1)
    solver = Layerwise(preactivation=ox.Crown(), solver=DualAscent())
    layer, same = (Layer(solver, of.to(options.device, torch.float64)) for of in (case, few))
    true = references.highs_layerwise(few, options.threads)
    tasks: dict[str, Task] = {
        "forward": layer.solve,
        "step": layer.step,
        "HiGHS": lambda: references.highs_layerwise(one, options.threads, cold=True),
        "HiGHS warm": lambda: references.highs_layerwise(few, options.threads),
    }
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    lower = same.solve().lower.cpu()
    return {
        "setting": case.name,
        "images": len(case),
        "LPs an image": true.lps / len(few),
        "forward ms": 1e3 * timed.median("forward") / len(case),
        "forward + gradient ms": 1e3 * timed.median("step") / len(case),
        "HiGHS ms": 1e3 * timed.median("HiGHS"),
        "HiGHS warm ms": 1e3 * timed.median("HiGHS warm") / len(few),
        "forward, x HiGHS": timed.ratio("HiGHS", "forward") * len(case),
        "x HiGHS": timed.ratio("HiGHS", "step") * len(case),
        "x HiGHS warm": timed.ratio("HiGHS warm", "step") * len(case) / len(few),
        **quantiles("error", relative((true.values - lower).abs(), true.values)),
        "spread": timed.spread("step"),
    }


def bar(row: Row) -> Bar:
    """LP-ALL against HiGHS."""
    return Bar(f"{row['setting']}: LP-ALL, times faster than HiGHS", None, 200.0, row["x HiGHS"])


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
        keys=("setting",),
        rows=rows,
        greater=("x HiGHS", "forward, x HiGHS"),
        notes=notes,
    )
