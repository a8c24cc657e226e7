"""Recipes as files, and training of the user's own network on his own data from the command line."""

import json

import numpy as np
import pytest

from optrelax import cli
from optrelax.training.recipe_files import read_recipe, read_setting, recipe_text
from optrelax.training.recipes import names, recipe


@pytest.mark.parametrize("name", names())
def test_every_recipe_comes_back_from_its_text(tmp_path, name):
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_text(recipe(name)))
    assert read_recipe(file) == recipe(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eps = ", "expected TOML"),
        ("epz = 0.1", "no setting 'epz'; did you mean 'eps'?"),
        ("data = 'digits'\nmodel = 'conv'\nmethod = 'certified'\neps = 0.1", "lacks epochs"),
        ("eps = '0.1'", "eps must be int or float, got '0.1'"),
        ("epochs = 2.5", "epochs must be int, got 2.5"),
        ("epochs = true", "epochs must be int, got True"),
        ("milestones = [1, 'two']", "an entry of milestones must be int or float, got 'two'"),
        ("stages = [['box']]", r"an entry of stages must be \[relaxation, epoch\]"),
        ("method = 'certifed'", "did you mean 'certified'?"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    file = tmp_path / "recipe.toml"
    whole = {"data": "digits", "model": "fc-small", "method": "certified", "relaxation": "box", "eps": 0.1, "epochs": 4}
    lacking = "lacks" in message
    rest = "" if lacking else "".join(f"{k} = {json.dumps(v)}\n" for k, v in whole.items() if not text.startswith(k))
    file.write_text(rest + text)
    with pytest.raises(ValueError, match=message):
        read_recipe(file)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("weight_decay=1e-4", ("weight_decay", 1e-4)),
        ("optimizer=adamw", ("optimizer", "adamw")),
        ("milestones=[3, 4]", ("milestones", (3.0, 4.0))),
        ("clip_norm=10", ("clip_norm", 10.0)),
    ],
)
def test_a_setting_is_read_as_in_a_file(text, wanted):
    assert read_setting("--set", text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_decay", "--set must be NAME=VALUE, such as weight_decay=1e-4, got 'weight_decay'"),
        ("weight_dekay=1", "--set: no setting 'weight_dekay'; did you mean 'weight_decay'?"),
        ("weight_decay=much", "--set: weight_decay must be int or float, got 'much'"),
    ],
)
def test_a_bad_setting_is_refused_by_name(capsys, text, message):
    assert main("train", "digits-fc-small-box", "--set", text) == 2
    assert message in capsys.readouterr().err


def test_any_field_is_an_option(capsys):
    assert main("train", "digits-fc-small-box", "--set", "augment=crop", "--set", "average=0.5", "--show") == 0
    shown = capsys.readouterr().out
    assert 'augment = "crop"' in shown
    assert "average = 0.5" in shown


def main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return left.value.code


def test_own_network_on_own_data(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    x = (rng.random((120, 5)) * 0.2 + np.eye(3, 5)[labels] * 0.6).astype(np.float32)
    np.savez(tmp_path / "points.npz", x=x, labels=labels)
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ["--model", "mynets:build", "--data", "points.npz"]
    assert main("train", *own, "--eps", "0.05", "--epochs", "40", "--batch", "20", "--lr", "0.01", "--out", "run") == 0
    capsys.readouterr()
    assert main("certify", "run", "--data", "points.npz", "--eps", "0.05", "--json") == 0
    assert json.loads(capsys.readouterr().out)["certified"] > 0.9

    assert main("train", "digits-fc-small-box", *own, "--show") == 0
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + capsys.readouterr().out.replace("\n", "\r\n").encode())
    assert main("train", "--config", "mine.toml", "--epochs", "3", "--out", "second") == 0
    assert '"mynets:build"' in (tmp_path / "second" / "config.json").read_text()

    # Small data take small batches and two thousand steps; standardised data are trained on as they are.
    assert main("train", *own, "--eps", "0.05", "--show") == 0
    shown = capsys.readouterr().out
    assert "batch = 8\n" in shown
    assert "epochs = 134\n" in shown
    np.savez(tmp_path / "standardised.npz", X=(x - x.mean(0)) / x.std(0), y=labels)
    own[3] = "standardised.npz"
    assert main("train", *own, "--eps", "0.05", "--epochs", "5", "--out", "third") == 2
    assert "scale pixels to the range of clip" in capsys.readouterr().err
    assert main("train", *own, "--eps", "0.05", "--epochs", "5", "--lr", "1e-9", "--no-clip", "--out", "fourth") == 0
    out = capsys.readouterr().out
    share = np.bincount(labels).max() / 120
    assert f"no better than the most frequent class alone ({100 * share:.2f} %)" in out
    assert "--relaxation crown-ibp --no-clip" in out


def test_what_is_missing_is_said(capsys):
    assert main("train") == 2
    assert (
        "name a recipe (--list shows them), or give --config, or --model, --data and --eps" in capsys.readouterr().err
    )
    assert main("train", "digits-fc-small-box", "--config", "mine.toml") == 2
    assert "RECIPE or --config, not both" in capsys.readouterr().err
    assert main("train", "zzz") == 2
    assert capsys.readouterr().err.count(",") == 2
