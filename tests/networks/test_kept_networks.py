"""Networks kept during training: which files, the same ones after an interruption, and readable as checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import optrelax as ox
from optrelax.cli import main
from optrelax.networks.checkpoint_files import read_network
from optrelax.training import Training, train
from optrelax.training.losses import CertifiedLoss
from optrelax.training.meters import TrainingProgress
from optrelax.training.runs import RunFolder
from optrelax.training.schedules import ConstantSchedule

SETTINGS = Training(
    loss=CertifiedLoss("box", kappa=0.5), epochs=5, eps=ConstantSchedule(0.02), lr=ConstantSchedule(1e-2), batch=10
)


def data() -> tuple[Tensor, Tensor]:
    return torch.rand(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def network() -> torch.nn.Module:
    return ox.models.fc(4, 6, 3, seed=0)


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*epoch-*"))}


def test_every_so_many_epochs_the_network_is_kept(tmp_path):
    states: dict[int, list[Tensor]] = {}
    net = network()

    def watch(progress: TrainingProgress) -> None:
        if progress.step == progress.steps:
            states[progress.epoch] = [p.detach().clone() for p in net.parameters()]

    train(net, data(), SETTINGS, folder=tmp_path, keep_every=2, watch=watch, facts={"data": "points"})
    assert list(kept(tmp_path)) == ["epoch-0002.safetensors", "epoch-0004.safetensors"]
    assert list(RunFolder(tmp_path).kept_networks()) == [2, 4]
    for epoch, path in RunFolder(tmp_path).kept_networks().items():
        found = read_network(path)
        assert all(torch.equal(a, b) for a, b in zip(found.module.parameters(), states[epoch], strict=True))
        assert ox.networks.checkpoints.read_extra(path) == {"data": "points", "epochs": epoch}


def test_keeping_changes_no_weight_and_is_no_part_of_the_configuration(tmp_path):
    plain, keeping = network(), network()
    train(plain, data(), SETTINGS, folder=tmp_path / "plain")
    train(keeping, data(), SETTINGS, folder=tmp_path / "keeping", keep_every=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), keeping.parameters(), strict=True))
    configurations = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "keeping")]
    assert configurations[0] == configurations[1]
    assert kept(tmp_path / "plain") == {}


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["in an epoch", "between network and state"])
def test_an_interrupted_run_keeps_the_same_files(tmp_path, where, monkeypatch):
    train(network(), data(), SETTINGS, folder=tmp_path / "whole", keep_every=2)

    def watch(progress: TrainingProgress) -> None:
        if where == "in an epoch" and (progress.epoch, progress.step) == (4, 1):
            raise Stop

    real = RunFolder.save_state

    def save_state(folder: RunFolder, module, optimizer, state) -> None:
        if where != "in an epoch" and state.epochs == 4:
            raise Stop
        real(folder, module, optimizer, state)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_state", save_state)
        with pytest.raises(Stop):
            train(network(), data(), SETTINGS, folder=tmp_path / "cut", keep_every=2, watch=watch)
    # What a kill in the middle of a write leaves behind.
    (tmp_path / "cut" / ".epoch-0004-abc.safetensors").write_bytes(b"half")
    train(network(), data(), SETTINGS, folder=tmp_path / "cut", keep_every=2, resume=True)
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")


def test_a_run_resumes_with_another_interval(tmp_path):
    def watch(progress: TrainingProgress) -> None:
        if (progress.epoch, progress.step) == (3, 1):
            raise Stop

    with pytest.raises(Stop):
        train(network(), data(), SETTINGS, folder=tmp_path, keep_every=2, watch=watch)
    train(network(), data(), SETTINGS, folder=tmp_path, keep_every=5, resume=True)
    assert list(RunFolder(tmp_path).kept_networks()) == [2, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_every": 1}, "keep_every needs the folder"),
        ({"keep_every": 0, "folder": "run"}, "keep_every must be at least 1 epoch, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(network(), data(), SETTINGS, **arguments)
    assert not (tmp_path / "run").exists()


def test_the_command(tmp_path, capsys):
    words = ["train", "digits-fc-small-box", "--epochs", "2", "--subset", "20", "--out", str(tmp_path / "run")]
    for bad in ("0", "x"):
        with pytest.raises(SystemExit) as done:
            main([*words, "--keep-every", bad])
        assert done.value.code == 2
    with pytest.raises(SystemExit) as done:
        main([*words, "--keep-every", "1", "--json"])
    assert not done.value.code
    capsys.readouterr()
    assert list(kept(tmp_path / "run")) == ["epoch-0001.safetensors", "epoch-0002.safetensors"]
    command = ["certify", str(tmp_path / "run" / "epoch-0001.safetensors"), "--data", "digits", "--subset", "3"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--eps", "0.01", "--relaxation", "box", "--json"])
    assert not done.value.code
