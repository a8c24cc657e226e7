"""Series over checkpoints: each number is the single measurement's, found again from a journal, for equal examples."""

import json
import math
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.cli import main
from optrelax.measurements.series_files import series_paths
from optrelax.measurements.stages import MeasurementProgress
from optrelax.output import json_lines
from optrelax.training import Training, train
from optrelax.training.losses import CertifiedLoss
from optrelax.training.schedules import ConstantSchedule

TINY = {"lines": 1, "examples": 1, "cells": 2, "subset": 3, "points": 2, "resolution": 0.02}
NAMES = ["box", "hbox"]


def data() -> tuple[Tensor, Tensor]:
    return torch.rand(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three epochs; the networks of the second and of the last one can be had."""
    folder = tmp_path_factory.mktemp("run")
    training = Training(
        loss=CertifiedLoss("box", kappa=0.5), epochs=3, eps=ConstantSchedule(0.05), lr=ConstantSchedule(1e-2), batch=4
    )
    train(ox.models.fc(4, 6, 3, seed=0), data(), training, folder=folder, keep_every=2)
    return folder


# --- the numbers ---------------------------------------------------------------------------------------------------


def one(bias: float, weight: float = 1.0) -> nn.Sequential:
    """Margin relu(x + bias) of the first class."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(bias)
        net[2].weight.copy_(torch.tensor([[weight], [0.0]]))
        net[2].bias.zero_()
    return net


def test_a_jump_known_by_hand_lies_between_the_checkpoints_that_it_lies_between():
    """x in [0.5, 1.5]: z = x + b has |l| = |u| at b = -1, where CROWN's lower bound falls from 0 to min z = -1/2.

    Three checkpoints at b = -1.5, -0.8, -0.2: the first chord of length 0.7 meets it; on the second l = 0 at b = -0.5,
    where nothing jumps.
    """
    networks = {2: one(-1.5), 4: one(-0.8), 7: one(-0.2)}
    x = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    options = {"direction": "next", "clip": None, "examples": 1, "subset": 1, "cells": 5, "tightness": False}
    table = ox.measure_series(networks, x, 0.5, ["box", "crown"], **options).table
    rows = {(row["epoch"], row["relaxation"]): row for row in table.iter_rows(named=True)}
    assert list(rows) == [(epoch, name) for epoch in (2, 4, 7) for name in ("box", "crown")]
    crown, size = rows[2, "crown"], math.sqrt(1.5**2 + 2)
    assert (crown["bound jumps"], crown["loss jumps"]) == (1, 1)
    assert crown["length"] == pytest.approx(0.7 / size)
    assert crown["bound / unit"] == crown["loss / unit"] == pytest.approx(size / 0.7)
    assert crown["largest bound"] == crown["mean bound"] == pytest.approx(0.5, abs=1e-9)
    assert crown["largest loss"] == pytest.approx(math.log1p(math.exp(0.5)) - math.log(2), abs=1e-9)
    # Down to b = -0.8 the loss first rises by the jump, then falls as z's least value rises from -0.5 to -0.3.
    fall = math.log1p(math.exp(0.5)) - math.log1p(math.exp(0.3))
    assert crown["travel"] == pytest.approx(crown["largest loss"] / (crown["largest loss"] + fall), abs=1e-6)
    for key in ((2, "box"), (4, "box"), (4, "crown")):
        assert (rows[key]["bound jumps"], rows[key]["largest loss"], rows[key]["travel"]) == (0, 0, 0)
    for name in ("box", "crown"):
        assert rows[7, name]["bound jumps"] is None
        assert rows[7, name]["area"] is None
        # The margin lies in [0, 0.7] at b = -0.8, and in [0.3, 1.3] at b = -0.2.
        assert (rows[4, name]["certified"], rows[7, name]["certified"]) == (0, 1)
    # The loss at the checkpoints themselves: box's lower bound is relu(l) = 0, CROWN's is z's least value at b = -0.8.
    assert rows[4, "box"]["loss"] == pytest.approx(math.log(2))
    assert rows[4, "crown"]["loss"] == pytest.approx(math.log1p(math.exp(0.3)))


@pytest.fixture(scope="module")
def series(run, tmp_path_factory) -> tuple[ox.Series, Path]:
    journal = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    return ox.measure_series(run, data(), 0.05, NAMES, journal=journal, **TINY), journal


def test_every_number_is_the_single_measurements(run, series):
    rows = series[0].table.to_dicts()
    assert [(row["epoch"], row["relaxation"]) for row in rows] == [(e, n) for e in (2, 3) for n in NAMES]
    net = ox.load(run / "epoch-0002.safetensors")
    line = {"lines": 1, "examples": 1, "cells": 2}
    jumps = ox.measure_continuity(net, data(), 0.05, NAMES, direction="random", **line).table.to_dicts()
    steps = ox.measure_sensitivity(net, data(), 0.05, NAMES, steps=[1e-2], draws=1, examples=3).table
    tightness = ox.measure_tightness(net, data(), NAMES, subset=3, points=2, resolution=0.02, at=0.05).table
    areas = dict(tightness.select("relaxation", "area").iter_rows())
    for row, single in zip(rows[:2], jumps, strict=True):
        name = row["relaxation"]
        for column in ("length", "bound / unit", "loss / unit", "largest bound", "largest loss", "travel"):
            assert row[column] == single[column]
        (down,) = steps.filter((pl.col("relaxation") == name) & (pl.col("kind") == "gradient step")).to_dicts()
        assert (row["loss"], row["predicted"], row["agreement"]) == tuple(
            down[column] for column in ("loss", "predicted", "agreement")
        )
        assert row["area"] == areas[name]
        report = ox.certify(net, data(), 0.05, relaxation=name, attack=None, subset=3)
        assert (row["accuracy"], row["certified"]) == (report.accuracy, report.certified)


def test_an_estimate_is_measured_and_certifies_nothing(run):
    table = ox.measure_series(run, data(), 0.05, "cauchy:k=3", **TINY).table
    rows = table.filter(pl.col("relaxation") == "cauchy:k=3")
    assert rows["certified"].null_count() == rows["area"].null_count() == 2
    assert rows["loss"].null_count() == rows["bound jumps"].null_count() == 0


# --- journals ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_an_interrupted_series_goes_on(run, series, tmp_path, monkeypatch):
    from optrelax.measurements import series_runs as module

    journal = tmp_path / "journal.jsonl"

    def stop(progress: MeasurementProgress) -> None:
        if progress.done == 5:
            raise Stop

    with pytest.raises(Stop):
        ox.measure_series(run, data(), 0.05, NAMES, journal=journal, progress=stop, **TINY)
    assert len(journal.read_text().splitlines()) == 6
    with journal.open("a") as file:
        file.write('{"key": {"measu')  # killed in the middle of a line
    counted: list[str] = []
    for name in ("measure_continuity", "measure_sensitivity", "measure_tightness", "certify"):
        real = getattr(module, name)

        def count(*arguments, real=real, name=name, **options):
            counted.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, count)
    again = ox.measure_series(run, data(), 0.05, NAMES, journal=journal, **TINY)
    assert again.table.equals(series[0].table)
    assert len(counted) == 2 * 7 - 5
    counted.clear()
    # One relaxation more: what is its own, and tightness, which all share.
    ox.measure_series(run, data(), 0.05, [*NAMES, "deepz"], journal=journal, **TINY)
    assert sorted(counted) == 2 * ["certify"] + 2 * ["measure_continuity"] + 2 * ["measure_sensitivity"] + (
        2 * ["measure_tightness"]
    )


def test_another_series_is_not_continued(run, series, tmp_path):
    with pytest.raises(ValueError, match=r"journal of another series \(eps was 0.05, is 0.1; lines was 1, is 2\)"):
        ox.measure_series(run, data(), 0.1, NAMES, journal=series[1], **{**TINY, "lines": 2})
    x, labels = data()
    with pytest.raises(ValueError, match="data was "):
        ox.measure_series(run, (x, labels.flip(0)), 0.05, NAMES, journal=series[1], **TINY)
    foreign = tmp_path / "journal.jsonl"
    foreign.write_text('{"format": "something else"}\n')
    with pytest.raises(ValueError, match="is no journal of a series"):
        ox.measure_series(run, data(), 0.05, NAMES, journal=foreign, **TINY)
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(series[1].read_bytes().splitlines(keepends=True)[0] + json_lines._line({"key": 3}))
    with pytest.raises(ValueError, match="line 2 is no measurement"):
        ox.measure_series(run, data(), 0.05, NAMES, journal=damaged, **TINY)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_which_checkpoints_of_which_epochs(run, tmp_path):
    assert {epoch: path.name for epoch, path in series_paths(run).items()} == {
        2: "epoch-0002.safetensors",
        3: "net.safetensors",
    }
    kept = [run, run / "epoch-0002.safetensors"]
    assert series_paths(kept) == {2: kept[1], 3: kept[0]}
    assert series_paths([run, run / "net.safetensors"]) == {1: run, 2: run / "net.safetensors"}  # one epoch twice
    plain = tmp_path / "plain.safetensors"
    ox.save(ox.models.fc(4, 6, 3, seed=1), plain)
    assert series_paths([plain, run]) == {1: plain, 2: run}
    with pytest.raises(FileNotFoundError, match="nowhere: no such file; expected a checkpoint"):
        series_paths([run, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="keeps no network of single epochs; train with --keep-every"):
        series_paths(tmp_path)


BAD = {
    "step": ({"step": 0.0}, "measure_series: step must be positive"),
    "subset": ({"subset": 0}, "measure_series: subset must be positive"),
    "lines": ({"lines": 13}, "measure_series: wants 13 examples, the data has 12"),
    "eps": ({"eps": -1.0}, "measure_series: eps must be"),
    "relaxation": ({"relaxations": "bx"}, "bx"),
    "none": ({"checkpoints": {}}, "measure_series: give at least one checkpoint"),
    "empty": ({"checkpoints": []}, "measure_series: give at least one checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, run):
    changes, message = BAD[case]
    arguments = {"checkpoints": run, "data": data(), "eps": 0.05, "relaxations": NAMES, **TINY, **changes}
    with pytest.raises(ValueError, match=message):
        ox.measure_series(**arguments)


# --- picture and command -------------------------------------------------------------------------------------------


def test_the_figure_shows_what_was_measured(series):
    figure = series[0].figure("title")
    headings = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(headings) == 9
    by_heading = dict(zip(headings, figure.axes, strict=True))
    loss = by_heading["certified loss"]
    table = series[0].table
    for line, name in zip(loss.lines, NAMES, strict=True):
        ours = table.filter(pl.col("relaxation") == name)
        assert list(line.get_xdata()) == ours["epoch"].to_list()
        assert list(line.get_ydata()) == ours["loss"].to_list()
    without = ox.Series(table.with_columns(area=pl.lit(None, pl.Float64)), {})
    assert len(without.figure().axes) == 8


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["measure", "series", *words])
    return int(done.value.code or 0)


def test_the_command(tmp_path, capsys):
    for i in range(2):
        ox.save(ox.models.fc(64, 10, 10, seed=i).eval(), tmp_path / f"{i}.safetensors", input_shape=(1, 8, 8))
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    words = ["--data", "digits", "--eps", "0.05", "--lines", "1", "--examples", "1", "--cells", "2", "--subset", "2"]
    words += ["--no-tightness", "--relaxations", "box", "hbox"]
    out = tmp_path / "out"
    assert command(*files, *words, "--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["epoch"] for row in found["table"]] == [1, 1, 2, 2]
    assert found["checkpoints"] == {"1": files[0], "2": files[1]}
    assert sorted(path.name for path in out.iterdir()) == [
        "journal.jsonl",
        "series.png",
        "series.svg",
        "summary.json",
        "table.csv",
    ]
    # Again: from the journal, as a table.
    lines = (out / "journal.jsonl").read_text()
    assert command(*files, *words, "--out", str(out)) == 0
    assert "predicted" in capsys.readouterr().out
    assert (out / "journal.jsonl").read_text() == lines
    for bad in (["--direction", "up"], ["--step", "-1"], ["--out", str(out), "--seed", "1"], ["--eps", "x"]):
        assert command(*files, *words, *bad) == 2
    assert command(files[0], "missing.safetensors", *words) == 2
    assert command(str(tmp_path), *words) == 2
