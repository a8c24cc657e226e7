"""Progress: a bar that keeps itself and the time left at any width; lines where output is no terminal."""

import io
import re

import pytest
from rich.console import Console

from optrelax.cli import progress_bars
from optrelax.training.meters import TrainingProgress


def progress(**changes) -> TrainingProgress:
    values = {
        "epoch": 3, "epochs": 100, "step": 7, "steps": 600, "loss": 1.234567, "natural_accuracy": 0.912,
        "robust_accuracy": 0.456, "eps": 0.0871, "unfinished": 0.25, "median_gap": 1e-3,
    }  # fmt: skip
    return TrainingProgress(**(values | changes))


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_bar_fits_and_keeps_bar_count_and_time(monkeypatch, width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system="standard", legacy_windows=False)
    monkeypatch.setattr(progress_bars, "stderr", lambda: console)
    with progress_bars.training_bar("mnist-fc-small-triangle") as watch:
        watch(progress())
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    frames = [line for line in plain.replace("\r", "\n").splitlines() if "1207/60000" in line]
    assert frames
    for line in frames:
        assert "━" in line
        assert "-:--" in line or ":" in line.split("1207/60000")[1]
        assert len(line.rstrip()) <= width
    assert ("median gap" in frames[-1]) == (width == 200)
    assert ("epoch 3/100" in frames[-1]) == (width >= 80)


def test_a_pipe_sees_a_line_an_epoch(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress_bars, "stderr", lambda: Console(file=out, width=200))
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: 0.0)
    with progress_bars.training_bar("mnist") as watch:
        for step in range(1, 601):
            watch(progress(step=step))
    (line,) = out.getvalue().splitlines()
    assert line.startswith("mnist: 1800/60000, epoch 3/100, eps 0.0871, loss 1.235, accuracy 91.2 %, robust 45.6 %")


def test_a_pipe_is_told_before_the_first_step_how_long_training_takes(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress_bars, "stderr", lambda: Console(file=out, width=200))
    for seconds in (7.0, None, 9000.0):
        with progress_bars.training_bar("mnist") as watch:
            watch(progress(epoch=1, step=0, loss=0.0, expected=seconds))
    assert out.getvalue().splitlines() == ["mnist: 0/60000, takes about 2 h, by a few examples"]


def test_a_pipe_sees_a_line_a_hundred_examples(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress_bars, "stderr", lambda: Console(file=out, width=200))
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: 0.0)
    with progress_bars._bar("certify") as draw:
        for done in range(1, 251):
            draw(done, 250, [f"{done} certified"])
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [
        "certify: 100/250",
        "certify: 200/250",
        "certify: 250/250",
    ]


def test_a_pipe_is_told_early_how_long_it_takes(monkeypatch):
    out, now = io.StringIO(), iter([0.0, 0.0, 4.0, 4.0, *[8.0] * 2, *[12.0] * 2])
    monkeypatch.setattr(progress_bars, "stderr", lambda: Console(file=out, width=200))
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: next(now))
    with progress_bars._bar("certify") as draw:
        for done in (50, 60, 100, 250):  # 50 of them from a journal
            draw(done, 250, [])
    assert out.getvalue().splitlines() == [
        "certify: 60/250, 4 s, about 76 s left",
        "certify: 100/250, 8 s, about 24 s left",
        "certify: 250/250, 12 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(11, "11 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2 h")]
)
def test_durations_have_units_to_match(seconds, text):
    assert progress_bars._duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_long_work_is_announced_before_its_first_batch(monkeypatch, terminal):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal)
    monkeypatch.setattr(progress_bars, "stderr", lambda: console)
    for expected in (None, 9.0, 600.0):
        with progress_bars._bar("certify") as draw:
            draw(0, 250, [], expected=expected)
    if terminal:
        assert out.getvalue().count("about 10 min") >= 1
        assert "about 9 s" not in out.getvalue()
    else:
        assert out.getvalue().splitlines() == ["certify: 0/250, takes about 10 min, by a few examples"]
