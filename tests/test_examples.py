"""Every example runs, in a process of its own, and says what it should."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import optrelax as ox

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(output: str) -> dict[str, list[float]]:
    """The numbers of each row of a printed table by relaxation, NaN where there is none."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line[:1] == "│"]
    return {name: [math.nan if cell == "-" else float(cell) for cell in rest] for name, *rest in cells}


def found(pattern: str, output: str) -> float:
    """The number that the pattern's group stands for."""
    return float(re.search(pattern, output)[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A network that is at least right at times, without training: the nearest mean."""
    images, labels = ox.load_dataset("digits", split="train")[:]
    means = torch.stack([images[labels == digit].mean(0).flatten() for digit in range(10)])
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(64))  # pixels are not negative
        net[3].weight.copy_(means)
        net[3].bias.copy_(-0.5 * means.square().sum(1))
    path = tmp_path_factory.mktemp("net") / "means.safetensors"
    ox.save(net, path, input_shape=(1, 8, 8))
    return str(path)


@pytest.mark.slow
def test_compare_lp_closed_form(tmp_path):
    picture = tmp_path / "tightness.png"
    arguments = ["--epochs", "5", "--subset", "6", "--eps", "0.03", "--out", str(picture)]
    output = run("compare_lp_closed_form.py", *arguments)
    table = rows(output)
    equal = "triangle:preactivation=crown"
    assert list(table) == ["box", "crown-ibp", "fast-lin", "crown", equal, "alpha-crown", "layerwise", "milp"]
    certified, mean, worst, milliseconds, *gaps = zip(*table.values(), strict=True)
    place = {name: i for i, name in enumerate(table)}
    # On equal bounds of the hidden neurons the LP is at least as tight; the shown digits are rounded.
    for loose, tight in (("box", "crown"), ("crown", equal), (equal, "layerwise"), ("layerwise", "milp")):
        for column in (certified, mean, worst):
            assert column[place[loose]] <= column[place[tight]] + 1e-3
    assert mean[place["crown"]] < mean[place[equal]]
    assert mean[place["layerwise"]] < mean[place["milp"]] - 0.01
    assert found(r"accuracy ([\d.]+) %", output) >= certified[place["milp"]] > 50
    assert all(time > 0 for time in milliseconds)
    for column in gaps:
        assert [name for name in table if not math.isnan(column[place[name]])] == [equal, "layerwise", "milp"]
    median, most, closed = zip(*(table[name][4:] for name in (equal, "layerwise", "milp")), strict=True)
    assert 0 <= max(median) < 1e-3
    assert max(most) < 1e-1
    assert closed[2] == 100
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert str(picture) in output


def test_compare_lp_closed_form_takes_a_network(checkpoint, tmp_path):
    picture = tmp_path / "plots" / "tightness.png"
    arguments = ["--subset", "9", "--relaxations", "box", "triangle", "--milp-seconds", "0", "--out", str(picture)]
    output = run("compare_lp_closed_form.py", checkpoint, *arguments, "--eps", "0.02")
    expected = ox.compare(ox.load(checkpoint), ox.load_dataset("digits"), 0.02, ["box", "triangle"], subset=9)
    assert [values[1] for values in rows(output).values()] == pytest.approx(expected.table["mean bound"], abs=1e-4)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_train_triangle():
    output = run("train_triangle.py", "--epochs", "6", "--eps", "0.05", "--subset", "90")
    table = rows(output)
    certified = {name: values[0] for name, values in table.items()}
    mean = {name: values[2] for name, values in table.items()}
    equal = "triangle:preactivation=crown"
    assert list(table) == ["box", "crown-ibp", "deepz", "crown", equal]
    assert certified["crown"] <= certified[equal] <= found(r"\(PGD\) ([\d.]+) %", output)
    assert mean["box"] < mean["crown-ibp"] < mean["crown"] < mean[equal]
    # The loss is what makes it certifiable: of a network trained without it nothing like this is.
    assert 60 < certified[equal] <= found(r"accuracy ([\d.]+) %, certified [\d.]+ %, att", output)
    assert found(r"training took (\d+) s", output) < 60
    few, many = (
        [float(number) for number in match]
        for match in re.findall(r"gap (\S+), largest (\S+), (\d+) of 810 LPs unfinished", output)
    )
    assert 0 <= few[0] < 1e-3
    assert many[0] <= few[0]
    assert many[1] < few[1] < 1
    assert many[2] < few[2] < 810


@pytest.mark.slow
def test_train_compare(tmp_path):
    """Numbers in their order; what a first call has finished, a second one takes as it is."""
    small = ["--epochs", "6", "--subset", "150", "--eps", "0.005", "--certify-subset", "8", "--milp-seconds", "0.1"]
    small += ["--seeds", "3", "4", "--out", str(tmp_path)]
    run("train_compare.py", "--relaxations", "box", *small)
    first = pl.read_csv(tmp_path / "table.csv")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/state.safetensors")}
    output = run("train_compare.py", "--relaxations", "box", "layerwise", *small)
    frame = pl.read_csv(tmp_path / "table.csv")
    assert frame["training"].to_list() == ["box", "box", "layerwise", "layerwise"]
    assert frame["seed"].to_list() == [3, 4, 3, 4]
    assert frame.head(2).drop("peak MiB").equals(first.drop("peak MiB"))
    assert len(stamps) == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    ordered = ["own %", "best %", "MILP, at least %", "attacks, at most %", "accuracy %"]
    for row in frame.iter_rows(named=True):
        assert [row[name] for name in ordered] == pytest.approx(sorted(row[name] for name in ordered))
        assert min(row["s an epoch"], row["s a late epoch"]) > 0
        assert row["of images"] == 8
        assert 50 < row["peak MiB"] < 4096
    assert frame["best %"].min() > 0
    # The last epoch was one of LP-ALL.
    assert json.loads((tmp_path / "layerwise-seed=3" / "metrics.jsonl").read_text().splitlines()[-1])["unfinished"] >= 0
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["rows"] == frame.to_dicts()
    assert (stored["seeds"], stored["versions"]["torch"]) == ([3, 4], torch.__version__)
    assert "--relaxations box layerwise" in stored["command"]
    text = (tmp_path / "table.md").read_text()
    assert text.count("| layerwise ") == 3  # two runs, and their means
    assert stored["command"] in text
    assert str(tmp_path) in output


@pytest.mark.slow
def test_train_compare_goes_on_from_trained_networks(tmp_path):
    """A convolution by methods of any kind; fine-tuning begins at the weights of the row's seed, at the full eps."""
    same = ["--network", "conv", "--epochs", "2", "--subset", "100", "--eps", "0.01", "--certify-subset", "12"]
    same += ["--milp-seconds", "0.1", "--milp-subset", "5", "--certify-relaxations", "box", "crown-ibp", "--seeds", "3"]
    first, second = tmp_path / "first", tmp_path / "second"
    run("train_compare.py", "--methods", "crown", "mtl-ibp", *same, "--settings", "kappa=0.4", "--out", str(first))
    frame = pl.read_csv(first / "table.csv")
    assert frame["training"].to_list() == ["crown", "mtl-ibp"]
    assert frame["of images"].to_list() == [5, 5]
    configuration = json.loads((first / "mtl-ibp-seed=3" / "config.json").read_text())["configuration"]
    assert (configuration["recipe"]["model"], configuration["recipe"]["kappa"]) == ("conv", 0.4)
    assert (first / "crown-seed=3" / "verdicts-12-box+crown-ibp+crown.jsonl").exists()
    assert (first / "mtl-ibp-seed=3" / "verdicts-12-box+crown-ibp.jsonl").exists()

    init = str(first / "crown-seed={seed}")
    run(
        "train_compare.py",
        "--methods",
        "crown-rgs",
        *same,
        "--init",
        init,
        "--settings",
        "lr=0.0",
        "--out",
        str(second),
    )
    tuned = json.loads((second / "crown-rgs-seed=3" / "config.json").read_text())["configuration"]
    assert tuned["start"]["network"] == init.format(seed=3)
    assert (tuned["recipe"]["warmup"], tuned["recipe"]["mixing"], tuned["recipe"]["smoothing"]) == (0.0, 0.0, "rgs")
    # At a rate of 0 the weights are those that it began with.
    before, after = (
        load_file(path / "net.safetensors") for path in (first / "crown-seed=3", second / "crown-rgs-seed=3")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines = [json.loads(line) for line in (second / "crown-rgs-seed=3" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eps"] for line in lines] == [0.01, 0.01]


@pytest.mark.slow
def test_train_triangle_mnist(tmp_path):
    small = ["--data", "digits", "--epochs", "5", "--subset", "200", "--eps", "0.02", "--certify-subset", "24"]
    small += ["--iterations", "6", "--out", str(tmp_path)]
    output = run("train_triangle_mnist.py", *small)
    lines = re.findall(r"^epoch .*", output, re.M)
    assert len(lines) == 20
    assert "LPs" not in lines[0]  # warm-up
    assert 0 <= found(r"; ([\d.]+) % of the LPs fell back, median relative gap \S+$", lines[-1]) < 100
    assert found(r"in it .* median relative gap (\S+)", output) < 0.1
    certified = {name: values[0] for name, values in rows(output).items()}
    assert list(certified) == ["crown", "triangle"]
    assert 30 < max(certified.values()) <= found(r"examples, .* accuracy ([\d.]+) %, certified", output)
    # The same call again trains and certifies nothing anew.
    again = run("train_triangle_mnist.py", *small)
    assert again == output[output.index("200 images") :]
    assert any(key.startswith("memory.") for key in load_file(tmp_path / "state.safetensors"))


@pytest.mark.slow
def test_triangle_in_twenty_lines():
    output = run("triangle_in_twenty_lines.py", "--epochs", "4")
    table = rows(output)
    certified, mean = ([values[i] for values in table.values()] for i in (0, 2))
    assert list(table) == ["box", "crown", "triangle:preactivation=crown"]
    assert certified == sorted(certified)
    assert mean == sorted(mean)
    attacked = found(r"attacked ([\d.]+) %", output)
    assert 50 < certified[2] <= 100 - attacked
    unfinished = [int(number) for number in re.findall(r"(\d+) of the last 333 LPs", output)]
    assert len(unfinished) == 4
    assert max(unfinished) < 100
    assert found(r"epoch 4: .* largest gap (\S+) logits", output) < 0.1


@pytest.mark.slow
def test_your_own_loop():
    output = run("your_own_loop.py", "--epochs", "8")
    assert "can be bounded: ok" in output
    assert found(r"differ by at most (\S+)", output) < 1e-4
    assert 50 < found(r"certified ([\d.]+) %", output) < found(r"accuracy ([\d.]+) %", output)


@pytest.mark.slow
def test_lightning_loop():
    """Where Lightning is not installed the same module goes through a plain loop: the numbers are equal."""
    output = run("lightning_loop.py", "--epochs", "6")
    assert "trained by" in output
    assert 50 < found(r"certified ([\d.]+) %", output) < found(r"accuracy ([\d.]+) %", output)


@pytest.mark.slow
def test_fairness():
    """Training with any of the relaxations proves for most what plain training breaks for many; MILP settles all."""
    output = run("fairness.py", "--epochs", "12")
    table = rows(output)
    assert list(table) == ["plain", "box", "crown", "triangle"]
    for accuracy, *proved, fair, unfair in table.values():
        assert accuracy > found(r"right for ([\d.]+) %", output) + 5
        assert max(proved) <= fair
        assert abs(fair + unfair - 100) <= 0.1 + 1e-6  # printed with one decimal
    best = {name: max(values[1:4]) for name, values in table.items()}
    assert best["plain"] < 60 < min(best["box"], best["crown"], best["triangle"])
    assert table["plain"][-1] > table["box"][-1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_a_short_story(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 120
    assert lines[0].startswith('"""')


def test_every_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_a_portfolio_learns_to_beat_equal_weights() -> None:
    assert found(r"held out: (-?[\d.]+)", run("portfolio_in_twenty_lines.py")) > 0.5


def test_learning_through_the_decision_beats_two_stages() -> None:
    output = run("predict_then_optimise.py")
    two_stage, through = (found(pattern, output) for pattern in (r"two-stage ([\d.]+)%", r"decision ([\d.]+)%"))
    assert through < two_stage


def test_denoising_learns_weights_that_beat_equal_ones() -> None:
    output = run("denoise_digits.py")
    noisy, equal, learned = (found(rf"{kind} ([\d.]+)", output) for kind in ("noisy", "equal weights", "learned"))
    assert learned < 0.9 * equal < 0.9 * noisy
