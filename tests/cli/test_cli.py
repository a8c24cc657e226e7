"""The command line as a user meets it: output, files, exit codes, and one clear line for everything that goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.cli import main
from optrelax.relaxations import names

COMMANDS = ["certify", "relaxations", "info"]


def network() -> nn.Sequential:
    return ox.models.fc(64, 12, 8, 10, seed=4)


def save_npz(path: Path, net: nn.Sequential) -> Path:
    linear = [m for m in net if isinstance(m, nn.Linear)]
    arrays = {}
    for i, layer in enumerate(linear):
        arrays |= {f"weight{i}": layer.weight.detach().numpy(), f"bias{i}": layer.bias.detach().numpy()}
    np.savez(path, **arrays)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return str(save_npz(tmp_path / "net.npz", network()))


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


def certify(checkpoint: str, *more: str) -> list[str]:
    return ["certify", checkpoint, "--data", "digits", "--eps", "0.01", "--subset", "20", *more]


def expected(**options) -> ox.CertificationReport:
    digits = ox.load_dataset("digits")
    return ox.certify(network(), digits, 0.01, subset=20, **options)


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "--json" in out


def test_help_of_certify_states_units_and_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("certify", "--help")
    for text in ("units of the pixels", "8/255", "(crown)", "(60)", "Seconds", "Exit code 1"):
        assert text in out


def test_version(run):
    assert run("--version") == (0, f"{ox.__version__}\n", "")


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "optrelax", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{ox.__version__}\n")


def test_help_loads_nothing_heavy():
    script = (
        "import sys; sys.argv = ['optrelax', '--help']\n"
        "from optrelax.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('matplotlib', 'polars', 'scipy', 'cvxpy', 'highspy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- certify ------------------------------------------------------------------------------------------------------


def test_certify_prints_the_table(run, checkpoint):
    code, out, _ = run(*certify(checkpoint, "--relaxations", "box", "crown"))
    report = expected(relaxation=["box", "crown"])
    assert code == 0
    for name, share in report.certified_by.items():
        (line,) = [line for line in out.splitlines() if f" {name} " in line]
        assert f"{100 * share:.2f}" in line
    assert f"attacked {100 * report.attacked:.2f} %" in out
    assert "20 examples, linf eps 0.01, pixels in [0, 1]" in out


def test_json_alone_is_on_standard_output(run, checkpoint):
    code, out, _ = run(*certify(checkpoint, "--relaxation", "fast-lin", "--json"))
    found = json.loads(out)
    report = expected(relaxation="fast-lin")
    assert code == 0
    assert found["certified"] == report.certified
    assert found["attacked"] == report.attacked
    assert found["relaxations"] == ["fast-lin"]
    assert found["data"] == "digits"


def test_options_reach_the_work(run, checkpoint):
    code, out, _ = run(
        *certify(checkpoint, "--no-attack", "--precision", "float32", "--no-clip", "--split", "train", "--json"),
        *("--batch-size", "7", "--seed", "5", "--exact", "--time-limit", "1.5"),
    )
    found = json.loads(out)
    assert code == 0
    assert (found["attack"], found["dtype"], found["clip"], found["split"]) == (None, "float32", None, "train")
    assert found["exact"]["time_limit"] == 1.5
    code, out, _ = run(*certify(checkpoint, "--restarts", "4", "--steps", "3", "--clip", "-1", "2", "--json"))
    found = json.loads(out)
    assert found["clip"] == [-1, 2]
    assert (found["attack"]["restarts"], found["attack"]["steps"]) == (4, 3)


def test_a_cascade_says_what_each_relaxation_was_asked(run, checkpoint, tmp_path):
    arguments = certify(checkpoint, "--relaxations", "box", "crown", "--cascade", "--out", str(tmp_path))
    code, out, _ = run(*arguments)
    report = expected(relaxation=["box", "crown"], cascade=True)
    assert code == 0
    assert "asked" in out
    assert "seconds" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cascade"]
    assert summary["asked"] == report.asked
    assert set(summary["seconds_by"]) == {"box", "crown"}
    (tmp_path / "journal.jsonl").write_text("".join((tmp_path / "journal.jsonl").read_text().splitlines(True)[:-3]))
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--resume")[0] == 0


def test_ratios_are_numbers(run, checkpoint):
    arguments = certify(checkpoint, "--json")
    arguments[arguments.index("0.01")] = "2/255"
    assert json.loads(run(*arguments)[1])["eps"] == 2 / 255


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_results_are_files(run, checkpoint, tmp_path, ending):
    out = tmp_path / "out"
    code, _, _ = run(*certify(checkpoint, "--out", str(out), "--format", ending))
    assert code == 0
    assert {p.name for p in out.iterdir()} == {
        f"examples.{ending}",
        f"table.{ending}",
        "summary.json",
        "journal.jsonl",
    }
    report = expected()
    read = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}[ending]
    frame = read(out / f"examples.{ending}")
    assert frame["verdict"].to_list() == report.examples["verdict"].to_list()
    assert frame["lower:crown"].to_list() == pytest.approx(report.examples["lower:crown"].to_list())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["certified"] == report.certified
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["checkpoint"] == checkpoint


def test_finished_runs_are_replaced_and_unfinished_ones_kept(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = certify(checkpoint, "--out", str(out))
    assert run(*arguments)[0] == 0
    assert run(*arguments)[0] == 0
    journal = out / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-3]))
    code, _, err = run(*arguments)
    assert code == 2
    assert "unfinished run; add --resume" in err
    assert len(journal.read_text().splitlines()) == len(lines) - 3
    code, _, _ = run(*arguments, "--resume")
    assert code == 0
    assert len(journal.read_text().splitlines()) == len(lines)


def test_resuming_other_settings_is_refused(run, checkpoint, tmp_path):
    out = str(tmp_path / "out")
    assert run(*certify(checkpoint, "--out", out))[0] == 0
    code, _, err = run(*certify(checkpoint, "--out", out, "--resume", "--relaxation", "box"))
    assert code == 2
    assert "is the journal of another run" in err


def test_failed_examples_make_exit_code_1(run, tmp_path):
    x = np.zeros((3, 64))
    x[1] = 1.0  # infinity less infinity at the output
    np.savez(tmp_path / "own.npz", x=x, labels=np.array([0, 1, 2]))
    last = np.full((10, 2), 1e200) * [1.0, -1.0]
    np.savez(tmp_path / "net.npz", weight0=np.full((2, 64), 1e200), weight1=last)
    own = ["--data", str(tmp_path / "own.npz"), "--eps", "0.01", "--attack", "none"]
    code, out, err = run("certify", str(tmp_path / "net.npz"), *own)
    assert code == 1
    assert "failed 33.33 %" in out
    assert "1 example(s) failed; the first is example 1: the network gives NaN at the input" in err


@pytest.mark.parametrize("name", ["x", "images"])
def test_own_data(run, checkpoint, tmp_path, name):
    digits = ox.load_dataset("digits").subset(20)
    own = tmp_path / "own.npz"
    np.savez(own, **{name: digits.images.numpy(), "labels": digits.labels.numpy()})
    found = json.loads(run("certify", checkpoint, "--data", str(own), "--eps", "0.01", "--json")[1])
    assert found["certified"] == expected().certified
    levels = (255 * digits.images).round().byte()
    np.savez(own, **{name: levels.numpy(), "labels": digits.labels.numpy()})
    found = json.loads(run("certify", checkpoint, "--data", str(own), "--eps", "0.01", "--json")[1])
    assert found["certified"] == ox.certify(network(), (levels / 255, digits.labels), 0.01).certified


# --- networks -----------------------------------------------------------------------------------------------------


def user_network() -> nn.Module:
    """A module of the user's own, as --model names it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.LeakyReLU(), nn.Linear(6, 10))


def test_every_kind_of_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    share = expected().certified

    def found(*arguments: str) -> float:
        code, out, err = run(*certify(*arguments, "--json"))
        assert code == 0, err
        return json.loads(out)["certified"]

    save_npz(tmp_path / "net.npz", network())
    assert found("net.npz") == share
    folder = tmp_path / "run"
    folder.mkdir()
    ox.save(network(), folder / "net.safetensors", input_shape=(1, 8, 8))
    assert found("run/net.safetensors") == share
    assert found("run") == share
    (tmp_path / "mine.py").write_text(
        "import optrelax as ox\ndef build():\n    return ox.models.fc(64, 12, 8, 10)\ndef wrong():\n    return 3\n"
    )
    torch.save(network().state_dict(), tmp_path / "net.pt")
    assert found("net.pt", "--model", "mine:build") == share
    torch.save({"epoch": 3, "state_dict": network().state_dict()}, tmp_path / "wrapped.pth")
    assert found("wrapped.pth", "--model", "mine:build") == share
    from safetensors.torch import save_file

    save_file(dict(network().state_dict()), tmp_path / "plain.safetensors")
    assert found("plain.safetensors", "--model", "mine:build") == share
    assert str(tmp_path) not in sys.path
    code, _, err = run(*certify("net.pt", "--model", "mine:wrong"))
    assert (code, "must return an nn.Module, got int" in err) == (2, True)


def test_named_models_take_their_weights(run, tmp_path):
    net = ox.models.build("fc-small", (1, 8, 8), 10, seed=3, normalize=([0.3], [0.4]))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    code, out, err = run(*certify(str(tmp_path / "net.pt"), "--model", "fc-small", "--json"))
    assert code == 0, err
    expected = ox.certify(net, ox.load_dataset("digits"), 0.01, subset=20)
    assert json.loads(out)["certified_by"] == expected.certified_by


class Bomb:
    """What a malicious checkpoint does when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_no_checkpoint_runs_code(run, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save({"weight": Bomb()}, tmp_path / "net.pt")
    code, _, err = run(*certify(str(tmp_path / "net.pt"), "--model", "fc-small"))
    assert code == 2
    assert "expected a state_dict of tensors, torch refuses it" in err
    np.savez(tmp_path / "net.npz", weight0=np.array([Bomb()], dtype=object))
    code, _, err = run(*certify(str(tmp_path / "net.npz")))
    assert code == 2
    assert "expected a complete npz of plain arrays" in err
    (tmp_path / "net.safetensors").write_bytes((tmp_path / "net.pt").read_bytes())
    assert run(*certify(str(tmp_path / "net.safetensors")))[0] == 2
    assert not (tmp_path / "exploded").exists()


# --- bad input ----------------------------------------------------------------------------------------------------


def bad(checkpoint: str, tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments by what is wrong with them, and what the message must say."""
    np.save(tmp / "array.npy", np.zeros(3))
    (tmp / "array.npy").rename(tmp / "array.npz")
    np.savez(tmp / "short.npz", x=np.zeros((2, 64), np.float32), labels=np.array([1]))
    np.savez(tmp / "bare.npz", pixels=np.zeros((2, 64), np.float32))
    np.savez(tmp / "wide.npz", x=np.full((2, 64), 7.0, np.float32), labels=np.array([1, 2]))
    np.savez(tmp / "many.npz", x=np.zeros((2, 64), np.float32), labels=np.array([1, 12]))
    for name, dtype, y in (
        ("column", np.float32, np.array([[1], [2]])),
        ("one-hot", np.float32, np.eye(10)[:2]),
        ("whole", np.float32, np.array([1.0, 2.0])),
        ("named", np.float32, np.array(["cat", "dog"])),
        ("negative", np.float32, np.array([-1, 1])),
        ("integers", np.int64, np.array([1, 2])),
    ):
        np.savez(tmp / f"{name}.npz", x=np.zeros((2, 64), dtype), labels=y)
    np.savez(tmp / "gap.npz", weight0=np.zeros((3, 64), np.float32), weight2=np.zeros((10, 3), np.float32))
    np.savez(tmp / "unchained.npz", weight0=np.zeros((3, 64), np.float32), weight1=np.zeros((10, 4), np.float32))
    (tmp / "cut.npz").write_bytes(Path(checkpoint).read_bytes()[:200])
    (tmp / "cut.safetensors").write_bytes(b"\0" * 20)
    (tmp / "net.onnx").write_bytes(b"")
    (tmp / "net.keras").write_bytes(b"")
    torch.save(network().state_dict(), tmp / "net.pt")
    torch.save([1, 2], tmp / "list.pt")
    (tmp / "file").write_text("")

    def data(name: str) -> list[str]:
        return ["certify", checkpoint, "--data", str(tmp / name), "--eps", "0.1"]

    def net(name: str, *more: str) -> list[str]:
        return certify(str(tmp / name), *more)

    return {
        "no checkpoint": (net("none.npz"), "none.npz: no such file; expected a safetensors file"),
        "unknown ending": (net("net.keras"), "ends in '.keras'; expected"),
        "no ONNX file": (net("net.onnx"), "expected an ONNX file with a graph of nodes, got none"),
        "truncated npz": (net("cut.npz"), "cut.npz: expected a complete npz"),
        "truncated safetensors": (net("cut.safetensors"), "cut.safetensors: expected a complete safetensors file"),
        "gap in npz": (net("gap.npz"), "expected arrays weight0, bias0, weight1, ..., got ['weight0', 'weight2']"),
        "npz does not chain": (net("unchained.npz"), "weight1 must be [out, 3], got [10, 4]"),
        "state_dict alone": (net("net.pt"), "a state_dict holds no network; say which with --model"),
        "unknown model": (net("net.pt", "--model", "fc-smal"), "unknown network 'fc-smal'; did you mean 'fc-small'?"),
        "wrong model": (net("net.pt", "--model", "conv"), "does not fit model 'conv': Missing key(s)"),
        "no module": (net("net.pt", "--model", "nowhere:net"), "module 'nowhere' cannot be imported"),
        "no function": (net("net.pt", "--model", "math:net"), "module 'math' has no 'net'"),
        "model of an npz": (certify(checkpoint, "--model", "fc"), "leave --model out"),
        "a list": (net("list.pt", "--model", "fc-small"), "expected a state_dict (names to tensors), got list"),
        "unknown data": (["certify", checkpoint, "--data", "digit", "--eps", "1"], "did you mean 'digits'?"),
        "no data files": (["certify", checkpoint, "--data", "mnist", "--eps", "1"], "mnist: t10k-images"),
        "no data file": (data("none.npz"), "none.npz: no such file"),
        "a single array": (data("array.npz"), "expected a complete npz of plain arrays"),
        "no arrays": (data("bare.npz"), "expected arrays x (or X, images) and labels (or y), got ['pixels']"),
        "labels too few": (data("short.npz"), "labels must be 2 integers"),
        "labels in a column": (data("column.npz"), "got int64 [2, 1]; store labels.ravel()"),
        "labels one-hot": (data("one-hot.npz"), "got float64 [2, 10]; one-hot ones as labels.argmax(1)"),
        "labels of floats": (data("whole.npz"), "got float64 [2]; store labels.astype(int)"),
        "labels with names": (data("named.npz"), "names as numpy.unique(labels, return_inverse=True)[1]"),
        "labels below 0": (data("negative.npz"), "labels must count classes from 0, got -1"),
        "pixels of integers": (data("integers.npz"), "whole numbers from 0 to 255 as x.astype(numpy.uint8)"),
        "a table of text": (data("table.csv"), "table.csv: data of your own must be an npz file: numpy.savez("),
        "relaxations by commas": (certify(checkpoint, "--relaxations", "box,crown"), "on a command line, with spaces"),
        "pixels out of range": (data("wide.npz"), "scale pixels to that range"),
        "labels out of range": (data("many.npz"), "labels must lie in [0, 9], got 12"),
        "eps": (["certify", checkpoint, "--data", "digits", "--eps", "big"], "--eps must be a number or a ratio"),
        "negative eps": (["certify", checkpoint, "--data", "digits", "--eps=-1"], "eps must be a finite number >= 0"),
        "unknown relaxation": (certify(checkpoint, "--relaxation", "crwn"), "did you mean 'crown'?"),
        "unsound relaxation": (certify(checkpoint, "--relaxation", "cauchy"), "an estimate, not a bound"),
        "unknown option of one": (certify(checkpoint, "--relaxation", "crown:k=3"), "relaxation 'crown:k=3'"),
        "subset": (certify(checkpoint, "--subset", "1000"), "subset: must lie in 1 .. 360"),
        "format": (certify(checkpoint, "--format", "xls"), "'xls' is not one of 'csv', 'json', 'parquet'"),
        "resume alone": (certify(checkpoint, "--resume"), "--resume needs --out DIR"),
        "output is a file": (certify(checkpoint, "--out", str(tmp / "file")), "output folder cannot be written"),
        "device": (certify(checkpoint, "--device", "tpu0"), "--device must be cpu, cuda or cuda:N, got 'tpu0'"),
        "no such device": (certify(checkpoint, "--device", "cuda:99"), "--device cuda:99: this machine has"),
        "precision": (certify(checkpoint, "--precision", "half"), "'half' is not one of 'float64', 'float32'"),
        "split": (certify(checkpoint, "--split", "dev"), "'dev' is not one of 'test', 'train'"),
        "no eps": (["certify", checkpoint, "--data", "digits"], "Missing option '--eps'"),
        "no such option": (certify(checkpoint, "--relax", "box"), "No such option"),
        "no such command": (["certifi"], "No such command 'certifi'"),
    }


def test_bad_input_is_one_line_and_exit_code_2(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for what, (arguments, message) in bad(checkpoint, tmp_path).items():
        code, out, err = run(*arguments)
        assert code == 2, (what, err)
        assert out == "", what
        assert message in err, (what, err)
        assert err.startswith("error: "), (what, err)
        assert "╭" not in err, (what, err)


def test_a_folder_that_the_shell_left_as_it_is_is_the_users(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (["--data=~/none.npz"], ["--data", "~/none.npz"]):
        assert f"error: {tmp_path / 'none.npz'}: no such file" in run("certify", "~/net", *given, "--eps", "1")[2]


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_in_a_pipe_keeps_to_columns(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("relaxations")[1].splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert any("input noise shared" in line for line in lines)


@pytest.mark.parametrize(
    ("shape", "clip", "words"),
    [
        ((12,), (0, 1), "12 features: features in [0, 1]"),
        ((1, 8, 8), None, "1x8x8 pixels: pixels unlimited"),
        ((4, 5), (-1, 0.5), "4x5 entries: entries in [-1, 0.5]"),
    ],
)
def test_tables_say_what_an_example_is_made_of(shape, clip, words):
    from optrelax.cli.inputs import legal_range, size_of

    assert f"{size_of(shape)}: {legal_range(shape, clip)}" == words


def test_an_unwritable_folder_is_found_before_the_work(run, checkpoint, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("optrelax.cli.option_sets.read_inputs", lambda *a, **k: called.append(a))
    (tmp_path / "file").write_text("")
    code, _, err = run(*certify(checkpoint, "--out", str(tmp_path / "file" / "below")))
    assert code == 2
    assert f"{tmp_path / 'file' / 'below'}: output folder cannot be written" in err
    assert called == []


def test_errors_during_work_are_exit_code_1(run, checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk went away")

    monkeypatch.setattr("optrelax.certify", fail, raising=False)
    code, out, err = run(*certify(checkpoint))
    assert (code, out) == (1, "")
    assert err.strip() == "error: the disk went away"
    monkeypatch.setenv("OPTRELAX_TRACEBACK", "1")
    assert "Traceback" in run(*certify(checkpoint))[2]


def test_faults_of_ours_keep_their_traceback(checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a slip")

    monkeypatch.setattr("optrelax.certify", fail, raising=False)
    with pytest.raises(KeyError):
        main(certify(checkpoint))


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_journal_and_resumes(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = certify(checkpoint, "--subset", "150", "--batch-size", "1", "--out", str(out))
    script = "from optrelax.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        journal = out / "journal.jsonl"
        give_up = time.monotonic() + 120
        while not (journal.exists() and len(journal.read_text().splitlines()) > 3):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Interrupted; repeat the command with --resume." in stderr
    assert "Traceback" not in stderr
    done = len(journal.read_text().splitlines()) - 1
    assert 3 <= done < 150
    code, text, _ = run(*arguments, "--resume", "--json")
    assert code == 0
    report = ox.certify(network(), ox.load_dataset("digits"), 0.01, subset=150)
    assert json.loads(text)["certified"] == report.certified
    frame = pl.read_parquet(out / "examples.parquet")
    assert frame["verdict"].to_list() == report.examples["verdict"].to_list()


# --- the other commands -------------------------------------------------------------------------------------------


def test_relaxations_lists_every_name(run):
    code, out, _ = run("relaxations", "--json")
    rows = {row["relaxation"]: row for row in json.loads(out)}
    assert code == 0
    assert set(names()) - set(rows) <= {"alpha-crown", "triangle", "layerwise"}
    assert [name for name, row in rows.items() if row["sound"] == "no"] == ["cauchy"]
    # arXiv 2102.06700, as the digest of the paper states it: nowhere for these.
    nowhere = ["box", "box-widen", "deepz", "fast-lin", "deepz-soft", "crown-soft", "crown-0-c", "hbox-diag-c"]
    assert all(rows[name]["continuous"] == "yes" for name in nowhere)
    assert rows["crown"]["jumps at"] == "|l| = |u|"
    assert rows["box-round"]["continuous"] == "no"
    code, out, _ = run("relaxations")
    assert all(name in out for name in rows)


def test_info(run):
    found = json.loads(run("info", "--json")[1])
    assert found["optrelax"] == ox.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert "highspy" in run("info")[1]


def test_a_command_is_one_module_and_one_line():
    """Commands that another module registers take lists and share the border without more ado."""
    from optrelax.cli.application import _expanded

    assert _expanded(["a", "--names", "b", "c", "--x", "1"], {"--names"}) == [
        *("a", "--names", "b", "--names", "c", "--x", "1")
    ]
    assert _expanded(["--names", "b", "--", "c"], {"--names"}) == ["--names", "b", "--", "c"]
    assert _expanded(["--name", "b", "c"], {"--names"}) == ["--name", "b", "c"]
