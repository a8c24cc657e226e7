"""Sweeps: many training runs side by side, on this machine's cores or on a SLURM cluster, through submitit.

submitit, as every run is a process with a folder of its own that resumes: no scheduler of our own that must stay
reachable (Ray, Dask), nothing but files between the parts, and the same call starts local processes or SLURM jobs.
A run that is killed with its worker is submitted again and goes on after its last stored step.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optrelax.checks import require_choice, require_range
from optrelax.training.recipes import BUDGETS, Recipe, recipe

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Sweep", "SweepProgress", "SweepRun", "run_sweep", "sweep_table"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One training run of a sweep."""

    name: str
    row: Recipe
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Every combination of recipes, seeds and settings.

    settings: values of a recipe's settings by name, {"eps": (0.1, 0.3)}.  budget: one of `recipes.BUDGETS`.
    """

    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    budget: str = "full"

    def __post_init__(self) -> None:
        for name in ("recipes", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"Sweep: {name} must name at least one")
        if self.budget not in BUDGETS:
            raise ValueError(f"Sweep: budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        require_range("Sweep", ">= 0", seeds=min(self.seeds))
        if doubled := [run.name for run in self.runs() if [r.name for r in self.runs()].count(run.name) > 1]:
            raise ValueError(f"Sweep: {doubled[0]} comes twice")

    def runs(self) -> tuple[SweepRun, ...]:
        """The runs by name, seeds moving fastest.  ValueError for a recipe or setting that does not exist."""
        found = []
        for name, values in itertools.product(self.recipes, itertools.product(*self.settings.values())):
            changes = dict(zip(self.settings, values, strict=True))
            row = recipe(name, self.budget, **changes)
            parts = [f"{key}={_shown(value)}" for key, value in changes.items()]
            found += [SweepRun("-".join([name, *parts, f"seed={seed}"]), row, seed) for seed in self.seeds]
        return tuple(found)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Where a sweep stands."""

    done: int
    failed: int
    running: int
    total: int


def train_run(run: SweepRun, folder: str, data_dir: str | None, threads: int) -> dict[str, object]:
    """Train one run, or go on with it; the metrics of its last epoch and the seconds of all."""
    import torch

    from optrelax.data.datasets import load_dataset
    from optrelax.training.trainer import train

    torch.set_num_threads(threads)
    data = load_dataset(run.row.data, data_dir, "train")
    if run.row.subset is not None:
        data = data.subset(run.row.subset)
    net = run.row.network(data, run.seed)
    facts = {"recipe": asdict(run.row), "seed": run.seed}
    history = train(net, data, run.row.training(run.seed), folder=folder, resume=True, facts=facts).history
    return {**asdict(history[-1]), "seconds": sum(line.seconds for line in history)}


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    data_dir: Path | None = None,
    workers: int = 2,
    threads: int = 1,
    retries: int = 2,
    cluster: str = "local",
    options: Mapping[str, object] | None = None,
    watch: Callable[[SweepProgress], None] | None = None,
) -> pl.DataFrame:
    """Train every run in `folder`/NAME, at most `workers` at once; the table of `sweep_table`, also in sweep.csv.

    threads: of each run; the same number gives the same weights.  retries: how often a run is submitted again that
    was lost with its worker.  A run that fails by itself is reported, not repeated, and the others go on.
    Finished runs of an earlier call are not trained again.
    cluster: "local" or "slurm".  options: further parameters of submitit's executor, such as slurm_partition.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise RuntimeError("run_sweep: needs submitit; pip install 'optrelax[sweep]'") from None
    require_range("run_sweep", "at least 1", workers=workers, threads=threads)
    require_choice("run_sweep", "cluster", cluster, "local", "slurm")
    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
    executor.update_parameters(
        **({"timeout_min": 24 * 60, "cpus_per_task": threads, "name": "optrelax"} | dict(options or {}))
    )
    place = None if data_dir is None else str(data_dir)

    def submit(run: SweepRun) -> object:
        return executor.submit(train_run, run, str(folder / run.name), place, threads)

    results = _results(sweep.runs(), submit, workers, retries, watch)
    table = sweep_table(sweep.runs(), results)
    from optrelax.output.tables import write_frame

    write_frame(table, folder / "sweep.csv")
    return table


def _results(
    runs: tuple[SweepRun, ...],
    submit: Callable[[SweepRun], object],
    workers: int,
    retries: int,
    watch: Callable[[SweepProgress], None] | None,
) -> dict[str, dict[str, object]]:
    """Keep `workers` jobs going until all have ended: metrics, or {"error": ...}, by run."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    waiting, tries = list(runs), dict.fromkeys((run.name for run in runs), 0)
    active: dict[str, tuple[SweepRun, Any]] = {}
    results: dict[str, dict[str, object]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                run = waiting.pop(0)
                tries[run.name] += 1
                active[run.name] = (run, submit(run))
            for name, (run, job) in [item for item in active.items() if item[1][1].done()]:
                del active[name]
                try:
                    results[name] = job.result()
                except FailedJobError as error:  # the run itself raised
                    results[name] = {"error": _last_line(error)}
                except UncompletedJobError as error:  # its process was lost
                    _log.warning("%s was lost (%d of %d tries)", name, tries[name], retries + 1)
                    if tries[name] <= retries:
                        waiting.insert(0, run)
                    else:
                        results[name] = {"error": f"lost {tries[name]} times: {_last_line(error)}"}
            if watch is not None:
                failed = sum("error" in result for result in results.values())
                watch(SweepProgress(len(results) - failed, failed, len(active), len(runs)))
            if active:
                time.sleep(0.2)
    finally:
        # Ctrl-C, or an error of ours: no process may go on unseen.
        for _, job in active.values():
            job.cancel()
    return results


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return lines[-1] if lines else type(error).__name__


def sweep_table(runs: tuple[SweepRun, ...], results: Mapping[str, Mapping[str, Any]]) -> pl.DataFrame:
    """One row a run: recipe, seed, eps, and the last epoch's metrics, or its error."""
    import polars as pl

    rows = []
    for run in runs:
        found = results[run.name]
        robust, natural = found.get("robust_accuracy"), found.get("natural_accuracy")
        rows.append(
            {
                "run": run.name,
                "recipe": run.row.name,
                "seed": run.seed,
                "eps": run.row.eps,
                "epochs": found.get("epoch"),
                "loss": found.get("loss"),
                "accuracy %": None if natural is None else 100 * natural,
                "robust %": None if robust is None else 100 * robust,
                "seconds": found.get("seconds"),
                "error": found.get("error"),
            }
        )
    floats = ("loss", "accuracy %", "robust %", "seconds")
    types = dict.fromkeys(floats, pl.Float64) | {"epochs": pl.Int64, "error": pl.String}
    return pl.DataFrame(rows, schema_overrides=types)
