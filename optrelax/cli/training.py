"""`optrelax train`: train a network by a recipe."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from optrelax.cli.application import command, print_json, stderr, stdout
from optrelax.cli.inputs import DataDir, Device, Json, Seed, Subset, option, parse_number, read_data, read_device
from optrelax.cli.progress_bars import training_bar

if TYPE_CHECKING:
    from torch import nn

    from optrelax.training.recipes import Recipe
    from optrelax.training.trainer import TrainingResult

__all__ = ["train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is changed of the recipe: fields of `Recipe` by their names."""

    model: Annotated[
        str | None, option("--model", group="Network", metavar="NAME", help="Such as conv, or module:function.")
    ] = None
    data: Annotated[
        str | None, option("--data", group="Data", metavar="NAME", help="Such as mnist, or FILE.npz of x, labels.")
    ] = None
    epochs: Annotated[int | None, option("--epochs", group="Recipe", min=1, help="Others keep their shares.")] = None
    relaxation: Annotated[str | None, option("--relaxation", group="Recipe", metavar="NAME", help="To train with.")] = (
        None
    )
    eps: Annotated[
        str | None, option("--eps", group="Recipe", metavar="X", help="Last radius in pixel units: 8/255.")
    ] = None
    norm: Annotated[
        Literal["linf", "l2", "l1"] | None, option("--norm", group="Recipe", metavar="NAME", help="linf, l2 or l1.")
    ] = None
    warmup: Annotated[float | None, option("--warmup", group="Recipe", min=0, help="Epochs of natural loss only.")] = (
        None
    )
    mixing: Annotated[float | None, option("--mixing", group="Recipe", min=0, help="Epochs in which eps grows.")] = None
    kappa: Annotated[
        float | None, option("--kappa", group="Recipe", min=0, max=1, help="Natural loss's last weight.")
    ] = None
    beta: Annotated[float | None, option("--beta", group="Recipe", min=0, max=1, help="Relaxation against box.")] = None
    l1: Annotated[float | None, option("--l1", group="Recipe", min=0, help="Times the sum of |weights|.")] = None
    lr: Annotated[float | None, option("--lr", group="Recipe", min=0, help="First learning rate.")] = None
    batch: Annotated[int | None, option("--batch", group="Recipe", min=1, help="Images a step.")] = None
    subset: Subset = None
    no_clip: Annotated[
        bool, option("--no-clip", group="Recipe", help="Entries may leave [0, 1]: standardised data.")
    ] = False

    def given(self) -> dict[str, Any]:
        """Those that were given, numbers read."""
        found = {name: value for name, value in asdict(self).items() if value is not None and name != "no_clip"}
        found |= {"clipped": False} if self.no_clip else {}
        return found if self.eps is None else found | {"eps": parse_number("--eps", self.eps)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a run keeps, and where."""

    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", show_default="runs/RECIPE", help="Of the run.")
    ] = None
    resume: Annotated[bool, option("--resume", group="Output", help="Go on after the last stored step.")] = False
    checkpoint_every: Annotated[
        float, option("--checkpoint-every", group="Output", min=0, metavar="MINUTES", help="Of the state; 0, inf.")
    ] = 5.0
    keep_every: Annotated[
        int | None, option("--keep-every", group="Output", min=1, metavar="EPOCHS", help="Keep the network so often.")
    ] = None
    tensorboard: Annotated[bool, option("--tensorboard", group="Output", help="Metrics to DIR/tensorboard.")] = False
    callback: Annotated[
        str | None, option("--callback", group="Output", metavar="NAME", help="module:function of one: any logger.")
    ] = None

    def settings(self, first: bool) -> dict[str, Any]:
        """For `optrelax.training.train`; first: of the processes, which alone calls back."""
        callbacks = [_callback(self.callback)] if self.callback is not None and first else []
        kept = {name: value for name, value in asdict(self).items() if name not in ("out", "callback")}
        return kept | {"callbacks": callbacks}


@command(
    "train",
    common=("data_dir", "out", "budget", "epochs", "eps", "relaxation", "listed", "config", "resume"),
    examples=(
        "optrelax train digits-fc-small-box --out runs/box",
        "optrelax train mnist-fc-small-triangle --budget cpu --data-dir DATA",
        "optrelax train --config mine.toml --data FILE.npz --model mynets:build",
    ),
)
def train(
    *,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", rich_help_panel="Recipe", help="Its name; --list shows all.")
    ] = None,
    listed: Annotated[bool, option("--list", group="Recipe", help="Show those with RECIPE in their name.")] = False,
    config: Annotated[
        Path | None, option("--config", group="Recipe", metavar="FILE", help="TOML of recipe fields; --show prints it.")
    ] = None,
    shown: Annotated[bool, option("--show", group="Recipe", help="Print the recipe as such a file.")] = False,
    changes: Changes,
    settings: Annotated[
        list[str],
        option("--set", group="Recipe", metavar="NAME=VALUE", help="Any other field: weight_decay=1e-4."),
    ] = [],  # noqa: B006, typer only reads it
    data_dir: DataDir = None,
    kept: Kept,
    init: Annotated[
        Path | None, option("--init", group="Network", metavar="RUN", help="Begin at these weights.")
    ] = None,
    budget: Annotated[
        Literal["full", "cpu", "smoke"],
        option("--budget", group="Recipe", metavar="SIZE", help="full, cpu (half an hour), smoke."),
    ] = "full",
    pieces: Annotated[
        int | None,
        option("--pieces", group="Run", min=1, show_default="1 a process", help="Of each batch: less memory."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Train a network by a recipe, some of its numbers changed; or by a file of your own; or your network on your data.

    DIR keeps the configuration, a line of metrics an epoch, the state to resume from, and the network.
    Several processes: torchrun --no-python --nproc-per-node N optrelax train RECIPE.
    """
    from optrelax.training.processes import launched
    from optrelax.training.recipe_files import read_setting, recipe_text

    if listed:
        _show_recipes(json, recipe or "", budget)
        return
    further = dict(read_setting("--set", text) for text in settings)
    row = _row(recipe, config, budget, changes.given() | further)
    if shown:
        typer.echo(recipe_text(row), nl=False)
        return
    folder = Path("runs") / row.name if kept.out is None else kept.out
    with launched(read_device(device)) as processes:
        first = processes.rank == 0
        work = _RecipeRun(row, folder, data_dir, processes.count if pieces is None else pieces, seed, device, init)
        result, share = work.run(first=first, **kept.settings(first))
        if first:
            _show(row, folder, result, share, json)
            if budget == "smoke" and not json:
                stdout().print("A smoke run shows that training runs, not what it reaches.", highlight=False)


def _callback(name: str) -> Any:
    from optrelax.networks.checkpoint_files import own_object
    from optrelax.training.callbacks import Callback

    found = own_object("--callback", name)
    if not isinstance(found, Callback):
        raise ValueError(f"--callback: {name} must return an optrelax.training.Callback, got {type(found).__name__}")
    return found


def _row(name: str | None, config: Path | None, budget: str, changes: dict[str, Any]) -> Recipe:
    """The recipe that the options describe.  ValueError says what is missing or too much."""
    from dataclasses import replace

    from optrelax.training.recipe_files import read_recipe
    from optrelax.training.recipes import Recipe, recipe

    if name is not None and config is not None:
        raise ValueError(f"train: RECIPE or --config, not both; got {name} and {config}")
    where = {key: changes.pop(key) for key in ("model", "data") if key in changes}
    if config is not None:
        row = read_recipe(config)
    elif name is not None:
        row = recipe(name)
    elif len(where) == 2 and "eps" in changes:
        # Small data take small batches and more epochs: some two thousand steps, in which a network learns.
        batch, steps = _sizes(where["data"], changes.get("subset"), changes.get("batch"))
        epochs = max(30, -(-2000 // steps))
        ramp: dict[str, Any] = {"epochs": epochs, "warmup": epochs / 15, "mixing": epochs / 2, "batch": batch}
        row = Recipe(name="own", method="certified", relaxation="crown-ibp", eps=0, **ramp, **where)
    else:
        raise ValueError("train: name a recipe (--list shows them), or give --config, or --model, --data and --eps")
    if where:
        row = replace(row, name=f"{row.name}-own" if name is not None else row.name, **where)
    return row.within(budget).override(**changes)


def _sizes(data: str, subset: int | None, batch: int | None) -> tuple[int, int]:
    """Images a step, and steps an epoch, for data of the user's own."""
    count = subset or (len(read_data(data, None)[1]) if data.endswith(".npz") else 100_000)
    size = batch or min(100, max(8, count // 20))
    return size, -(-count // size)


@dataclass(frozen=True, slots=True)
class _RecipeRun:
    """One run by a recipe."""

    row: Recipe
    folder: Path
    data_dir: Path | None
    pieces: int
    seed: int
    device: str
    init: Path | None

    def run(self, first: bool = True, **how: Any) -> tuple[TrainingResult, float]:
        """The work itself, under a bar on the first process; a word about resuming after Ctrl-C.  how: for `train`.

        Returns the share of the most frequent label, too.
        """
        from optrelax.data.samples import gather
        from optrelax.output.tables import require_writable
        from optrelax.training.runs import start_from
        from optrelax.training.trainer import train as work

        row, where = self.row, read_device(self.device)
        data, net = self._inputs()
        net = net.to(where)
        require_writable(self.folder)
        facts = {"recipe": asdict(row), "seed": self.seed}
        facts |= {} if self.init is None else start_from(net, self.init)
        training = row.training(self.seed, self.pieces)
        bar = training_bar(row.name) if first else contextlib.nullcontext()
        try:
            with bar as watch:
                labels = gather(data).labels
                result = work(net, data, training, folder=self.folder, watch=watch, facts=facts, **how)
                return result, int(labels.bincount().max()) / len(labels)
        except KeyboardInterrupt:
            stderr().print("Interrupted; repeat the command with --resume.", markup=False, highlight=False)
            raise

    def _inputs(self) -> tuple[Any, nn.Module]:
        """The training examples and the untrained network; either may be the user's own."""
        import torch

        from optrelax.data.datasets import evenly_spaced, load_dataset
        from optrelax.networks.checkpoint_files import build_model

        row = self.row
        if not row.data.endswith(".npz") and ":" not in row.model:
            found = load_dataset(row.data, self.data_dir, "train")
            found = found if row.subset is None else found.subset(row.subset)
            return found, row.network(found, self.seed)
        x, labels, classes = read_data(row.data, self.data_dir, "train")
        if row.subset is not None:
            index = evenly_spaced(len(x), row.subset)
            x, labels = x[index], labels[index]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # the user's function draws from the global generator
            net = build_model(row.model, tuple(x.shape[1:]), classes)
        return (x.to(next(net.parameters()).dtype), labels), net


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


def _show(row: Recipe, folder: Path, result: TrainingResult, share: float, json: bool) -> None:
    """What came out.  share: of the most frequent class among the training images."""
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
    norm = "" if row.norm == "linf" else f" --norm {row.norm}"
    eps = row.eps if row.certified_eps is None else row.certified_eps
    # A file of one's own is what was trained on: what is certified there says little.
    data = "TEST.npz" if row.data.endswith(".npz") else row.data
    advice = f"optrelax certify {folder} --data {data} --eps {eps:g}{norm} --relaxation {name}"
    if last.natural_accuracy < share + 0.02:
        console.print(
            f"That is no better than the most frequent class alone ({100 * share:.2f} %): the network has not learnt "
            "yet. More --epochs, another --lr or a smaller --eps may help.",
            highlight=False,
            soft_wrap=True,
        )
    advice += "" if row.clipped else " --no-clip"
    console.print(f"Network in {folder}. To certify it: {advice}", markup=False, highlight=False, soft_wrap=True)
