"""The demo and the commands that train: what they compute, write and refuse."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

import optrelax as ox
from optrelax.cli import main
from optrelax.papers import demo
from optrelax.papers.demo import RELAXATIONS, Demo, DemoResult, available, run

CURVES, SLOW = ("box", "crown"), ("triangle",)
SMALL = Demo(methods=("natural", "crown-ibp"), relaxations=CURVES, slow=SLOW, epochs=3, subset=25, seed=1)


def command(*arguments: str) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    return run(SMALL, folder)


def test_the_table_says_what_the_stored_networks_do(result, folder):
    test = ox.load_dataset("digits").subset(25)
    assert result.examples == 25
    assert result.eps == 0.1
    for row in result.table.iter_rows(named=True):
        net = ox.load(folder / row["training"])
        assert row["accuracy %"] == 100 * (net(test.images).argmax(1) == test.labels).double().mean().item()
        region = ox.LinfBall(test.images, 0.1, (0.0, 1.0))
        for name in (*CURVES, *SLOW):
            # Bounds here are to nearest, there rounded outward: equal verdicts unless a bound is all but 0.
            m = ox.lower_bounds(net, region, ox.margins(test.labels, 10), name)
            assert row[f"{name} %"] == pytest.approx(100 * (m > 0).all(1).double().mean().item())
            assert row[f"{name} %"] <= row["PGD %"]
        assert row["training s"] > 0
        assert row["certifying s"] > 0


def test_curves_begin_at_the_accuracy_and_pass_through_the_table(result):
    for row in result.table.iter_rows(named=True):
        curve = result.curves.filter(pl.col("training") == row["training"])
        for name in (*CURVES, "PGD"):
            points = curve.filter(pl.col("relaxation") == name)
            assert points["eps"].is_sorted()
            assert 100 * points["certified"][0] == row["accuracy %"]
            at = points.filter(pl.col("eps") == 0.1)
            assert 100 * at["certified"][0] == pytest.approx(row[f"{name} %"])
        assert points["eps"].to_list()[-1] == 0.2


def test_files_hold_the_result(result, folder):
    assert [path.name for path in result.pictures] == ["natural.png", "crown-ibp.png", "tightness.png"]
    for path in result.pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert pl.read_csv(folder / "table.csv").columns == result.table.columns
    assert pl.read_csv(folder / "curves.csv").height == result.curves.height == 2 * 3 * 5
    assert pl.read_csv(folder / "comparison.csv").columns == result.comparison.table.columns
    facts = json.loads((folder / "demo.json").read_text())
    assert facts["comparison"] == result.comparison.table.to_dicts()
    assert facts["table"] == result.table.to_dicts()
    assert facts["seed"] == 1


def test_a_second_run_trains_nothing_again(result, folder):
    stamps = [(folder / method / "state.safetensors").stat().st_mtime_ns for method in SMALL.methods]
    again = run(SMALL, folder)
    assert stamps == [(folder / method / "state.safetensors").stat().st_mtime_ns for method in SMALL.methods]
    still = ["training", "training s", "accuracy %", "PGD %", "box %", "crown %", "triangle %"]
    assert again.table.select(still).equals(result.table.select(still))


def test_only_relaxations_that_are_there_are_shown(monkeypatch):
    assert available(RELAXATIONS) == RELAXATIONS
    monkeypatch.setitem(ox.relaxations.registry._NAMES, "absent", ("optrelax.layers:Absent", {}))
    monkeypatch.setitem(ox.relaxations.registry._NAMES, "nowhere", ("optrelax.nowhere:Absent", {}))
    assert available(("box", "absent", "nowhere", "crown")) == ("box", "crown")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "svhn"}, "unknown recipe 'svhn-fc-small-natural'"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"relaxations": ()}, "relaxations must name at least one"),
        ({"relaxations": ("box", "cauchy")}, "cauchy is an estimate"),
        ({"relaxations": ("bx",)}, "did you mean 'box'"),
        ({"slow": ("layrwise",)}, "did you mean 'layerwise'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Demo(**options)


# --- commands ------------------------------------------------------------------------------------------------------


def test_demo_command(tmp_path, capsys):
    assert command("demo", "--epochs", "2", "--subset", "6", "--out", str(tmp_path / "demo")) == 0
    shown = capsys.readouterr().out
    assert "Percent of 6 test images, eps 0.1" in shown
    assert all(name in shown for name in (*RELAXATIONS, *demo.SLOW))
    assert (tmp_path / "demo" / "box.png").exists()


def test_train_certify_and_resume(tmp_path, capsys):
    run = str(tmp_path / "run")
    train = ["train", "digits-fc-small-box", "--epochs", "3", "--subset", "200", "--seed", "2", "--out", run]
    assert command(*train, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recipe"]["epochs"] == 3
    assert facts["last epoch"]["eps"] == 0.1
    assert ox.networks.checkpoints.read_extra(run)["recipe"]["relaxation"] == "box"
    assert command(*train) == 2  # not overwritten
    assert "holds a run already" in capsys.readouterr().err
    assert command(*train, "--resume") == 0
    assert "optrelax certify" in capsys.readouterr().out
    assert command("certify", run, "--data", "digits", "--eps", "0.1", "--relaxation", "box", "--json") == 0
    assert 0 <= json.loads(capsys.readouterr().out)["certified"] <= 1


def test_overrides_reach_the_run(tmp_path, capsys):
    options = (
        "--relaxation crown-ibp --eps 1/10 --warmup 0 --mixing 1 --kappa 0.25 --beta 0.5 --l1 1e-4 --lr 1e-3 --batch 64"
    )
    arguments = ["train", "digits-fc-small-box", "--epochs", "2", "--subset", "100", *options.split()]
    assert command(*arguments, "--out", str(tmp_path), "--json") == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    wanted = {"relaxation": "crown-ibp", "eps": 0.1, "warmup": 0, "mixing": 1, "kappa": 0.25, "beta": 0.5, "l1": 1e-4}
    assert {key: recipe[key] for key in wanted} == wanted
    assert (recipe["lr"], recipe["batch"]) == (1e-3, 64)
    config = json.loads((tmp_path / "config.json").read_text())["configuration"]["training"]
    assert config["beta"] == {"type": "LinearRamp", "start": 1.0, "end": 0.5, "begin": 0.0, "length": 1.0}


def test_the_list_of_recipes(capsys):
    assert command("train", "--list", "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names == ox.training.recipes.names()
    assert command("train", "--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("mnist-fc-small-crown-ibp", "digits-fc-small-natural"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a recipe"),
        (["train", "digits-fc-small-bx"], "did you mean 'digits-fc-small-box'"),
        (["train", "digits-fc-small-box", "--eps", "much"], "--eps must be a number"),
        (["train", "digits-fc-small-box", "--eps", "-0.1"], "eps must be >= 0"),
        (["train", "digits-fc-small-box", "--relaxation", "bx"], "did you mean 'box'"),
        (["train", "digits-fc-small-natural", "--relaxation", "box"], "goes with method 'certified'"),
        (["train", "mnist-fc-small-box", "--data-dir", "nowhere"], "nowhere/mnist"),
        (["train", "digits-fc-small-box", "--device", "tpu:0"], "--device must be cpu"),
        (["train", "digits-fc-small-box", "--subset", "9999"], "subset: must lie in 1 .. 1437"),
        (["demo", "--data", "svhn"], "'svhn' is not one of 'digits', 'mnist'"),
        (["demo", "--eps", "0"], "eps must be > 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.glob("runs/*/state.safetensors"))


def test_an_unwritable_folder_is_refused_before_training(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert command("train", "digits-fc-small-box", "--out", str(file / "run")) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    """The command in a process of its own, interrupted in its first epochs, then resumed to the end."""
    import signal
    import time

    arguments = ["train", "digits-fc-small-box", "--epochs", "40", "--subset", "300", "--out", str(tmp_path / "run")]
    words = [sys.executable, "-c", "from optrelax.cli import main; main()", *arguments]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted; repeat the command with --resume." in messages
    assert "Traceback" not in messages
    assert command(*arguments, "--resume") == 0
    assert metrics.read_text().count("\n") == 40


def test_training_takes_the_device_it_is_given(tmp_path):
    assert command("train", "digits-fc-small-natural", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)) == 0
    assert next(ox.load(tmp_path).module.parameters()).device == torch.device("cpu")
