"""Files and folders that are not what their names say: exit code 2, one message that names them, no traceback."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import optrelax as ox
from optrelax.cli import main

USER_CODE = """
from torch import nn
def fits(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def pool(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LPPool1d(2, 2))
def slips(): return {}["net"]
def wants(size): return nn.Linear(size, size)
number = 3
"""


def write_networks(folder: Path) -> None:
    """Whole and broken networks by name."""
    net = ox.models.fc(64, 12, 8, 10, seed=4)
    linear = [m for m in net if isinstance(m, nn.Linear)]
    arrays = {f"weight{i}": layer.weight.detach().numpy() for i, layer in enumerate(linear)}
    np.savez(folder / "net.npz", **arrays)
    np.savez_compressed(folder / "flipped.npz", **arrays)
    np.savez(folder / "nan.npz", **(arrays | {"weight1": np.full((8, 12), np.nan, np.float32)}))
    ox.save(net, folder / "net.safetensors", input_shape=(1, 8, 8))
    for name in ("net.npz", "net.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    for name, place in (("net.safetensors", -5), ("flipped.npz", 1000)):
        damaged = bytearray((folder / name).read_bytes())
        damaged[place] ^= 255
        (folder / f"flipped.{name.rpartition('.')[2]}").write_bytes(damaged)
    save_file({"w": torch.zeros(3)}, folder / "plain.safetensors")
    with torch.no_grad():
        linear[1].weight[0, 0] = torch.nan
    ox.save(net, folder / "nan.safetensors", input_shape=(1, 8, 8))
    (folder / "run").mkdir()
    (folder / "text.npz").write_text("weights")


def write_state_dicts(folder: Path) -> None:
    """Whole and foreign state_dicts, and modules of the user's."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(net.state_dict(), folder / "net.pt")
    torch.save(nn.Linear(3, 3).state_dict(), folder / "foreign.pt")
    torch.save(net, folder / "module.pt")
    whole = (folder / "net.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("weights")
    with torch.no_grad():
        net[1].bias[3] = torch.inf
    torch.save(net.state_dict(), folder / "inf.pt")
    (folder / "ownnets.py").write_text(USER_CODE)
    (folder / "unparsed.py").write_text("def f(:\n")
    (folder / "raising.py").write_text("1 / 0\n")


def write_data(folder: Path) -> None:
    """Whole and broken data."""
    x, labels = np.full((5, 1, 8, 8), 0.5, np.float32), np.arange(5)
    bad = x.copy()
    bad[2, 0, 3, 3] = np.nan
    np.savez(folder / "data.npz", x=x, labels=labels)
    np.savez(folder / "nan-data.npz", x=bad, labels=labels)
    np.savez(folder / "label-10.npz", x=x, labels=np.array([0, 1, 2, 3, 10]))
    np.savez(folder / "narrow.npz", x=x[..., :7], labels=labels)
    np.savez(folder / "scalar.npz", x=np.float32(0.5), labels=np.int64(1))
    np.savez(folder / "flat.npz", x=x[:, 0, 0, 0], labels=labels)
    np.savez(folder / "none.npz", x=x[:0], labels=labels[:0])
    np.savez(folder / "objects.npz", x=np.array([{}] * 5, dtype=object), labels=labels)
    (folder / "file").write_text("")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of files, most of them broken."""
    folder = tmp_path_factory.mktemp("files")
    for write in (write_networks, write_state_dicts, write_data):
        write(folder)
    return folder


def refused(capsys, *arguments: str) -> str:
    """What a command says before it leaves with exit code 2, without a word on standard output."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (done.value.code, out) == (2, ""), err
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err.removeprefix("error: ").strip()


REFUSED = "expected a state_dict of tensors, torch refuses it:"
CUT = "expected a complete npz of plain arrays, got no zip archive, or a truncated one"
NETWORKS = {
    "nowhere.npz": "nowhere.npz: no such file; expected a safetensors file",
    "cut-net.npz": f"cut-net.npz: {CUT}",
    "text.npz": f"text.npz: {CUT}",
    "flipped.npz": "flipped.npz: expected a complete npz of plain arrays, got one that fails",
    "nan.npz": "nan.npz: weight1 holds NaN",
    "data.npz": "data.npz: expected arrays weight0, bias0, weight1, ..., got ['labels', 'x']",
    "cut-net.safetensors": "cut-net.safetensors: expected a complete safetensors file",
    "flipped.safetensors": "flipped.safetensors: expected an optrelax network, got one that does not fit together",
    "nan.safetensors": "nan.safetensors: 3.weight holds NaN or infinite entries",
    "plain.safetensors": "plain.safetensors: expected a network stored by optrelax.save",
    "run": "run/net.safetensors: no such file",
    "foreign.pt --model ownnets:fits": "foreign.pt: does not fit model 'ownnets:fits': Missing key(s)",
    "module.pt --model ownnets:fits": f"module.pt: {REFUSED} Unsupported global",
    "text.pt --model ownnets:fits": f"text.pt: {REFUSED} no file that torch.save",
    "cut.pt --model ownnets:fits": f"cut.pt: {REFUSED} no file that torch.save",
    "inf.pt --model ownnets:fits": "inf.pt: 1.bias holds NaN or infinite entries",
    "net.pt --model ownnets:pool": "1 op(s) of the network cannot be bounded:\n  2: LPPool1d: has no rule",
    "net.pt --model ownnets:slips": "model: ownnets:slips, called without arguments, fails: KeyError: 'net'",
    "net.pt --model ownnets:wants": "model: ownnets:wants, called without arguments, fails: TypeError: wants() missing",
    "net.pt --model ownnets:number": "model: ownnets:number, called without arguments, fails: TypeError: 'int'",
    "net.pt --model ownnets:other": "model: module 'ownnets' has no 'other'",
    "net.pt --model unparsed:f": "model: module 'unparsed' cannot be imported: SyntaxError",
    "net.pt --model raising:f": "model: module 'raising' cannot be imported: ZeroDivisionError: division by zero",
    "net.pt --model :f": "model: wants module:function, such as mynets:build, got ':f'",
}
DATA = {
    "nowhere.npz": "nowhere.npz: no such file",
    "cut-net.npz": f"cut-net.npz: {CUT}",
    "nan-data.npz": "nan-data.npz: x has 1 NaN or infinite of 320 entries (first at [2, 0, 3, 3])",
    "label-10.npz": "margins: labels must lie in [0, 9], got 10",
    "narrow.npz": "1 op(s) of the network cannot be bounded:\n  1: Linear: fails on an input of shape (1, 8, 7)",
    "scalar.npz": "scalar.npz: x must be [n, *input_shape] with n >= 1, got []",
    "flat.npz": "flat.npz: x must be [n, *input_shape] with n >= 1, got [5]",
    "none.npz": "none.npz: x must be [n, *input_shape] with n >= 1, got [0, 1, 8, 8]",
    "objects.npz": "objects.npz: expected a complete npz of plain arrays, got an array that is pickled or damaged",
}
each_command = pytest.mark.parametrize("name", ["certify", "compare"])


@each_command
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(name, network, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    message = refused(capsys, name, *network.split(), "--data", "data.npz", "--eps", "0.1")
    assert message.startswith(NETWORKS[network])
    # What torch and numpy advise, to unpickle it all the same, would run the file's code.
    assert "allow_pickle" not in message
    assert "weights_only" not in message


@each_command
@pytest.mark.parametrize("data", DATA)
def test_data(name, data, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    # A network of fixed sizes, flattened: narrow images do not fit it.
    assert refused(capsys, name, "net.npz", "--data", data, "--eps", "0.1").startswith(DATA[data])


@each_command
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--eps=-0.1", "{name}: eps must be a finite number >= 0, got -0.1"),
        ("--eps nan", "--eps must be finite, got 'nan'"),
        ("--eps 0.1 --relaxation crwn", "unknown relaxation 'crwn'; did you mean 'crown'?"),
        ("--eps 0.1 --out file", "file: output folder cannot be written: File exists"),
        ("--eps 0.1 --out file/below", "file/below: output folder cannot be written: Not a directory"),
        ("--eps 0.1 --device meta", "--device must be cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_options(name, arguments, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    found = refused(capsys, name, "net.npz", "--data", "data.npz", *arguments.split())
    assert found == message.format(name=name)


def test_the_whole_files_are_taken(place, monkeypatch, capsys):
    """Else the messages above would prove little."""
    monkeypatch.chdir(place)
    for network in (["net.npz"], ["net.safetensors"], ["net.pt", "--model", "ownnets:fits"]):
        with pytest.raises(SystemExit) as done:
            main(["certify", *network, "--data", "data.npz", "--eps", "0", "--json"])
        assert not done.value.code
        assert json.loads(capsys.readouterr().out)["errors"] == 0


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys) -> Path:
    """A finished training run of one epoch."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(TRAIN)
    capsys.readouterr()
    return tmp_path / "run"


TRAIN = ["train", "digits-fc-small-natural", "--out", "run", "--epochs", "1", "--subset", "100"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "file"], "file: output folder cannot be written"),
        (["--eps=-1"], "recipe 'digits-fc-small-natural': eps must be >= 0, got -1.0"),
        (["--relaxation", "crown"], "recipe 'digits-fc-small-natural': a relaxation goes with method"),
        (["--subset", "99999"], "subset: must lie in 1 .. 1437"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_training_options(arguments, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert refused(capsys, *TRAIN, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "run/config.json: expected JSON as a run writes it, got text that fails"),
        ("config.json", "[]", "run/config.json: expected JSON as a run writes it, got '[]'"),
        ("config.json", "{}", "run: cannot resume with another configuration"),
        ("metrics.jsonl", "{\n", "run/metrics.jsonl: expected JSON as a run writes it"),
        ("state.safetensors", "x" * 50, "run/state.safetensors: expected a complete safetensors file"),
    ],
)
def test_damaged_runs(file, content, message, stopped, capsys):
    (stopped / file).write_text(content)
    assert refused(capsys, *TRAIN, "--resume").startswith(message)


def test_a_pickle_is_no_network(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for name in ("pickle.npz", "pickle.safetensors", "pickle.pt"):
        (place / name).write_bytes(pickle.dumps({"weight0": np.zeros((10, 64))}))
    for arguments in (["pickle.npz"], ["pickle.safetensors"], ["pickle.pt", "--model", "ownnets:fits"]):
        message = refused(capsys, "certify", *arguments, "--data", "data.npz", "--eps", "0.1")
        assert message.startswith(f"{arguments[0]}: expected")
