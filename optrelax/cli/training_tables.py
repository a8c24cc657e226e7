"""What `optrelax train` shows: the recipes there are, and what came out of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from optrelax.cli.application import print_json, say, show_table
from optrelax.cli.inputs import size_of

if TYPE_CHECKING:
    from optrelax.data.samples import Samples
    from optrelax.training.recipes import Recipe
    from optrelax.training.trainer import TrainingResult

__all__ = ["show_recipes", "show_result"]


def show_recipes(json: bool, part: str, budget: str) -> None:
    """The recipes whose name contains `part` within a budget, and what they cost."""
    import polars as pl

    from optrelax.training.recipe_budgets import core_seconds
    from optrelax.training.recipes import names, recipe

    found = [recipe(name, budget) for name in names() if part in name]
    rows = [asdict(row) | {"core seconds": core_seconds(row)} for row in found]
    if not rows:
        raise ValueError(f"train: no recipe's name contains {part!r}; `optrelax train --list` shows all")
    if json:
        print_json(rows)
        return
    shown = ["name", "method", "relaxation", "eps", "epochs", "warmup", "mixing", "kappa", "l1", "batch", "subset"]
    shown += ["core seconds", "source"]
    frame = pl.DataFrame([{key: row[key] for key in shown} for row in rows])
    show_table(frame, {"core seconds": 0})


def show_result(row: Recipe, folder: Path, result: TrainingResult, examples: Samples, json: bool) -> None:
    """What came out of a run on these examples."""
    import polars as pl

    last = result.history[-1]
    seconds = sum(metrics.seconds for metrics in result.history)
    facts: dict[str, object] = {
        "folder": str(folder),
        "recipe": asdict(row),
        "seconds": seconds,
        "last epoch": asdict(last),
    }
    if json:
        print_json(facts)
        return
    figures: dict[str, object] = {
        "epoch": last.epoch,
        "loss": last.loss,
        "accuracy %": 100 * last.natural_accuracy,
        "robust %": None if last.robust_accuracy is None else 100 * last.robust_accuracy,
        "eps": last.eps,
        "seconds": seconds,
    }
    if last.unfinished is not None:
        figures |= {"LPs unfinished %": 100 * last.unfinished, "median gap": last.median_gap}
    decimals = {"accuracy %": 2, "robust %": 2, "loss": 4, "seconds": 0, "LPs unfinished %": 2, "median gap": 6}
    of = f"{len(examples):,} examples of {size_of(examples.x.shape[1:])}"
    title = f"{row.name}: {row.model} on {row.data}, {of}; means over the last epoch"
    say(title)
    show_table(pl.DataFrame([figures]), decimals)
    name = row.relaxation or "crown"
    norm = "" if row.norm == "linf" else f" --norm {row.norm}"
    eps = row.eps if row.certified_eps is None else row.certified_eps
    # A file of one's own is what was trained on: what is certified there says little.
    data = "TEST.npz" if row.data.endswith(".npz") else row.data
    advice = f"optrelax certify {folder} --data {data} --eps {eps:g}{norm} --relaxation {name}"
    share = int(examples.labels.bincount().max()) / len(examples)  # of the most frequent class
    if last.natural_accuracy < share + 0.02:
        say(
            f"That is no better than the most frequent class alone ({100 * share:.2f} %): the network has not learnt "
            "yet. More --epochs, another --lr or a smaller --eps may help."
        )
    advice += "" if row.clipped else " --no-clip"
    say(f"Network in {folder}. To certify it: {advice}")
