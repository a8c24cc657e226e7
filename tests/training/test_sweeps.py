"""Sweeps: every combination once, side by side; a lost worker's run goes on where it stopped."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import ClassVar

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from optrelax.cli import main
from optrelax.training import sweeps
from optrelax.training.recipes import recipe
from optrelax.training.sweeps import Sweep, SweepProgress, SweepRun, run_sweep

SMALL = {"epochs": (2,), "subset": (60,), "mixing": (1.0,), "warmup": (0.0,)}


def small(*recipes: str, **changes: object) -> Sweep:
    return Sweep(**{"recipes": recipes, "settings": SMALL, **changes})


def test_runs_are_all_combinations():
    made = Sweep(
        recipes=("mnist-fc-box", "mnist-conv-crown"), seeds=(1, 2), settings={"eps": (0.1, 0.3)}, budget="cpu"
    ).runs()
    assert len(made) == len({run.name for run in made}) == 8
    assert made[1].name == "mnist-fc-box-eps=0.1-seed=2"
    assert {(run.row.name, run.row.eps, run.seed) for run in made} == {
        (name, eps, seed) for name in ("mnist-fc-box", "mnist-conv-crown") for eps in (0.1, 0.3) for seed in (1, 2)
    }
    assert made[0].row.epochs == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": ()}, "recipes must name at least one"),
        ({"recipes": ("digits-fc-small-bx",)}, "did you mean"),
        ({"seeds": (-1,)}, "seeds must be >= 0"),
        ({"seeds": (1, 1)}, "comes twice"),
        ({"budget": "tiny"}, "budget must be one of"),
        ({"settings": {"epoch": (1,)}}, "did you mean 'epochs'"),
    ],
)
def test_bad_sweeps_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**{"recipes": ("digits-fc-small-box",), **changes})


class Job:
    """A job that ends at once, as told."""

    cancelled: ClassVar[list[str]] = []

    def __init__(self, name: str, outcome: object) -> None:
        self.name, self.outcome = name, outcome

    def done(self) -> bool:
        return self.outcome != "never"

    def result(self) -> dict:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return {"epoch": 1, "seconds": 0.0}

    def cancel(self) -> None:
        self.cancelled.append(self.name)


def outcomes(told: dict[str, list], retries: int = 1, watch=None) -> dict:
    runs = tuple(SweepRun(name, recipe("digits-fc-small-box"), 0) for name in told)
    return sweeps._results(runs, lambda run: Job(run.name, told[run.name].pop(0)), 2, retries, watch)


def test_lost_runs_are_repeated_and_failed_ones_are_not():
    from submitit.core.utils import FailedJobError, UncompletedJobError

    seen: list[SweepProgress] = []
    lost, failed = UncompletedJobError("no output"), FailedJobError("Traceback\nValueError: bad")
    found = outcomes({"a": [lost, None], "b": [failed], "c": [lost, lost], "d": [None]}, watch=seen.append)
    assert found["a"] == found["d"] == {"epoch": 1, "seconds": 0.0}
    assert found["b"] == {"error": "ValueError: bad"}
    assert found["c"] == {"error": "lost 2 times: no output"}
    assert max(progress.running for progress in seen) <= 2
    assert (seen[-1].done, seen[-1].failed, seen[-1].total) == (2, 2, 4)


def test_an_interruption_cancels_what_runs():
    Job.cancelled.clear()

    def stop(progress: SweepProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcomes({"a": ["never"], "b": ["never"], "c": ["never"]}, watch=stop)
    assert sorted(Job.cancelled) == ["a", "b"]


def test_a_sweep_needs_workers(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_sweep(small("digits-fc-small-box"), tmp_path, workers=0)
    with pytest.raises(ValueError, match="cluster must be 'local' or 'slurm', got 'cloud'"):
        run_sweep(small("digits-fc-small-box"), tmp_path, cluster="cloud")


def kill_once(folder: Path, killed: list[int]) -> None:
    """Kill the worker of the first run as soon as it has finished an epoch: children of the job's own process."""
    jobs, deadline = folder.parent / "jobs", time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        if (folder / "state.safetensors").exists():
            job = min(int(path.name.split("_")[0]) for path in jobs.glob("*_submitted.pkl"))
            for child in Path(f"/proc/{job}/task/{job}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
                killed.append(int(child))
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # submitit leaves the killed process to the system
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_local_workers_of_which_one_is_lost(tmp_path):
    """The run that is killed with its worker ends with the weights of one that is not."""
    sweep = small("digits-fc-small-box", seeds=(0, 1), settings=SMALL | {"epochs": (15,)})
    killed: list[int] = []
    name = sweep.runs()[0].name
    killer = threading.Thread(target=kill_once, args=(tmp_path / "cut" / name, killed))
    killer.start()
    table = run_sweep(sweep, tmp_path / "cut", workers=2)
    killer.join()
    assert len(killed) == 1
    assert table["error"].to_list() == [None, None]
    assert table["epochs"].to_list() == [15, 15]
    assert pl.read_csv(tmp_path / "cut" / "sweep.csv").height == 2
    assert len(list((tmp_path / "cut" / "jobs").glob("*_submitted.pkl"))) == 3
    for run in sweep.runs():
        sweeps.train_run(run, str(tmp_path / "whole" / run.name), None, torch.get_num_threads())
        one, other = (load_file(tmp_path / kind / run.name / "net.safetensors") for kind in ("cut", "whole"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())


# --- the command ---------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code


def test_the_command_reads_settings(monkeypatch, tmp_path, capsys):
    asked: list[Sweep] = []

    def answer(sweep: Sweep, folder: Path, **rest: object) -> pl.DataFrame:
        asked.append(sweep)
        results = {run.name: {"epoch": 3, "loss": 0.5, "natural_accuracy": 0.75} for run in sweep.runs()}
        if sweep.seeds == (9,):
            results = {name: {"error": "ValueError: bad"} for name in results}
        return sweeps.sweep_table(sweep.runs(), results)

    monkeypatch.setattr(sweeps, "run_sweep", answer)
    line = ["sweep", "mnist-fc-box", "mnist-fc-crown", "--budget", "smoke", "--out", str(tmp_path)]
    assert command(*line, "--seeds", "1", "2", "--settings", "eps=8/255,0.3", "relaxation=box,crown", "--json") == 0
    assert asked[0].seeds == (1, 2)
    assert asked[0].settings == {"eps": (8 / 255, 0.3), "relaxation": ("box", "crown")}
    assert len(json.loads(capsys.readouterr().out)) == 16
    assert command(*line) == 0
    shown = capsys.readouterr().out
    assert "75.00" in shown
    assert "error" not in shown
    assert command(*line, "--seeds", "9") == 1
    assert "2 of 2 runs failed" in capsys.readouterr().err
    assert command(*line, "--settings", "eps") == 2
    assert "must be NAME=VALUE" in capsys.readouterr().err
