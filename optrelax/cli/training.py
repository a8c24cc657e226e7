"""`optrelax train`: train a network by a recipe."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optrelax.cli.application import command, print_json, stderr, stdout
from optrelax.cli.inputs import DataDir, Device, Json, Seed, Subset, parse_number, read_device
from optrelax.cli.progress_bars import training_bar

if TYPE_CHECKING:
    from optrelax.training.recipes import Recipe
    from optrelax.training.trainer import TrainingResult

__all__ = ["train"]


@command("train")
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", show_default=False, help="Its name; --list shows all.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Show the recipes, or those with RECIPE in their name.")
    ] = False,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", show_default="runs/RECIPE", help="Folder of the run.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="RUN",
            show_default=False,
            help="Begin at the weights of this run or network; with --warmup 0 --mixing 0 at the full eps.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last stored step of the run in DIR; same result.")
    ] = False,
    checkpoint_every: Annotated[
        float,
        typer.Option(
            "--checkpoint-every",
            min=0,
            metavar="MINUTES",
            help="Store the state within an epoch too; 0 after every step, inf at its end only.",
        ),
    ] = 5.0,
    keep_every: Annotated[
        int | None,
        typer.Option(
            "--keep-every",
            min=1,
            metavar="EPOCHS",
            show_default="none",
            help="After every so many epochs keep the network, as DIR/epoch-0005.safetensors.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the metrics of every epoch to DIR/tensorboard as well.")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", min=1, show_default="recipe", help="Warm-up, mixing and milestones keep their shares."
        ),
    ] = None,
    relaxation: Annotated[
        str | None, typer.Option("--relaxation", metavar="NAME", show_default="recipe", help="Train with another one.")
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option("--eps", show_default="recipe", help="Radius at the end, in units of the pixels; 0.1 or 8/255."),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", min=0, show_default="recipe", help="Epochs of natural loss only.")
    ] = None,
    mixing: Annotated[
        float | None, typer.Option("--mixing", min=0, show_default="recipe", help="Epochs in which eps grows.")
    ] = None,
    kappa: Annotated[
        float | None,
        typer.Option("--kappa", min=0, max=1, show_default="recipe", help="Weight of the natural loss at the end."),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option("--beta", min=0, max=1, show_default="recipe", help="Weight of the relaxation against box."),
    ] = None,
    l1: Annotated[
        float | None, typer.Option("--l1", min=0, show_default="recipe", help="Times the sum of |weights|.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", min=0, show_default="recipe", help="First learning rate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, show_default="recipe", help="Images a step.")] = None,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="full|cpu|smoke",
            help="The recipe's own epochs; at most 30 minutes of two cores; under a minute.",
        ),
    ] = "full",
    pieces: Annotated[
        int | None,
        typer.Option(
            "--pieces",
            min=1,
            show_default="one a process",
            help="Work on every batch in so many pieces: less memory. Processes of torchrun share them.",
        ),
    ] = None,
    subset: Subset = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Train a network by a recipe, some of its numbers changed.

    DIR keeps the configuration, a line of metrics an epoch, the state to resume from, and the network.
    Several processes: torchrun --no-python --nproc-per-node N optrelax train RECIPE.
    """
    from optrelax.training.processes import launched
    from optrelax.training.recipes import recipe as named

    if listed:
        _show_recipes(json, recipe or "", budget)
        return
    if recipe is None:
        raise ValueError("train: name a recipe; `optrelax train --list` shows them")
    given = {
        "epochs": epochs,
        "relaxation": relaxation,
        "eps": None if eps is None else parse_number("--eps", eps),
        "warmup": warmup,
        "mixing": mixing,
        "kappa": kappa,
        "beta": beta,
        "l1": l1,
        "lr": lr,
        "batch": batch,
        "subset": subset,
    }
    row = named(recipe, budget, **{name: value for name, value in given.items() if value is not None})
    folder = Path("runs") / row.name if out is None else out
    with launched(read_device(device)) as processes:
        work = _Work(row, folder, data_dir, processes.count if pieces is None else pieces, seed, device, init)
        how: dict[str, Any] = {"resume": resume, "checkpoint_every": checkpoint_every, "tensorboard": tensorboard}
        how["keep_every"] = keep_every
        result = work.run(first=processes.rank == 0, **how)
        if processes.rank == 0:
            _show(row, folder, result, json)


@dataclass(frozen=True, slots=True)
class _Work:
    """One run by a recipe."""

    row: Recipe
    folder: Path
    data_dir: Path | None
    pieces: int
    seed: int
    device: str
    init: Path | None

    def run(self, first: bool = True, **how: Any) -> TrainingResult:
        """The work itself, under a bar on the first process; a word about resuming after Ctrl-C.  how: for `train`."""
        from optrelax.data.datasets import load_dataset
        from optrelax.output.tables import require_writable
        from optrelax.training.runs import start_from
        from optrelax.training.trainer import train as work

        row, where = self.row, read_device(self.device)
        data = load_dataset(row.data, self.data_dir, "train")
        if row.subset is not None:
            data = data.subset(row.subset)
        require_writable(self.folder)
        net = row.network(data, self.seed).to(where)
        facts = {"recipe": asdict(row), "seed": self.seed}
        facts |= {} if self.init is None else start_from(net, self.init)
        training = row.training(self.seed, self.pieces)
        bar = training_bar(row.name) if first else contextlib.nullcontext()
        try:
            with bar as watch:
                return work(net, data, training, folder=self.folder, watch=watch, facts=facts, **how)
        except KeyboardInterrupt:
            stderr().print("Interrupted; repeat the command with --resume.", markup=False, highlight=False)
            raise


def _show_recipes(json: bool, part: str, budget: str) -> None:
    """The recipes whose name contains `part` within a budget, and what they cost."""
    import polars as pl

    from optrelax.output.tables import rich_table
    from optrelax.training.recipe_budgets import core_seconds
    from optrelax.training.recipes import names, recipe

    found = [recipe(name, budget) for name in names() if part in name]
    rows = [asdict(row) | {"core seconds": core_seconds(row)} for row in found]
    if not rows:
        raise ValueError(f"train: no recipe's name contains {part!r}; `optrelax train --list` shows all")
    if json:
        print_json(rows)
        return
    shown = (
        "name",
        "method",
        "relaxation",
        "eps",
        "epochs",
        "warmup",
        "mixing",
        "kappa",
        "l1",
        "batch",
        "subset",
        "core seconds",
        "source",
    )
    frame = pl.DataFrame([{key: row[key] for key in shown} for row in rows])
    stdout().print(rich_table(frame, decimals={"core seconds": 0}))


def _show(row: Recipe, folder: Path, result: TrainingResult, json: bool) -> None:
    import polars as pl

    from optrelax.output.tables import rich_table

    last = result.history[-1]
    seconds = sum(metrics.seconds for metrics in result.history)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "recipe": asdict(row),
        "seconds": seconds,
        "last epoch": asdict(last),
    }
    if json:
        print_json(facts)
        return
    figures: dict[str, Any] = {
        "epoch": last.epoch,
        "loss": last.loss,
        "accuracy %": 100 * last.natural_accuracy,
        "robust %": None if last.robust_accuracy is None else 100 * last.robust_accuracy,
        "eps": last.eps,
        "seconds": seconds,
    }
    if last.unfinished is not None:
        figures |= {"LPs unfinished %": 100 * last.unfinished, "median gap": last.median_gap}
    console = stdout()
    decimals = {"accuracy %": 2, "robust %": 2, "loss": 4, "seconds": 0, "LPs unfinished %": 2, "median gap": 6}
    console.print(f"{row.name}: means over the training images of the last epoch", highlight=False, soft_wrap=True)
    console.print(rich_table(pl.DataFrame([figures]), decimals=decimals))
    name = row.relaxation or "crown"
    advice = f"optrelax certify {folder} --data {row.data} --eps {row.eps:g} --relaxation {name}"
    console.print(f"Network in {folder}. To certify it: {advice}", markup=False, highlight=False, soft_wrap=True)
