"""`optrelax train`: train a network by a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from optrelax.cli.application import command, say
from optrelax.cli.inputs import parse_number, read_device
from optrelax.cli.options import DataDir, Device, Json, Seed, Subset, option
from optrelax.cli.recipe_runs import RecipeRun, described_recipe
from optrelax.cli.training_tables import show_recipes, show_result

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

    settings: Annotated[
        list[str],
        option("--set", group="Recipe", metavar="NAME=VALUE", help="Any other field: weight_decay=1e-4."),
    ] = field(default_factory=list)

    def given(self) -> dict[str, object]:
        """Those that were given, numbers read."""
        from optrelax.training.recipe_files import read_setting

        found = {name: value for name, value in asdict(self).items() if value is not None}
        del found["no_clip"], found["settings"]
        found |= {"clipped": False} if self.no_clip else {}
        found |= {} if self.eps is None else {"eps": parse_number("--eps", self.eps)}
        return found | dict(read_setting("--set", text) for text in self.settings)


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

    def settings(self, first: bool) -> dict[str, object]:
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
    from optrelax.training.recipe_files import recipe_text

    if listed:
        show_recipes(json, recipe or "", budget)
        return
    row = described_recipe(recipe, config, budget, changes.given())
    if shown:
        typer.echo(recipe_text(row), nl=False)
        return
    folder = Path("runs") / row.name if kept.out is None else kept.out
    with launched(read_device(device)) as processes:
        first = processes.rank == 0
        work = RecipeRun(row, folder, data_dir, processes.count if pieces is None else pieces, seed, device, init)
        result, examples = work.run(first=first, **kept.settings(first))
        if first:
            show_result(row, folder, result, examples, json)
            if budget == "smoke" and not json:
                say("A smoke run shows that training runs, not what it reaches.")


def _callback(name: str) -> object:
    from optrelax.networks.checkpoint_files import own_object
    from optrelax.training.callbacks import Callback

    found = own_object("--callback", name)
    if not isinstance(found, Callback):
        raise ValueError(f"--callback: {name} must return an optrelax.training.Callback, got {type(found).__name__}")
    return found
