"""One training run by a recipe: which recipe the options describe, and the work."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optrelax.cli.application import stderr
from optrelax.cli.inputs import read_data, read_device
from optrelax.cli.progress_bars import training_bar

if TYPE_CHECKING:
    from torch import nn

    from optrelax.data.samples import Samples
    from optrelax.training.recipes import Recipe
    from optrelax.training.trainer import TrainingResult

__all__ = ["RecipeRun", "described_recipe"]


def described_recipe(name: str | None, config: Path | None, budget: str, changes: dict[str, Any]) -> Recipe:
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
class RecipeRun:
    """One run by a recipe."""

    row: Recipe
    folder: Path
    data_dir: Path | None
    pieces: int
    seed: int
    device: str
    init: Path | None

    def run(self, first: bool = True, **how: Any) -> tuple[TrainingResult, Samples]:
        """The work itself, under a bar on the first process; a word about resuming after Ctrl-C.  how: for `train`.

        Returns the training examples, too.
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
                given: dict[str, Any] = {"watch": watch, "before": watch, "facts": facts, **how}
                return work(net, data, training, folder=self.folder, **given), gather(data)
        except KeyboardInterrupt:
            stderr().print("Interrupted; repeat the command with --resume.", markup=False, highlight=False)
            raise

    def _inputs(self) -> tuple[Any, nn.Module]:
        """The training examples and the untrained network; either may be the user's own."""
        import torch

        from optrelax.data.datasets import load_dataset
        from optrelax.data.splits import evenly_spaced
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
