"""Runs that are killed at any moment, within an epoch and within a write, end with the same weights, bit for bit."""

import dataclasses
import functools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import optrelax as ox
from optrelax.cli import main as main_command
from optrelax.data.splits import Dataset
from optrelax.layers import DualAscent, Triangle
from optrelax.output import files
from optrelax.training import EpochMetrics, Training, TrainingProgress, callbacks, meters, train
from optrelax.training import training_runs as training_module
from optrelax.training.losses import AdversarialLoss, CertifiedLoss
from optrelax.training.lp_losses import LPLoss
from optrelax.training.runs import RunFolder
from optrelax.training.schedules import LinearRamp, Stages, StepDecay

STEPS = 5  # an epoch


@functools.cache
def digits() -> Dataset:
    return ox.load_dataset("digits", split="train").subset(70)


def network() -> nn.Module:
    return ox.models.fc(64, 12, 8, 10, seed=1)


def settings(**changes: object) -> Training:
    """Everything that must come back: an order, ramps, random draws, Adam's moments, kept dual points, sums."""
    lps = LPLoss(layer=Triangle(solver=DualAscent(tol=1e-5, max_iterations=3)))
    chosen = {
        "loss": Stages((AdversarialLoss(steps=2), lps), (0.0, 1.0)),
        "epochs": 3,
        "eps": LinearRamp(0.0, 0.05, length=2.0),
        "kappa": LinearRamp(1.0, 0.3, length=2.0),
        "lr": StepDecay(1e-2, 0.1, at=(2.5,)),
        "batch": 14,
        "seed": 5,
    }
    return Training(**{**chosen, **changes})


def position(folder: Path) -> tuple[int, int]:
    """Finished epochs and steps of the next, as stored."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        place = json.loads(file.metadata()["optrelax-state"])
    return place["epochs"], place["steps"]


def result(folder: Path) -> tuple[dict[str, list], list[dict]]:
    """The weights, and every epoch's metrics but its seconds."""
    weights = {name: value.tolist() for name, value in load_file(folder / "net.safetensors").items()}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return weights, [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# --- kill -9 -------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(kind: str, count: int) -> Callable[[TrainingProgress], None]:
    """What `train` calls after every step, in a process that dies at the count-th moment of a kind."""
    left = [count]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    if kind == "step":
        return lambda progress: die() if now() else None
    write, replace, append = Path.write_bytes, Path.replace, RunFolder.append

    def half(path: Path, content: bytes) -> int:
        if path.name.startswith(".state") and now():
            write(path, content[: len(content) // 2])
            die()
        return write(path, content)

    def move(path: Path, target: Path) -> Path:
        moved = replace(path, target)
        if path.name.startswith(f".{kind}") and now():
            die()
        return moved

    def line(folder: RunFolder, metrics: dict) -> None:
        append(folder, metrics)
        if now():
            die()

    if kind == "half":
        Path.write_bytes = half
    elif kind == "line":
        RunFolder.append = line
    else:
        Path.replace = move
    return lambda progress: None


def run(folder: Path, kind: str, count: int) -> int:
    """Exit code of a process of its own that trains, or goes on with it."""
    child = os.fork()
    if child:
        if kind == "clock":
            time.sleep(count / 1000)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    watch = (lambda progress: time.sleep(0.01)) if kind in ("clock", "none") else dying_at(kind, count)
    train(network(), digits(), settings(), folder=folder, resume=True, checkpoint_every=0, watch=watch)
    os._exit(0)


MOMENTS = [  # a kind, how many of them, and what is stored then: finished epochs, steps of the next
    ("step", 3, (0, 3)),
    ("half", 4, (1, 1)),  # a state half written
    ("state", 2, (1, 3)),  # just written
    ("line", 1, (1, 4)),  # an epoch's metrics without its state
    ("state", 1, (2, 0)),  # its state without its network
    ("half", 3, (2, 2)),
    ("step", 1, (2, 3)),
    ("net", 1, (3, 0)),  # all there, not yet told
]


def main(folder: str) -> None:
    """Forks, so that everything is imported, and the data read, once; nothing here starts a thread before."""
    torch.set_num_threads(1)
    digits()
    torch.optim.Adam(network().parameters())  # its first one imports half of torch
    assert run(Path(folder, "whole"), "none", 0) == 0
    for kind, count, stored in MOMENTS:
        assert run(Path(folder, "cut"), kind, count) == -signal.SIGKILL, (kind, count)
        assert position(Path(folder, "cut")) == stored, (kind, count, position(Path(folder, "cut")))
    assert run(Path(folder, "cut"), "none", 0) == 0
    kills = 0
    while run(Path(folder, "clock"), "clock", 150 + 70 * kills) != 0:
        kills += 1
    assert kills > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(tmp_path):
    script = "import sys, test_interruptions; test_interruptions.main(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    whole = result(tmp_path / "whole")
    assert result(tmp_path / "cut") == result(tmp_path / "clock") == whole
    assert [line["unfinished"] is None for line in whole[1]] == [True, False, False]
    left = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert left == ["config.json", "metrics.jsonl", "net.safetensors", "state.safetensors"]


def kill_at_random(folder: str, runs: int, seed: int) -> int:
    """Runs killed at random moments until they are through, each to the same end; how many kills that took.

    By hand, for longer: `python -c "import test_interruptions as t; print(t.kill_at_random('DIR', 100, 0))"`.
    """
    torch.set_num_threads(1)
    digits()
    torch.optim.Adam(network().parameters())
    rng, kills, begin = random.Random(seed), 0, time.monotonic()
    assert run(Path(folder, "whole"), "none", 0) == 0
    longest = 1000 * (time.monotonic() - begin)
    for number in range(runs):
        for _ in range(3):
            kills += run(Path(folder, str(number)), "clock", int(rng.uniform(0, longest))) == -signal.SIGKILL
        assert run(Path(folder, str(number)), "none", 0) == 0
        assert result(Path(folder, str(number))) == result(Path(folder, "whole"))
    return kills


# --- two at once, and no room --------------------------------------------------------------------------------------


def test_a_second_trainer_is_told_who_trains(tmp_path):
    """Before it has touched anything; once the first is dead its folder is free."""
    script = (
        "import sys; from pathlib import Path; from optrelax.training.runs import RunFolder; "
        "lock = RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.readline()"
    )
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"run: in use by process {other.pid} on \S+ since"):
                train(network(), digits(), settings(), folder=folder, resume=resume)
        assert [path.name for path in folder.iterdir()] == [".run.lock"]
        other.kill()
    with pytest.raises(Stop):
        train(network(), digits(), settings(), folder=folder, watch=stop_at(1, 1))
    assert ".run.lock" not in [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("size", [100, 10_000], ids="{} bytes a file".format)
def test_a_run_that_found_no_room_goes_on_to_the_same_end(size, tmp_path):
    """No file may grow beyond a size: the configuration, or the state, does not fit."""
    short = {"epochs": 2, "loss": AdversarialLoss(steps=1)}
    whole = train(network(), digits(), settings(**short), folder=tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            train(network(), digits(), settings(**short), folder=tmp_path / "run", checkpoint_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    resumed = train(network(), digits(), settings(**short), folder=tmp_path / "run", resume=True, checkpoint_every=0)
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert len(resumed.history) == len(whole.history)


# --- when a state is stored ----------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(epoch: int, step: int) -> Callable[[TrainingProgress], None]:
    def watch(progress: TrainingProgress) -> None:
        if (progress.epoch, progress.step) == (epoch, step):
            raise Stop

    return watch


@pytest.mark.parametrize(
    ("every", "stored"),
    [(0.0, (1, 4)), (2.0, (1, 3)), (2.5, (1, 4)), (4.0, (1, 0)), (math.inf, (1, 0))],
)
def test_a_state_is_stored_when_its_time_has_come(tmp_path, monkeypatch, every, stored):
    """A minute a step; the time counts from the last state, that of an epoch's end too."""
    minutes = [0.0]
    stop = stop_at(2, 4)

    def watch(progress: TrainingProgress) -> None:
        minutes[0] += 1
        stop(progress)

    monkeypatch.setattr(training_module.time, "monotonic", lambda: 60 * minutes[0])
    with pytest.raises(Stop):
        train(network(), digits(), settings(), folder=tmp_path, checkpoint_every=every, watch=watch)
    assert position(tmp_path) == stored
    # The network is that of a whole epoch, and says so.
    assert ox.networks.checkpoints.read_extra(tmp_path)["epochs"] == 1


def test_a_full_disk_within_an_epoch_leaves_the_state_before(tmp_path, monkeypatch):
    write = Path.write_bytes
    count = [0]

    def full(path: Path, content: bytes) -> int:
        count[0] += path.name.startswith(".state")
        if count[0] == 9:
            write(path, content[:300])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        train(network(), digits(), settings(), folder=tmp_path / "cut", checkpoint_every=0)
    monkeypatch.setattr(Path, "write_bytes", write)
    assert position(tmp_path / "cut") == (1, 3)
    assert not list((tmp_path / "cut").glob(".state*"))
    train(network(), digits(), settings(), folder=tmp_path / "whole")
    train(network(), digits(), settings(), folder=tmp_path / "cut", resume=True)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_seconds_count_those_before_the_interruption(tmp_path, monkeypatch):
    now = [0.0]

    def watch(progress: TrainingProgress) -> None:
        now[0] += 1
        if (progress.step, now[0]) == (3, 3):
            raise Stop

    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    run = functools.partial(train, network(), digits(), settings(loss=CertifiedLoss("box"), epochs=1), folder=tmp_path)
    with pytest.raises(Stop):
        run(checkpoint_every=0, watch=watch)
    now[0] = 1000.0  # the state of step 3 was stored after two seconds, two steps are left
    assert run(resume=True, watch=watch).history[0].seconds == 4.0


def test_a_state_within_an_epoch_needs_its_sums(tmp_path):
    with pytest.raises(Stop):
        train(network(), digits(), settings(), folder=tmp_path, checkpoint_every=0, watch=stop_at(1, 2))
    tensors, metadata = files.read_tensors(tmp_path / "state.safetensors")
    del tensors["meter.sums"]
    files.write_tensors(tmp_path / "state.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=r"expected the state of this run, .*: no sums of the 2 steps of its epoch"):
        train(network(), digits(), settings(), folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"checkpoint_every": -1.0, "folder": "x"}, "checkpoint_every must be >= 0 minutes, got -1.0"),
        ({"checkpoint_every": math.nan, "folder": "x"}, "checkpoint_every must be >= 0 minutes, got nan"),
        ({"tensorboard": True}, "tensorboard needs the folder of the run"),
    ],
)
def test_bad_arguments_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        train(network(), digits(), settings(), **how)


# --- several processes ---------------------------------------------------------------------------------------------

PAIR = """
import sys
import torch.distributed as dist
from pathlib import Path
from test_interruptions import Stop, digits, network, pair, stop_at, train
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
try:
    train(network(), digits(), pair(), folder=folder / "two", checkpoint_every=0, watch=stop_at(2, 3))
except Stop:
    dist.barrier()
    train(network(), digits(), pair(), folder=folder / "two", resume=True)
dist.barrier()  # no process goes while another still speaks
dist.destroy_process_group()
"""


def pair() -> Training:
    return settings(loss=CertifiedLoss("crown-ibp"), epochs=2, pieces=2)


@pytest.mark.slow
def test_two_processes_go_on_within_an_epoch_too(tmp_path, one_thread):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "GLOO_SOCKET_IFNAME": "lo"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-W", "ignore", "-c", PAIR]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    train(network(), digits(), pair(), folder=tmp_path / "one")
    (two, lines), (one, expected) = result(tmp_path / "two"), result(tmp_path / "one")
    assert two == one
    # Means are added up in another order.
    for line, other in zip(lines, expected, strict=True):
        known = {name: value for name, value in other.items() if value is not None}
        assert {name: value for name, value in line.items() if value is not None} == pytest.approx(known, rel=1e-12)


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of an event file: epochs and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_what_the_metrics_say(tmp_path):
    """Also of epochs before an interruption, and of an epoch that came twice."""
    first = {"folder": tmp_path, "tensorboard": True, "checkpoint_every": 0}
    with pytest.raises(Stop):
        train(network(), digits(), settings(), **first, watch=stop_at(3, 2))
    history = train(network(), digits(), settings(), **first, resume=True).history
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    found = read_events(tmp_path / "tensorboard")
    assert set(found) == {field.name for field in dataclasses.fields(EpochMetrics)} - {"epoch"}
    for name, points in found.items():
        expected = [(m.epoch, getattr(m, name)) for m in history if getattr(m, name) is not None]
        assert [epoch for epoch, _ in points] == [epoch for epoch, _ in expected]
        assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert len(found["loss"]) == 3
    assert len(found["unfinished"]) == 2


def test_tensorboard_that_is_missing_is_named_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"tensorboard is not installed; pip install 'optrelax\[tensorboard\]'"):
        train(network(), digits(), settings(), folder=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


# --- callbacks -----------------------------------------------------------------------------------------------------


class Told(callbacks.Callback):
    """Notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_start(self, history):
        self.heard.append([m.epoch for m in history])

    def on_epoch(self, metrics, network):
        self.heard.append((metrics.epoch, type(network).__name__))

    def on_end(self):
        self.heard.append("end")


def test_callbacks_hear_of_start_epochs_and_end(tmp_path):
    """Also where a run breaks off; and Logged hands a logger what is a number, as Lightning's and W&B's take it."""
    first, second, lines = Told(), Told(), {}
    with pytest.raises(Stop):
        train(network(), digits(), settings(), folder=tmp_path, callbacks=[first], watch=stop_at(2, 1))
    assert first.heard == [[], (1, "Network"), "end"]
    logged = callbacks.Logged(lambda numbers, step: lines.update({step: numbers}))
    history = train(network(), digits(), settings(), folder=tmp_path, resume=True, callbacks=[second, logged]).history
    assert second.heard == [[1], (2, "Network"), (3, "Network"), "end"]
    assert list(lines) == [2, 3]
    known = {name: v for name, v in dataclasses.asdict(history[-1]).items() if v is not None and name != "epoch"}
    assert lines[3] == known


def test_the_command_takes_a_callback_of_ones_own(tmp_path, capsys, monkeypatch):
    (tmp_path / "mylog.py").write_text(
        "from optrelax.training import Logged\n"
        "def note(numbers, epoch):\n    with open('heard', 'a') as file:\n        file.write(f'{epoch} ')\n"
        "def build():\n    return Logged(note)\n"
        "def wrong():\n    return print\n"
    )
    monkeypatch.chdir(tmp_path)
    line = ["train", "digits-fc-small-box", "--epochs", "2", "--subset", "60", "--out", "run", "--json"]
    with pytest.raises(SystemExit) as caught:
        main_command([*line, "--callback", "mylog:build"])
    assert caught.value.code == 0
    assert (tmp_path / "heard").read_text() == "1 2 "
    with pytest.raises(SystemExit) as caught:
        main_command([*line, "--resume", "--callback", "mylog:wrong"])
    assert caught.value.code == 2
    assert "mylog:wrong must return an optrelax.training.Callback, got builtin" in capsys.readouterr().err


def test_the_command_passes_both_on(tmp_path, capsys):
    line = ["train", "digits-fc-small-box", "--epochs", "2", "--subset", "60", "--out", str(tmp_path), "--json"]
    with pytest.raises(SystemExit) as caught:
        main_command([*line, "--checkpoint-every", "0", "--tensorboard"])
    assert caught.value.code == 0
    assert len(read_events(tmp_path / "tensorboard")["loss"]) == 2
    with pytest.raises(SystemExit) as caught:
        main_command([*line, "--checkpoint-every", "-1"])
    assert caught.value.code == 2
    assert "--checkpoint-every" in capsys.readouterr().err
