"""The benchmarks run and store what they say; their floors, memory figures and regression check are what they claim."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optrelax.relaxations import names, resolve

# The benchmarks are no part of the package: they are imported inside the tests, so that collecting these also works
# where the wheel is all there is.
ROOT = Path(__file__).resolve().parent.parent
CLOSED_FORMS = [name for name in names() if name not in ("alpha-crown", "triangle", "layerwise")]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import measuring

    monkeypatch.setattr(measuring, "LEAST", 0.01)  # the figures are looked at for what they are, not for how exact
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def main(*arguments):
    from benchmarks.__main__ import main

    main(["--quick", "--threads", "1", *map(str, arguments)])


def stored(folder, suite):
    """What a quick run stored, both files checked for what every result must state."""
    record = json.loads((folder / f"{suite}-quick.json").read_text())
    text = (folder / f"{suite}-quick.md").read_text()
    machine = record["environment"]
    assert {"date", "processor", "load average at start", "seed"} <= set(machine)
    assert machine["threads"] == 1
    assert machine["versions"]["torch"] == torch.__version__
    assert {"numpy", "highspy", "cvxpylayers", "scs"} <= set(machine["versions"])
    assert "its figures are no result" in text
    for table in record["tables"]:
        assert f"## {table['title']}" in text
        assert table["rows"]
        assert all(list(row) == list(table["rows"][0]) for row in table["rows"])
        watched = {*table["keys"], *table["smaller"], *table["greater"]}
        assert watched <= set(table["rows"][0])
    assert str(ROOT) not in json.dumps(record)
    return record


@pytest.fixture(scope="module")
def closed_forms(tmp_path_factory):
    """A stored run of two relaxations on one small network."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import closed_forms as suite

    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_NETWORKS", {"FC": "fc-small", "CONV": "conv"})
        patch.setattr(suite, "_QUICK", ("box", "crown"))
        patch.setattr(suite, "_GROWTH", ("box", "crown"))
        patch.setattr(suite, "_COVERED", {"FC": ("fc-small", 1)})
        main("closed_forms", "--out", folder)
    sys.path.remove(str(ROOT))
    return folder / "closed_forms-quick.json"


@pytest.mark.slow
@pytest.mark.data
def test_what_a_device_can_show_runs_on_a_cpu_too(tmp_path, data_dir, monkeypatch):
    from benchmarks import gpu

    quick = {name: part for name, part in gpu.PARTS.items() if name not in ("tests", "training steps, float64")}
    monkeypatch.setattr(gpu, "PARTS", quick)
    main("gpu", "--device", "cpu", "--data", "digits", "--data-dir", data_dir, "--cache", tmp_path, "--out", tmp_path)
    tables = {table["title"]: table["rows"] for table in stored(tmp_path, "gpu")["tables"]}
    assert {row["outcome"] for row in tables["Parts"]} == {"done"}
    assert len(tables) == len(tables["Parts"]) + 1
    assert all(row["ms"] > 0 for row in tables["Training steps, float32"])
    assert {row["closed %"] for row in tables["LP-LAST on CONV"]} == {100.0}


def test_a_part_that_fails_is_named_and_no_other_is_lost(tmp_path, monkeypatch):
    from benchmarks import gpu

    def fails(options):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu, "PARTS", {"first": fails, "second": gpu.ceilings, "late": fails})
    main("gpu", "--device", "cpu", "--out", tmp_path)
    rows = json.loads((tmp_path / "gpu-quick.json").read_text())["tables"][0]["rows"]
    assert [row["outcome"] for row in rows[:2]] == ["FAILED: RuntimeError: no such thing", "done"]
    main("gpu", "--device", "cpu", "--minutes", "0", "--out", tmp_path)
    rows = json.loads((tmp_path / "gpu-quick.json").read_text())["tables"][0]["rows"]
    assert {row["outcome"] for row in rows} == {"not run: no time left"}


@pytest.mark.slow
def test_closed_forms_are_measured_and_stored(closed_forms):
    record = stored(closed_forms.parent, "closed_forms")
    assert [table["title"] for table in record["tables"]] == [
        "FC, batch 4",
        "CONV, batch 4",
        "Growth with the batch",
        "First use",
    ]
    for table in record["tables"][:2]:
        rows = {row["relaxation"]: row for row in table["rows"]}
        assert set(rows) == {"box", "crown"}
        # What so small a step of Box holds may fit into pages that the process had before.
        unsigned = ("relaxation", "spread", "peak MiB")
        assert all(value > 0 for row in rows.values() for key, value in row.items() if key not in unsigned)
        assert rows["crown"]["peak MiB"] > rows["box"]["peak MiB"] >= 0
        # One round: the ratio is that of the two times.
        assert rows["box"]["step / products"] == pytest.approx(rows["box"]["step ms"] / rows["box"]["products ms"])
    # FC and CONV: Box against its own step, CROWN against its products; CONV: memory.
    assert len(record["bars"]) == 5
    first, second = record["tables"][2]["rows"]
    assert (first["network"], first["batch"], second["batch"]) == ("FC", 1, 2)
    # Rows of every neuron are measured up to the batch that the network is covered at.
    assert first["crown / own step"] > first["box / own step"] > 0
    assert second["crown / own step"] is None
    kernels = {row["kernels"]: row for row in record["tables"][3]["rows"]}
    assert {"relax_step", "band_step", "ascent"} <= set(kernels)
    assert all(row["compile ms"] > row["load ms"] > 0 for row in kernels.values())


@pytest.mark.slow
def test_growth_is_measured_and_stored(tmp_path, monkeypatch):
    from benchmarks import growth

    monkeypatch.setattr(growth, "_PROBED", ("triangle",))  # each is a process of its own
    main("growth", "--out", tmp_path)
    batch, eps, summary = (table["rows"] for table in stored(tmp_path, "growth")["tables"])
    assert [row["batch"] for row in batch] == [1, 2]
    assert [row["eps"] for row in eps] == [0.01, 0.05]
    for row in (*batch, *eps):
        assert row["crown / own step"] > 1
        assert row["triangle peak MiB"] is not None
    assert summary[0]["box x"] == pytest.approx(batch[1]["box ms"] / batch[0]["box ms"])


def test_programs_are_measured_beside_the_peers_that_are_installed(monkeypatch):
    from benchmarks import program_peers, programs
    from benchmarks.reports import Options

    names = ("cvxpylayers", "manylp")
    monkeypatch.setattr(programs, "PEERS", {name: program_peers.PEERS[name] for name in names})
    report = programs.run(Options(threads=1, quick=True, runs=1))
    lps, qps, families, sparse = report.tables
    assert all(table.rows for table in report.tables)
    assert all(row["gap"] <= 1e-8 and row["cvxpylayers off"] <= 1e-6 for row in (*lps.rows, *qps.rows))
    assert all(row["ours ms"] > row["floor ms"] > 0 and row["times HiGHS"] > 0 for row in lps.rows)
    assert {row["solver"] for row in families.rows} == {"InteriorPoint"}
    assert all(row["gap at 0.0001"] <= 1e-4 and row["gap at 1e-06"] <= 1e-6 for row in sparse.rows)
    assert [bar.held for bar in report.bars if "gap" in bar.what] == [True, True]


@pytest.mark.slow
def test_memory_is_measured_against_what_was_asked(tmp_path):
    main("memory", "--out", tmp_path)
    record = stored(tmp_path, "memory")
    (table,) = record["tables"]
    rows = {row["relaxation"]: row for row in table["rows"]}
    assert set(rows) == {"box", "crown", "triangle"}
    for row in rows.values():
        assert row["measured / asked"] == pytest.approx(row["measured MiB"] / row["asked MiB"])
        assert row["possible"] == "yes"
    (bar,) = record["bars"]
    assert bar["got"] == max(row["measured / asked"] for row in rows.values())
    assert bar["held"]


def test_deep_networks_are_measured_by_windows_and_by_whole_rows(tmp_path):
    main("deep", "--out", tmp_path)
    record = stored(tmp_path, "deep")
    (row,) = record["tables"][0]["rows"]
    assert row["whole rows / windows"] == pytest.approx(row["whole rows [s]"] / row["windows [s]"])
    assert row["auto_LiRPA [s]"] is None
    # Two maps and a layer of 100; of the first map intervals are exact.
    assert row["rows %"] == pytest.approx(100 * (1024 + 100) / (2048 + 1024 + 100))
    assert row["windows [MiB]"] > 0
    assert record["bars"] == []


def test_lp_layers_of_deep_networks_are_measured_beside_their_bounds(tmp_path):
    main("deep_layers", "--out", tmp_path)
    record = stored(tmp_path, "deep_layers")
    rows = record["tables"][0]["rows"]
    assert [row["bounds"] for row in rows] == ["box", "crown-ibp", "box+crown"]
    assert all(row["worst gap"] <= 1e-3 for row in rows)
    assert rows[0]["crossing"] == rows[1]["crossing"] > rows[2]["crossing"]
    assert [bar["got"] for bar in record["bars"]] == [row["LPs / bounds"] for row in rows]


def test_lines_of_smooth_activations_are_held_against_the_best(tmp_path):
    main("smooth_lines", "--out", tmp_path)
    record = stored(tmp_path, "smooth_lines")
    rows = record["tables"][0]["rows"]
    assert [row["function"] for row in rows] == ["sigmoid", "tanh", "gelu", "sin"]
    # Samples' envelopes lie a little within the function's.
    assert all(-1e-9 < row["median %"] <= row["most %"] < 0.1 for row in rows)
    assert len(record["bars"]) in (4, 12)  # the others want auto_LiRPA
    assert all(bar["held"] for bar in record["bars"])


def test_steps_of_smooth_activations_are_measured_and_stored(tmp_path, monkeypatch):
    from benchmarks import smooth_steps

    monkeypatch.setattr(smooth_steps, "_RELAXATIONS", ("box",))
    monkeypatch.setattr(smooth_steps, "_ACTIVATIONS", {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh})
    main("smooth_steps", "--out", tmp_path)
    record = stored(tmp_path, "smooth_steps")
    relu, tanh = record["tables"][0]["rows"]
    assert relu["/ relu"] == 1
    assert tanh["/ relu"] == pytest.approx(tanh["step ms"] / relu["step ms"])
    assert [bar["got"] for bar in record["bars"]] == [tanh["/ relu"]]


def test_deep_networks_are_told_apart_by_what_a_probe_is_given():
    from benchmarks import deep

    assert [deep._EVERY.index(case) for case in deep._EVERY] == list(range(len(deep._EVERY)))


def test_relaxation_steps_are_measured_and_stored(tmp_path):
    main("relaxation_steps", "--out", tmp_path)
    (table,) = stored(tmp_path, "relaxation_steps")["tables"]
    assert [row["step"] for row in table["rows"]] == ["two slopes", "parallel lines"]
    for row in table["rows"]:
        assert row["kernels"] == "C"
        assert all(row[key] > 0 for key in ("forward ms", "both ms", "forward / floor", "both / floor", "both / eager"))


@pytest.mark.slow
def test_shortcuts_are_measured_against_the_same_step_without_them(tmp_path):
    main("shortcuts", "--out", tmp_path)
    record = stored(tmp_path, "shortcuts")
    (table,) = record["tables"]
    assert len({row["shortcut"] for row in table["rows"]}) == 4
    for row in table["rows"]:
        # One round: the ratio is that of the two times.
        assert row["times faster"] == pytest.approx(row["without ms"] / row["with ms"])
    # The switches do switch: sums in another order, or other kernels, leave their trace; the bounds stay equal.
    assert max(row["difference"] for row in table["rows"]) > 0
    assert all(bar["held"] for bar in record["bars"])


@pytest.mark.slow
def test_training_steps_are_measured_and_stored(tmp_path, monkeypatch):
    from benchmarks import training_steps

    monkeypatch.setattr(training_steps, "NAMES", ("crown", "triangle", "layerwise"))
    main("training_steps", "--data", "digits", "--cache", tmp_path / "cache", "--out", tmp_path)
    record = stored(tmp_path, "training_steps")
    assert len(record["tables"]) == 3
    for table in record["tables"]:
        crown, triangle, layerwise = table["rows"]
        assert crown["/ crown"] == 1
        assert triangle["/ crown"] == pytest.approx(triangle["step ms"] / crown["step ms"])
        # Certified gaps of all LPs: those of hidden neurons are counted too.
        assert 0 <= triangle["median gap"] < 1e-2
        assert layerwise["unfinished %"] is not None
        assert crown["median gap"] is None
    assert [bar["at_most"] for bar in record["bars"]] == 3 * [2.0, 20.0, 1e-3]


@pytest.mark.slow
def test_alpha_crown_is_timed_alone_where_there_is_nothing_to_compare_with(tmp_path, monkeypatch):
    from benchmarks import alpha_crown, peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(alpha_crown, "_ALONE", 2)
    main("alpha_crown", "--out", tmp_path)
    (row,) = stored(tmp_path, "alpha_crown")["tables"][0]["rows"]
    assert (row["auto_LiRPA"], row["our iterations"], row["speed-up"]) == ("not installed", 2, None)
    assert row["our s"] > 0
    assert row["our MiB"] > 0


def test_alpha_crown_takes_the_least_iterations_to_an_equal_bound(monkeypatch):
    from benchmarks import alpha_crown

    of = alpha_crown.margins("fc-small", 1, 0, "cpu")
    iterations, crown = alpha_crown._reach(of, -1e9)
    assert iterations == 0
    found, bound = alpha_crown._reach(of, crown + 1e-3)
    assert found is not None
    assert found > 0
    assert bound >= crown + 1e-3
    monkeypatch.setattr(alpha_crown, "_LADDER", (0, 1))
    assert alpha_crown._reach(of, 1e9)[0] is None


@pytest.mark.slow
def test_lp_layers_are_measured_and_stored(tmp_path, monkeypatch):
    from benchmarks import lp_layers

    every = lp_layers.settings
    monkeypatch.setattr(lp_layers, "settings", lambda sizes, seed: every(sizes, seed)[1:2])
    given = ("lp_layers", "--data", "digits", "--cache", tmp_path / "cache", "--out", tmp_path)
    main(*given)
    record = stored(tmp_path, "lp_layers")
    times, accuracy, whole, conv, ways = (table["rows"] for table in record["tables"])
    found = {row["solver"]: row for row in accuracy}
    # HiGHS is the oracle of the error, and the gap is certified: neither can be less than the other says.
    for name, tol in (
        ("DualAscent tol 1e-4, float64", 1e-4),
        ("DualAscent tol 1e-3, float64", 1e-3),
        ("InteriorPoint", 1e-6),
    ):
        assert found[name]["closed %"] == 100
        assert found[name]["error 99 %"] <= found[name]["gap 99 %"] + 1e-7
        assert found[name]["gap 99 %"] <= tol
    assert found["CROWN"]["error 99 %"] > 1e-4
    assert found["cvxpylayers"]["error 99 %"] < 1e-2
    speed = {row["solver"]: row for row in times}
    ours, highs = speed["DualAscent tol 1e-4, float64"], speed["HiGHS"]
    assert ours["x HiGHS"] == pytest.approx(highs["forward ms"] / ours["forward + gradient ms"])
    assert ours["floor us"] < 1e3 * ours["forward ms"]
    assert whole[0]["error 99 %"] < 1e-3
    assert whole[0]["LPs an image"] > 9
    assert [row["type"] for row in conv] == ["float32", "float64"]
    assert conv[0]["peak MiB"] < conv[1]["peak MiB"] < 4096
    assert {row["kept"] for row in ways} == {"chosen", "crossing", "all but the dead", "all, in sweeps"}
    assert len(ways) == 8
    assert all(row["difference"] < 3e-4 for row in ways)
    # A second run trains and solves nothing again.
    assert len(list((tmp_path / "cache").iterdir())) == 3


# --- floors -------------------------------------------------------------------------------------------------------


def flops(call):
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


FAMILIES = ("box", "hbox", "deepz", "cauchy", "fast-lin", "crown", "crown-ibp")


@pytest.mark.parametrize(
    ("model", "name"),
    [("fc-small", name) for name in CLOSED_FORMS] + [(model, n) for model in ("conv", "residual") for n in FAMILIES],
)
def test_no_relaxation_does_less_than_its_floor(model, name, monkeypatch):
    from benchmarks import closed_forms, products
    from optrelax.kernels import native

    # The counter sees PyTorch's products alone.
    monkeypatch.setattr(native.Build, "supports", lambda *given: False)
    of = closed_forms.case(model, 1, 0, "cpu")
    need = products.needed(of.network, resolve(name), 1, 9)
    count = 2 * products.multiply_adds(of.network, need)
    assert count > 0
    assert count <= flops(lambda: of.forward(resolve(name)))
    assert flops(products.bare(of.network, need, of.x, gradient=False)) == count


def test_products_of_fast_lin_counted_by_hand():
    from benchmarks import closed_forms, products

    network = closed_forms.case("fc-small", 5, 0, "cpu").network  # 784-100-100-10
    need = products.needed(network, resolve("fast-lin"), 5, 9)
    exact = 2 * 5 * 784 * 100  # centre and radius of the first layer
    hidden = 100 * 5 * 100 * 784  # a row a neuron of the second layer, pulled from the first layer to the input
    output = 9 * 5 * (10 * 100 + 100 * 100 + 100 * 784)
    assert products.multiply_adds(network, need) == exact + hidden + output
    both = products.needed(network, resolve("crown"), 5, 9)
    assert products.multiply_adds(network, both) == exact + 2 * hidden + output


@pytest.mark.parametrize("model", ["fc-small", "conv"])
def test_bare_step_takes_two_more_products_each(model):
    from benchmarks import closed_forms, products

    network = closed_forms.case(model, 3, 0, "cpu").network
    need = products.two_sweeps(network, 3)
    stopped = [p for p in need if p.constant]
    forward = 2 * products.multiply_adds(network, need)
    expected = 3 * forward - 2 * products.multiply_adds(network, stopped)
    like = torch.zeros(1)
    assert flops(products.bare(network, need, like, gradient=True)) == expected
    assert stopped  # no gradient by the image


# --- measuring ----------------------------------------------------------------------------------------------------


def held(device, mebibytes):
    """For the child of `peak_bytes`: what is there before the call, and what is freed before it, do not count."""
    torch.ones(300 * 2**18)
    kept = torch.ones(100 * 2**18)
    return lambda: (torch.ones(mebibytes * 2**18, device=device).sum() + kept.sum()).item()


def broken(device):
    raise ValueError("no such network")


def test_peak_memory_is_that_of_the_call(monkeypatch):
    from benchmarks.measuring import peak_bytes

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    assert peak_bytes(held, threads=1, mebibytes=200) == pytest.approx(200 * 2**20, rel=0.05)
    assert peak_bytes(held, threads=1, mebibytes=2**30) is None
    with pytest.raises(RuntimeError, match="no such network"):
        peak_bytes(broken, threads=1)


def test_tasks_are_interleaved_and_ratios_taken_round_by_round():
    from benchmarks.measuring import Samples, interleaved

    order = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=3, least=0.0)
    assert "".join(order)[-6:] == "ababab"
    assert set(found.seconds) == {"a", "b"}
    assert [len(times) for times in found.seconds.values()] == [3, 3]
    # The machine slows down to a third on the way: the ratio does not.
    drift = Samples({"a": (2.0, 4.0, 6.0), "b": (1.0, 2.0, 3.0)})
    assert drift.ratio("a", "b") == 2
    assert drift.median("a") == 4
    assert drift.spread("b") == 1
    with pytest.raises(ValueError, match="runs must be >= 1, got 0"):
        interleaved({}, runs=0)


def test_a_bar_without_a_figure_is_not_held():
    from benchmarks.reports import Bar

    assert Bar("memory", 4.0, None, 4.0).held
    assert not Bar("memory", 4.0, None, 4.1).held
    assert Bar("speed", None, 200.0, 200.0).held
    assert not Bar("speed", None, 200.0, 199.0).held
    assert not Bar("speed", None, 200.0, None).held


# --- regression ---------------------------------------------------------------------------------------------------


@pytest.fixture
def check(capsys):
    """The regression check: exit code, standard output, standard error."""

    def run(*arguments):
        from benchmarks.regression import main

        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def result(tmp_path):
    """A stored result, and a function that stores another one after a change."""
    from benchmarks.reports import Options, Report, Table

    rows = [
        {"solver": "a", "ratio": 2.0, "x HiGHS": 300.0, "ms": 5.0},
        {"solver": "b", "ratio": 0.0, "x HiGHS": None, "ms": 1.0},
    ]
    table = Table(title="LPs", keys=("solver",), rows=rows, smaller=("ratio",), greater=("x HiGHS",))
    report = Report("trial", "Trial", Options(threads=1), [table], environment={"processor": "P"})
    (tmp_path / "old").mkdir()
    _, path = report.write(tmp_path / "old")

    def changed(change):
        record = copy.deepcopy(json.loads(path.read_text()))
        change(record, record["tables"][0]["rows"])
        other = tmp_path / "new.json"
        other.write_text(json.dumps(record))
        return other

    return path, changed


def test_equal_results_pass(result, check):
    old, changed = result
    code, output, errors = check(old, changed(lambda record, rows: rows[0].update({"ms": 50.0, "ratio": 2.4})))
    assert code == 0, output + errors
    assert "0 of 3 figures worse by more than 25 %" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update({"ratio": 2.6}), "LPs: a: ratio was 2, is 2.6 (+30 % worse)"),
        (lambda rows: rows[0].update({"x HiGHS": 150.0}), "LPs: a: x HiGHS was 300, is 150 (+100 % worse)"),
        (lambda rows: rows[0].update({"x HiGHS": None}), "LPs: a: x HiGHS was 300, is gone"),
        (lambda rows: rows.pop(0), "LPs: a: ratio was 2, is gone"),
        (lambda rows: rows[1].update({"ratio": 0.1}), "LPs: b: ratio was 0, is 0.1 (+inf % worse)"),
    ],
)
def test_a_planted_slowdown_is_found(result, check, change, message):
    old, changed = result
    code, output, _ = check(old, changed(lambda record, rows: change(rows)))
    assert code == 1
    assert message in output.splitlines()


def test_results_from_before_an_option_compare(result, check):
    old, changed = result
    assert check(old, changed(lambda record, rows: record["options"].pop("processor_time")))[0] == 0


def test_the_threshold_is_the_users(result, check):
    old, changed = result
    new = changed(lambda record, rows: rows[0].update({"ratio": 2.6}))
    assert check(old, new, "--threshold", 0.4)[0] == 0
    with pytest.raises(SystemExit):
        check(old, new, "--threshold", -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record, rows: record.update(suite="other"), "different suite: trial and other"),
        (lambda record, rows: record["options"].update(threads=2), "different options"),
        (lambda record, rows: record.update(format="foreign"), "is no benchmark result"),
    ],
)
def test_results_that_do_not_compare_are_refused(result, check, change, message):
    old, changed = result
    code, _, errors = check(old, changed(change))
    assert code == 2
    assert message in errors
    assert check(old, old.parent / "missing.json")[0] == 2


def test_the_check_is_a_command_with_an_exit_code(result):
    old, changed = result
    new = changed(lambda record, rows: rows[0].update({"ratio": 4.0}))
    command = [sys.executable, "-m", "benchmarks.regression", str(old), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "+100 % worse" in done.stdout


@pytest.mark.slow
def test_a_planted_slowdown_in_a_real_result_is_found(closed_forms, tmp_path):
    from benchmarks.regression import main

    record = json.loads(closed_forms.read_text())
    # No figure is worse than itself.
    assert main([str(closed_forms), str(closed_forms), "--threshold", "0"]) == 0
    record["tables"][0]["rows"][1]["step / products"] *= 1.5
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(record))
    assert main([str(closed_forms), str(slower)]) == 1


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    for arguments, message in ((["closed_form"], "unknown suite 'closed_form'"), (["--runs", "0"], "at least 1")):
        with pytest.raises(SystemExit) as stopped:
            main(*arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_auto_lirpa_is_measured_only_where_it_is_installed(monkeypatch, there):
    from benchmarks import closed_forms, peers

    assert set(peers.AUTO_LIRPA) <= set(CLOSED_FORMS)
    monkeypatch.setattr(peers, "find_spec", lambda name: object() if there and name == "auto_LiRPA" else None)
    assert closed_forms._peers({"box": 1, "hbox": 1}) == (["box"] if there else [])


def test_auto_lirpa_of_a_checkout_is_the_one_compared_with(tmp_path, monkeypatch):
    from benchmarks import peers
    from benchmarks.reports import Options, environment

    (tmp_path / "auto_LiRPA").mkdir()
    (tmp_path / "auto_LiRPA" / "__init__.py").write_text("__version__ = '9.9'\n")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.delitem(sys.modules, "auto_LiRPA", raising=False)
    peers.use_checkout(str(tmp_path))
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "elsewhere"]
    assert environment(Options(threads=1))["versions"]["auto_LiRPA"] == "9.9"
    del sys.modules["auto_LiRPA"]


def test_closed_forms_of_one_network_measure_nothing_else(monkeypatch):
    from benchmarks import closed_forms
    from benchmarks.reports import Options, Table

    row = {"relaxation": "crown", "step / products": 1.0, "peak MiB": 1.0}
    monkeypatch.setattr(closed_forms, "_table", lambda label, *_: Table(title=label, keys=("relaxation",), rows=[row]))
    report = closed_forms.run(Options(threads=1, quick=True, networks=("CONV",)))
    assert [table.title for table in report.tables] == ["CONV"]
