"""The comparison: what it says is what the relaxations, the layers and an outside MILP say; orders; files; refusals."""

import json
import math
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import oracles
import polars as pl
import pytest
import torch
from cases import inputs
from torch import Tensor, nn

import optrelax as ox
from optrelax.certification.comparison import compare
from optrelax.certification.contests import ComparisonProgress
from optrelax.cli import main
from optrelax.layers import DualAscent, Layerwise, Triangle
from optrelax.layers.milp import Milp

NAMES = ["box", "hbox", "crown-ibp", "crown", "triangle:preactivation=box", "triangle:preactivation=crown"]
NAMES += ["triangle", "layerwise"]
LPS = [name for name in NAMES if name.startswith(("triangle", "layerwise"))]
EPS = 0.1


def network() -> nn.Sequential:
    """Random, with weights large enough to tell the relaxations apart."""
    net = ox.models.fc(4, 12, 10, 8, 3, seed=10)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.7)
    return net


def examples(count: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs with the network's own labels, but for every sixth, which is wrong."""
    x = inputs((4,), count).float()
    labels = network()(x).argmax(1)
    return x, torch.where(torch.arange(count) % 6 == 5, (labels + 1) % 3, labels)


def region(x: Tensor) -> ox.LinfBall:
    return ox.LinfBall(x.double(), EPS, (0.0, 1.0))


@pytest.fixture(scope="module")
def near() -> ox.Comparison:
    """With rounding to nearest, so that values can be equal to those of direct calls."""
    return compare(network(), examples(), EPS, NAMES, rounding="nearest", milp=Milp(time_limit=30), repeats=1)


@pytest.fixture(scope="module")
def outward() -> ox.Comparison:
    return compare(network(), examples(), EPS, NAMES, repeats=1)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_those_of_direct_calls(near, name):
    x, labels = examples()
    with torch.no_grad():
        expected = ox.lower_bounds(network(), region(x), ox.margins(labels, 3), name).amin(1)
    assert near.examples[f"lower:{name}"].to_list() == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("name", "layer"), [("triangle", Triangle()), ("layerwise", Layerwise())])
def test_gaps_are_those_of_the_layers(near, name, layer):
    x, labels = examples()
    with torch.no_grad():
        solution = layer.solve(network(), region(x), ox.margins(labels, 3))
    gaps = solution.gap.flatten()
    row = near.table.row(by_predicate=pl.col("relaxation") == name, named=True)
    assert near.examples[f"gap:{name}"].to_list() == pytest.approx(solution.gap.amax(1).tolist(), abs=1e-12)
    assert row["closed %"] == pytest.approx(100 * (solution.status == 0).double().mean().item())
    for share, column in ((0.5, "median gap"), (0.99, "99 % gap")):
        assert (gaps <= row[column] + 1e-12).double().mean() >= share
        assert (gaps < row[column] - 1e-12).double().mean() < share


def test_the_table_sums_up_the_examples(near):
    assert near.table["relaxation"].to_list() == [*NAMES, "milp"]
    for row in near.table.iter_rows(named=True):
        name = row["relaxation"]
        lower = near.examples["milp_lower" if name == "milp" else f"lower:{name}"].to_numpy()
        assert row["certified %"] == pytest.approx(100 * np.mean(lower > 0))
        assert row["mean bound"] == pytest.approx(lower.mean())
        assert row["worst bound"] == lower.min()
        assert row["ms an example"] > 0
        assert (row["median gap"] is None) == (name not in (*LPS, "milp"))
    assert 0 <= near.table["certified %"][0] < near.table["certified %"][-1] < 100
    x, labels = examples()
    assert near.settings["accuracy"] == (network()(x).argmax(1) == labels).double().mean().item()
    assert near.examples["index"].to_list() == list(range(12))
    assert near.examples["label"].to_list() == labels.tolist()


def test_printed_it_is_the_whole_table_and_what_it_means(near, outward):
    lines = str(near).splitlines()
    assert len({len(line) for line in lines[:-3]}) == 1
    for row in near.table.iter_rows(named=True):
        (line,) = [line for line in lines if line.split()[1:2] == [row["relaxation"]]]
        assert f" {row['certified %']:.2f} " in line
        assert f" {row['mean bound']:.4f} " in line
    assert "gap: certified" in lines[-2]
    assert "milp: exact where closed" in lines[-1]
    assert "milp" not in str(outward)
    assert "gap" not in str(compare(network(), examples(2), EPS, "box", repeats=1))


def test_outward_bounds_lie_just_below(near, outward):
    for name in NAMES:
        nearest, out = (c.examples[f"lower:{name}"].to_numpy() for c in (near, outward))
        assert (out <= nearest + 1e-15).all()
        assert (out >= nearest - 1e-9).all()


def test_orders_on_equal_preactivation_bounds(near, outward):
    """Those of the paper and no others; a few units in the last place for what is rounded to nearest."""
    orders = [
        ("box", "hbox"),
        ("crown-ibp", "triangle:preactivation=box"),
        ("crown", "triangle:preactivation=crown"),
        ("triangle", "layerwise"),
        ("triangle:preactivation=box", "triangle"),
    ]
    for result in (near, outward):
        for loose, tight in orders:
            below, above = (result.examples[f"lower:{name}"] for name in (loose, tight))
            # An LP that stops early may be low by its gap.
            slack = result.examples[f"gap:{tight}"] if tight in LPS and loose in LPS else 0 * above
            assert (below <= above + slack + 1e-12).all(), (loose, tight)
    for name in NAMES:
        assert (near.examples[f"lower:{name}"] <= near.examples["milp_upper"] + 1e-12).all()
    assert (near.examples["milp_upper"] <= near.examples["natural_margin"] + 1e-12).all()


def test_milp_finds_what_an_outside_solver_finds(near):
    x, labels = examples()
    net = ox.capture(network().double(), (4,))
    with torch.no_grad():
        before = ox.Crown().preactivation_bounds(net, region(x))
    for i in range(len(x)):
        one = {name: ox.Bounds(b.lower[i : i + 1], b.upper[i : i + 1]) for name, b in before.items()}
        rows = ox.margins(labels[i : i + 1], 3)[0]
        expected = oracles.minimum(net, region(x[i : i + 1]), rows, one, integer=True).amin().item()
        assert near.examples["milp_lower"][i] == pytest.approx(expected, abs=1e-6)
        assert near.examples["milp_upper"][i] == pytest.approx(expected, abs=1e-6)
    row = near.table.row(by_predicate=pl.col("relaxation") == "milp", named=True)
    assert row["closed %"] == 100
    assert (near.examples["lower:layerwise"] < near.examples["milp_upper"] - 1e-3).any()
    assert near.settings["milp"]["time_limit"] == 30


def test_milp_without_time_keeps_the_sound_bounds():
    result = compare(network(), examples(4), EPS, ["box"], milp=Milp(time_limit=1e-9), repeats=1)
    found = result.examples
    assert found["milp_lower"].to_list() == pytest.approx(
        [min(pair) for pair in zip(found["lower:box"], found["milp_upper"], strict=True)]
    )
    assert (found["milp_lower"] < found["milp_upper"]).all()
    assert result.table["closed %"].to_list() == [None, 0]


def test_batches_and_subsets_change_nothing_else(outward):
    cut = compare(network(), examples(), EPS, NAMES, batch_size=5, subset=3, repeats=1)
    assert cut.examples["index"].to_list() == [0, 5, 11]
    kept = outward.examples.filter(pl.col("index").is_in([0, 5, 11]))
    for name in NAMES:
        assert cut.examples[f"lower:{name}"].to_list() == pytest.approx(kept[f"lower:{name}"].to_list(), abs=1e-9)
    assert (cut.settings["batch_size"], cut.summary()["examples"]) == (5, 3)


def test_objects_by_the_users_own_names():
    chosen = {"rough": Triangle(solver=DualAscent(max_iterations=2)), "fine": "triangle"}
    result = compare(network(), examples(), EPS, chosen, repeats=1)
    assert result.table["relaxation"].to_list() == ["rough", "fine"]
    assert (result.examples["gap:rough"] >= result.examples["gap:fine"] - 1e-12).all()
    assert result.table["closed %"][0] < result.table["closed %"][1]
    assert json.loads(json.dumps(result.summary()))["relaxations"] == ["rough", "fine"]


class NotANumber(ox.Box):
    """Box with a NaN wherever the first pixel is large."""

    def lower_bounds(self, network, region, rows):
        bound = super().lower_bounds(network, region, rows).clone()
        bound[region.lower[:, 0] > 0.5] = torch.nan
        return bound


def test_a_nan_is_no_certificate_and_no_mark():
    result = compare(network(), examples(), 0.01, {"broken": NotANumber(), "box": "box"}, repeats=1)
    broken, box = result.table.rows(named=True)
    assert math.isnan(broken["mean bound"])
    assert broken["certified %"] < box["certified %"]
    (axes,) = result.figure().axes
    assert [line.get_label() for line in axes.lines] == ["box"]
    with pytest.raises(ValueError, match="at least one point"):
        compare(network(), examples(), EPS, NotANumber(), repeats=1).figure()


# --- time ---------------------------------------------------------------------------------------------------------


class Sleeper(ox.Box):
    """Box that sleeps longer at its first call than at those after."""

    def lower_bounds(self, network, region, rows):
        time.sleep(0.01 if SLEPT else 0.3)
        SLEPT.append(len(rows))
        return super().lower_bounds(network, region, rows)


SLEPT: list[int] = []


def test_times_are_medians_of_warm_runs():
    SLEPT.clear()
    seen: list[ComparisonProgress] = []
    result = compare(network(), examples(10), EPS, Sleeper(), batch_size=5, repeats=3, progress=seen.append)
    row = result.table.row(0, named=True)
    assert SLEPT == [1] + [5] * 8  # one example beforehand, whose time tells that of all four runs
    assert seen[0].expected >= 4 * 10 * 0.3
    assert all(p.expected is None for p in seen[1:])
    assert row["timed runs"] == 3
    assert 2 <= row["ms an example"] < 25  # 20 ms for ten examples, and what a busy machine adds
    assert [(p.done, p.total, p.run) for p in seen] == [(0, 10, 0)] + [
        (d, 10, run) for run in range(4) for d in (5, 10)
    ]


def test_a_slow_relaxation_is_not_run_again():
    SLEPT.clear()
    result = compare(network(), examples(10), EPS, Sleeper(), repeats=3, patience=0.1)
    row = result.table.row(0, named=True)
    assert SLEPT == [10]
    assert row["timed runs"] == 0
    assert row["ms an example"] >= 30


# --- the picture --------------------------------------------------------------------------------------------------


def test_the_picture_shows_every_relaxation_under_the_exact_line(near, outward):
    (axes,) = near.figure("a title").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {*NAMES, "exact (MILP)"}
    exact = lines.pop("exact (MILP)").get_ydata()[0]
    for row in near.table.iter_rows(named=True):
        if row["relaxation"] != "milp":
            ((x, y),) = lines[row["relaxation"]].get_xydata()
            assert (x, y) == pytest.approx((row["ms an example"], row["mean bound"]))
            assert y <= exact
    assert axes.get_title(loc="left") == "a title"
    (axes,) = outward.figure().axes
    assert {line.get_label() for line in axes.lines} == set(NAMES)
    cut = compare(network(), examples(4), EPS, ["box"], milp=Milp(time_limit=1e-9), repeats=1)
    assert [line.get_label() for line in cut.figure().axes[0].lines] == ["box", "upper bound (MILP)"]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relaxations": ["crown", "cauchy"]}, "compare: cauchy is an estimate, not a bound"),
        ({"relaxations": ["crwn"]}, "unknown relaxation 'crwn'; did you mean 'crown'?"),
        ({"relaxations": ["box", "box"]}, "compare: relaxation 'box' is given twice"),
        ({"relaxations": []}, "compare: give at least one relaxation"),
        ({"eps": -0.1}, "compare: eps must be a finite number >= 0, got -0.1"),
        ({"clip": (0.0, 0.5)}, r"compare: x lies outside clip \[0, 0.5\]"),
        ({"dtype": torch.float16}, "compare: dtype must be torch.float32 or torch.float64"),
        ({"repeats": 0}, "compare: repeats must be at least 1, got 0"),
        ({"patience": -1.0}, "compare: patience must be >= 0 seconds"),
        ({"batch_size": 0}, "compare: batch_size must be at least 1, got 0"),
        ({"subset": 13}, "subset: must lie in 1 .. 12"),
    ],
)
def test_bad_input(changes, message):
    options = {"eps": EPS, "relaxations": ["box"], **changes}
    with pytest.raises(ValueError, match=message):
        compare(network(), examples(), options.pop("eps"), options.pop("relaxations"), **options)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> str:
    net = ox.models.fc(64, 12, 8, 10, seed=4)
    path = tmp_path / "net.npz"
    layers = [m for m in net if isinstance(m, nn.Linear)]
    weights = {f"weight{i}": layer.weight.detach().numpy() for i, layer in enumerate(layers)}
    biases = {f"bias{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)}
    np.savez(path, **weights, **biases)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


def command(checkpoint: str, *more: str) -> list[str]:
    return ["compare", checkpoint, "--data", "digits", "--eps", "2/100", "--repeats", "1", *more]


def direct(*names: str, **options) -> ox.Comparison:
    digits = ox.load_dataset("digits")
    net = ox.models.fc(64, 12, 8, 10, seed=4)
    return ox.compare(net, digits, 0.02, names, **{"subset": 20, "repeats": 1, **options})


def test_the_command_prints_the_table(run, checkpoint):
    code, out, err = run(*command(checkpoint, "--subset", "20", "--relaxations", "box", "crown", "triangle"))
    assert code == 0
    assert all(line.startswith("compare: ") for line in err.splitlines())  # progress alone
    for row in direct("box", "crown", "triangle").table.iter_rows(named=True):
        (line,) = [line for line in out.splitlines() if row["relaxation"] in line.split()]
        assert f"{row['certified %']:.2f}" in line
        assert f"{row['mean bound']:.4f}" in line
    assert "20 examples, accuracy" in out
    assert "gap: certified" in out
    assert "gap" not in run(*command(checkpoint, "--subset", "20", "--relaxations", "box", "crown"))[1]


def test_by_default_box_crown_and_both_lps_on_a_hundred_examples(run, checkpoint):
    found = json.loads(run(*command(checkpoint, "--json"))[1])
    assert found["relaxations"] == ["box", "crown", "triangle", "layerwise"]
    assert (found["examples"], found["rounding"], found["milp"]) == (100, "outward", None)
    assert found["eps"] == 0.02
    assert json.loads(run(*command(checkpoint, "--json", "--all", "--relaxations", "box"))[1])["examples"] == 360


def test_options_reach_the_work(run, checkpoint):
    code, out, _ = run(
        *command(checkpoint, "--relaxations", "crown", "--subset", "4", "--milp", "--time-limit", "1.5", "--json"),
        *("--precision", "float32", "--rounding", "nearest", "--no-clip", "--split", "train", "--batch-size", "3"),
    )
    found = json.loads(out)
    assert code == 0
    assert (found["dtype"], found["rounding"], found["clip"]) == ("float32", "nearest", None)
    assert (found["milp"]["time_limit"], found["batch_size"], found["split"]) == (1.5, 3, "train")
    assert [row["relaxation"] for row in found["table"]] == ["crown", "milp"]


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_results_are_files(run, checkpoint, tmp_path, ending):
    out = tmp_path / "out"
    arguments = ("--subset", "20", "--relaxations", "box", "triangle", "--out", str(out), "--format", ending)
    code, text, _ = run(*command(checkpoint, *arguments))
    assert code == 0
    expected = {f"table.{ending}", f"examples.{ending}", "summary.json", "tightness.png", "tightness.svg"}
    assert {path.name for path in out.iterdir()} == expected
    assert str(out / "tightness.png") in text
    result = direct("box", "triangle")
    read = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}[ending]
    assert read(out / f"table.{ending}")["mean bound"].to_list() == pytest.approx(result.table["mean bound"].to_list())
    lower = read(out / f"examples.{ending}")["lower:triangle"]
    assert lower.to_list() == pytest.approx(result.examples["lower:triangle"].to_list())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"] == checkpoint
    assert summary["versions"]["torch"] == torch.__version__
    drawn = " ".join(element.text or "" for element in ElementTree.parse(out / "tightness.svg").iter())
    assert all(text in drawn for text in ("box", "triangle", "network net, data digits, eps 0.02", "ms an example"))


def test_bad_options_are_one_line_and_exit_code_2(run, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for more, message in [
        (["--relaxations", "crown", "cauchy"], "compare: cauchy is an estimate"),
        (["--relaxations", "crwn"], "did you mean 'crown'?"),
        (["--relaxations", "triangle:preactivation=crwn"], "did you mean 'crown'?"),
        (["--subset", "3", "--all"], "--subset and --all exclude each other"),
        (["--subset", "1000"], "subset: must lie in 1 .. 360"),
        (["--format", "xls"], "'xls' is not one of"),
        (["--out", str(tmp_path / "file")], "output folder cannot be written"),
        (["--precision", "half"], "'half' is not one of"),
        (["--rounding", "up"], "'up' is not one of"),
    ]:
        code, out, err = run(*command(checkpoint, *more))
        assert (code, out) == (2, ""), more
        assert message in err, more
        assert "Traceback" not in err


def test_failed_work_is_exit_code_1(run, checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the solver went away")

    monkeypatch.setattr("optrelax.compare", fail, raising=False)
    code, out, err = run(*command(checkpoint))
    assert (code, out, err.strip()) == (1, "", "error: the solver went away")
