"""Verdicts against outside oracles, failures that spoil only themselves, journals that resume to the same numbers."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import oracles
import pytest
import torch
from cases import inputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import optrelax as ox
from optrelax.certification import estimates
from optrelax.certification.attacks import PGD
from optrelax.certification.certifiers import Certifier
from optrelax.data.samples import gather
from optrelax.layers.milp import Milp
from optrelax.output import json_lines
from optrelax.relaxations import resolve
from optrelax.training.robust_losses import FusedLoss

CLOSED = ["box", "hbox", "deepz", "fast-lin", "crown", "crown-ibp", "box-round:omega=0.01,F=10"]
EPS = 0.15


def small() -> nn.Sequential:
    return ox.models.fc(4, 10, 8, 3, seed=10)


def examples(count: int = 24) -> tuple[Tensor, Tensor]:
    """Inputs with the network's own labels, but for every eighth, which is wrong."""
    x = inputs((4,), count).float()
    labels = small()(x).argmax(1)
    wrong = torch.arange(count) % 8 == 7
    return x, torch.where(wrong, (labels + 1) % 3, labels)


def exact_margins(x: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Smallest margin of each example by MILP, an oracle of the tests."""
    net = small().double()
    network = ox.capture(net, (4,))
    region = ox.LinfBall(x.double(), eps, (0.0, 1.0))
    with torch.no_grad():
        before = resolve("crown").preactivation_bounds(network, region)
        values = []
        for i in range(len(x)):
            one = {name: ox.Bounds(b.lower[i : i + 1], b.upper[i : i + 1]) for name, b in before.items()}
            rows = ox.margins(labels[i : i + 1], 3)[0]
            values.append(oracles.minimum(network, region.select(slice(i, i + 1)), rows, one, integer=True).amin())
    return torch.stack(values)


class Spiteful(ox.Box):
    """Box that fails, or gives NaN, wherever the first pixel is large."""

    def lower_bounds(self, network, region, rows):
        if bool((region.lower[:, 0] > 0.7).any()):
            raise ArithmeticError("the solver gave up")
        return super().lower_bounds(network, region, rows)


class NotANumber(ox.Box):
    """Box with one NaN margin wherever the first pixel is large."""

    def lower_bounds(self, network, region, rows):
        bound = super().lower_bounds(network, region, rows).clone()
        bound[region.lower[:, 0] > 0.7, 0] = torch.nan
        return bound


class Liar(ox.Box):
    """Claims a margin of 1 for everything."""

    def lower_bounds(self, network, region, rows):
        return torch.ones(len(region.lower), rows.shape[1], dtype=region.dtype)


class Tied(ox.Box):
    """Claims a margin of exactly 0."""

    def lower_bounds(self, network, region, rows):
        return torch.zeros(len(region.lower), rows.shape[1], dtype=region.dtype)


class Broken(ox.Box):
    """Fails everywhere."""

    def lower_bounds(self, network, region, rows):
        raise ArithmeticError("out of order")


# --- verdicts -----------------------------------------------------------------------------------------------------


def test_verdicts_agree_with_the_exact_margins():
    x, labels = examples(32)
    truth = exact_margins(x, labels, EPS)
    seen = set()
    for names in (CLOSED, "box"):
        report = ox.certify(small(), (x, labels), EPS, relaxation=names, exact=True)
        verdicts = report.examples["verdict"].to_list()
        for verdict, margin in zip(verdicts, truth.tolist(), strict=True):
            assert (verdict in ("certified", "certified (MILP)")) == (margin > 0)
            assert (verdict == "attacked") == (margin <= 0)
        seen |= set(verdicts)
    assert seen == {"certified", "certified (MILP)", "attacked"}
    assert report.certified_milp == verdicts.count("certified (MILP)") / 32
    report = ox.certify(small(), (x, labels), EPS, relaxation=CLOSED)
    for name in CLOSED:
        lower = torch.tensor(report.examples[f"lower:{name}"].to_list(), dtype=torch.float64)
        assert bool((lower <= truth + 1e-9).all())
    attacked = torch.tensor(report.examples["attack_margin"].to_list(), dtype=torch.float64)
    assert bool((attacked >= truth - 1e-9).all())


def test_fractions_count_the_table():
    x, labels = examples()
    net = small()
    report = ox.certify(net, (x, labels), EPS, relaxation=["box", "crown"])
    frame = report.examples
    assert frame.height == 24
    assert report.accuracy == float((net(x).argmax(1) == labels).double().mean())
    for name, value in (
        ("certified", report.certified),
        ("attacked", report.attacked),
        ("undecided", report.undecided),
        ("error", report.errors),
    ):
        assert value == (frame["verdict"] == name).sum() / 24
    parts = report.certified + report.certified_milp + report.attacked + report.undecided + report.errors
    assert parts == pytest.approx(1)
    assert report.certified_by["box"] <= report.certified_by["crown"] == report.certified
    assert report.pgd_accuracy == 1 - report.attacked
    assert frame["index"].to_list() == list(range(24))
    assert frame["label"].to_list() == labels.tolist()
    table = report.table()
    assert table["relaxation"].to_list() == ["box", "crown"]
    assert table["misclassified at most %"].to_list() == pytest.approx(
        [100 * (1 - v) for v in report.certified_by.values()]
    )
    assert json.loads(json.dumps(report.summary()))["certified"] == report.certified
    assert "24 examples" in str(report)


def test_misclassified_inputs_are_attacked_without_an_attack():
    x, labels = examples()
    report = ox.certify(small(), (x, labels), 0.0, attack=None)
    assert report.attacked == 3 / 24
    assert report.certified == 21 / 24
    assert report.pgd_accuracy is None
    assert report.examples["attack_margin"].null_count() == 24


def test_a_tie_is_not_certified_and_is_a_counterexample():
    """Two equal logits: the margin at the input is 0, which is no proof and no robustness."""
    net = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    report = ox.certify(net, (torch.zeros(1, 2), torch.tensor([0])), 0.0)
    assert report.attacked == 1
    assert report.accuracy == 1  # argmax takes the first of equals
    robust = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(robust[0].weight)
    with torch.no_grad():
        robust[0].bias.copy_(torch.tensor([1.0, 0.0]))
    report = ox.certify(robust, (torch.zeros(1, 2), torch.tensor([0])), 0.1, relaxation=Tied())
    assert report.undecided == 1
    assert ox.certify(robust, (torch.zeros(1, 2), torch.tensor([0])), 0.1).certified == 1


def test_wider_regions_never_certify_more_nor_lose_counterexamples():
    x, labels = examples()
    reports = [ox.certify(small(), (x, labels), eps, relaxation="box") for eps in (0.0, 0.02, 0.1, 0.4)]
    assert [r.certified for r in reports] == sorted((r.certified for r in reports), reverse=True)
    for small_one, large in itertools.pairwise(reports):
        found = small_one.examples["verdict"] == "attacked"
        assert not (large.examples["verdict"] == "certified").filter(found).any()


def test_clip_is_part_of_the_region():
    """At the edge of the range only half of the ball is there."""
    net = nn.Sequential(nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[0].bias.copy_(torch.tensor([0.05, 0.0]))
    data = torch.zeros(1, 1), torch.tensor([0])
    assert ox.certify(net, data, 0.1).certified == 1
    assert ox.certify(net, data, 0.1, clip=None).attacked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_in_either_precision_hold(dtype):
    x, labels = examples()
    truth = exact_margins(x, labels, EPS)
    report = ox.certify(small(), (x, labels), EPS, relaxation="crown", dtype=dtype)
    lower = torch.tensor(report.examples["lower:crown"].to_list(), dtype=torch.float64)
    assert bool((lower <= truth + 1e-9).all())
    assert report.settings["dtype"] == str(dtype).removeprefix("torch.")
    assert report.certified > 0


def test_network_is_not_changed():
    x, labels = examples(4)
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ox.certify(net, (x, labels), EPS)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None and p.requires_grad for p in net.parameters())


def test_results_do_not_depend_on_batches_or_subsets():
    x, labels = examples()
    columns = ["verdict", "attack_margin", "lower:crown"]
    whole = ox.certify(small(), (x, labels), EPS).examples
    parts = ox.certify(small(), (x, labels), EPS, batch_size=5, max_bytes=1).examples
    some = ox.certify(small(), (x, labels), EPS, subset=7).examples
    assert whole["verdict"].to_list() == parts["verdict"].to_list()
    for name in columns[1:]:
        assert whole[name].to_list() == pytest.approx(parts[name].to_list(), rel=1e-9)
        picked = whole[name].gather(some["index"]).to_list()
        assert some[name].to_list() == pytest.approx(picked, rel=1e-9)
    assert some["index"].to_list() == [0, 3, 7, 11, 15, 19, 23]


def test_intervals_take_whole_batches_and_rows_are_cut():
    samples = gather(examples(3))
    names = ["box", "crown", "box+crown", ox.Box(max_bytes=7)]

    def limits(max_bytes: int | None) -> list[tuple[float | None, ...]]:
        run = Certifier.prepared(small(), samples, 0.1, None, names, "outward", torch.float64, max_bytes)
        return [tuple(part.max_bytes for part in r.parts) or (r.max_bytes,) for r in run.relaxations.values()]

    assert limits(None) == [(None,), (2**25,), (None, 2**25), (7,)]
    assert limits(1000) == [(1000,), (1000,), (1000, 1000), (7,)]


def test_outward_bounds_lie_below_the_nearest():
    x, labels = examples()
    lower = {
        rounding: ox.certify(small(), (x, labels), EPS, rounding=rounding).examples["lower:crown"].to_numpy()
        for rounding in ("outward", "nearest")
    }
    assert (lower["outward"] < lower["nearest"]).all()
    assert np.allclose(lower["outward"], lower["nearest"], atol=1e-9)


# --- cascades -----------------------------------------------------------------------------------------------------


class Counted(ox.Crown):
    """CROWN that writes down the centres of the regions that it is asked."""

    asked: ClassVar[list[Tensor]] = []

    def lower_bounds(self, network, region, rows):
        self.asked.append(region.center)
        return super().lower_bounds(network, region, rows)


CASCADE = {"box": "box", "crown-ibp": "crown-ibp", "counted": Counted()}


@pytest.mark.parametrize("exact", [False, True])
def test_a_cascade_has_the_verdicts_of_all_relaxations_for_less_work(exact):
    x, labels = examples()
    Counted.asked.clear()
    part = ox.certify(small(), (x, labels), 0.08, relaxation=CASCADE, exact=exact, cascade=True, batch_size=7)
    asked = torch.cat(Counted.asked)
    whole = ox.certify(small(), (x, labels), 0.08, relaxation=CASCADE, exact=exact)
    assert part.examples["verdict"].to_list() == whole.examples["verdict"].to_list()
    assert (part.certified, part.pgd_accuracy) == (whole.certified, whole.pgd_accuracy)
    still = [row["natural_margin"] > 0 for row in whole.examples.to_dicts()]
    for rank, name in enumerate(CASCADE):
        before, after = whole.examples[f"lower:{name}"].to_list(), part.examples[f"lower:{name}"].to_list()
        assert [bound is not None for bound in after] == still
        same = [(a, b) for a, b in zip(before, after, strict=True) if b is not None]
        assert [b for _, b in same] == pytest.approx([a for a, _ in same], rel=1e-9)
        still = [s and not b > 0 for s, b in zip(still, before, strict=True)]
        if rank == 0:
            assert [m is not None for m in part.examples["attack_margin"]] == still
            still = [s and m > 0 for s, m in zip(still, whole.examples["attack_margin"], strict=True)]
    assert 0 < len(asked) == part.asked["counted"] < part.asked["crown-ibp"] < part.asked["box"] == 21
    assert min(part.table()["certified"]) > 0


def test_the_table_of_a_cascade_adds_up():
    report = ox.certify(small(), examples(), 0.08, relaxation=CASCADE, attack=None, cascade=True)
    table, shares = report.table(), list(report.certified_by.values())
    assert sum(shares) == pytest.approx(report.certified)
    assert table["certified"].sum() == round(24 * report.certified)
    assert table["certified %"].to_list() == pytest.approx([100 * sum(shares[: i + 1]) for i in range(3)])
    assert table["asked"].to_list() == [21, 21 - table["certified"][0], 21 - sum(table["certified"][:2])]
    assert report.summary()["asked"] == report.asked
    alone = ox.certify(small(), examples(), 0.08, relaxation=CASCADE, attack=None).table()
    assert not {"asked", "certified", "seconds"} & set(alone.columns)
    for name, share in report.summary()["seconds_by"].items():
        assert share == report.examples[f"seconds:{name}"].sum() > 0


def test_a_cascade_resumes_and_its_journal_is_checked(tmp_path):
    path = tmp_path / "journal.jsonl"
    options = {"relaxation": CASCADE, "cascade": True, "batch_size": 5}
    whole = ox.certify(small(), examples(), 0.08, **options)
    with pytest.raises(KeyboardInterrupt):
        ox.certify(small(), examples(), 0.08, resume=path, progress=interrupt_after(2), **options)
    assert results(ox.certify(small(), examples(), 0.08, resume=path, **options)).equals(results(whole))
    first = whole.examples.filter(whole.examples["lower:box"] > 0)["index"][0]
    edit(path, lambda record: record | {"lower": [*record["lower"][:1], 0.5, None]}, first + 2)
    with pytest.raises(ValueError, match="it lacks a bound that this run asks for, or has one more"):
        ox.certify(small(), examples(), 0.08, resume=path, **options)


def test_a_cascade_keeps_failures_apart_and_its_specification():
    x, labels = examples()
    x[3, 1] = torch.nan
    names = ["box", NotANumber(), Spiteful()]
    report = ox.certify(small(), (x, labels), 0.08, relaxation=names, cascade=True)
    assert report.examples["verdict"][3] == "error"
    failed = report.examples.filter(report.examples["verdict"] == "error")
    assert all(row["lower:box"] is None or not row["lower:box"] > 0 for row in failed.to_dicts())
    x, labels = examples()
    spec = {"first": ox.margins(labels, 3)[:, :1], "second": ox.margins(labels, 3)[:, 1:]}
    asked = {"region": ox.LinfBall(x, 0.08), "spec": spec, "relaxation": ["box", "crown"]}
    whole, part = (ox.certify(small(), x, cascade=cascade, **asked) for cascade in (False, True))
    assert part.examples["verdict"].to_list() == whole.examples["verdict"].to_list()
    for name in ("first", "second"):
        told = part.examples[f"lower:box:{name}"]
        assert told.null_count() == 24 - part.asked["box"] > 0
        assert 0 < part.certified_rows[name] <= whole.certified_rows[name]


# --- failures -----------------------------------------------------------------------------------------------------


def test_an_exception_spoils_only_its_own_example():
    x, labels = examples()
    bad = (x[:, 0] - EPS > 0.7).tolist()
    assert 1 <= sum(bad) <= 12
    report = ox.certify(small(), (x, labels), EPS, relaxation=["crown", Spiteful()], batch_size=24)
    plain = ox.certify(small(), (x, labels), EPS, relaxation="crown")
    for spoiled, row, other in zip(bad, report.examples.to_dicts(), plain.examples.to_dicts(), strict=True):
        assert (row["verdict"] == "error") == spoiled
        if spoiled:
            assert row["message"] == "ArithmeticError: the solver gave up"
            assert row["lower:crown"] is None
        else:
            assert row["verdict"] == other["verdict"]
    assert report.errors == sum(bad) / 24
    assert report.certified_by["crown"] < plain.certified_by["crown"]


def test_nan_is_an_error_and_never_certified():
    x, labels = examples()
    bad = (x[:, 0] - EPS > 0.7).tolist()
    report = ox.certify(small(), (x, labels), EPS, relaxation=["crown", NotANumber()])
    for spoiled, row in zip(bad, report.examples.to_dicts(), strict=True):
        assert (row["verdict"] == "error") == spoiled
    assert "not a number" in report.examples["message"].to_list()[bad.index(True)]
    assert math.isnan(report.examples["lower:NotANumber"].to_list()[bad.index(True)])


def test_nan_pixels_and_nan_weights_are_errors():
    x, labels = examples(4)
    x[2, 1] = torch.nan
    report = ox.certify(small(), (x, labels), EPS)
    assert [v == "error" for v in report.examples["verdict"]] == [False, False, True, False]
    assert "NaN" in report.examples["message"][2]
    net = small()
    with torch.no_grad():
        net[-1].weight[0, 0] = torch.nan
    report = ox.certify(net, examples(4), EPS, relaxation="box")
    assert report.errors == 1
    assert report.accuracy == 0


def test_nan_within_the_region_is_an_error():
    """The logits overflow, to inf - inf, at the middle of the clipped region but not at the input."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for layer, scale in ((net[0], 1e200), (net[2], 1e200)):
            layer.weight.fill_(scale)
            layer.bias.zero_()
        net[2].weight[1] *= -1
        net[2].weight[:, 1] *= -1
    data = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])
    report = ox.certify(net, data, 0.5, relaxation=Tied())
    assert report.examples["natural_margin"].to_list() == [0.0]
    assert report.errors == 1
    assert report.examples["message"].to_list() == ["the network gives NaN within the region"]


def test_a_contradiction_is_a_loud_error():
    x, labels = examples()
    with pytest.warns(RuntimeWarning, match="contradiction: certified by Liar .* fault of a relaxation"):
        report = ox.certify(small(), (x, labels), EPS, relaxation=Liar())
    plain = ox.certify(small(), (x, labels), EPS)
    assert report.errors == plain.attacked > 0
    assert report.certified == 1 - plain.attacked


def test_settings_that_never_work_raise():
    with pytest.raises(ArithmeticError, match="out of order"):
        ox.certify(small(), examples(), EPS, relaxation=Broken())


def test_a_failing_milp_is_an_error_of_its_example(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no licence")

    monkeypatch.setattr(Milp, "decide", fail)
    plain = ox.certify(small(), examples(), EPS, relaxation="box")
    report = ox.certify(small(), examples(), EPS, relaxation="box", exact=True)
    assert report.errors == plain.undecided > 0
    assert report.certified == plain.certified


def test_progress_counts_up():
    seen = []
    ox.certify(small(), examples(), EPS, batch_size=10, progress=seen.append)
    assert [p.done for p in seen] == [0, 10, 20, 24]
    assert all(p.total == 24 and sum(p.counts.values()) == p.done for p in seen)
    assert seen[0].expected > 0
    assert all(p.expected is None for p in seen[1:])


@pytest.mark.parametrize("count", [8, 9])
def test_of_few_examples_none_is_tried_beforehand(count, monkeypatch):
    """A trial of one of them would be long beside them."""
    asked, seen = [], []
    lower_bounds = ox.Box.lower_bounds
    monkeypatch.setattr(ox.Box, "lower_bounds", lambda *args: asked.append(1) or lower_bounds(*args))
    x, labels = examples()
    ox.certify(small(), (x[:count], labels[:count]), EPS, relaxation="box", batch_size=count, progress=seen.append)
    assert (seen[0].expected is None) == (count <= estimates.FEW)
    assert len(asked) == 1 + (count > estimates.FEW)


def test_the_time_to_expect_is_that_of_batches_where_they_tell(monkeypatch):
    """One example that takes a minute is enough; quick ones are tried in lots that double, the first one twice."""
    now, lots = [0.0], []
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: now[0])

    def expected(of_a_lot: float, of_an_example: float, count: int, size: int = 16) -> float:
        def work(positions):
            lots.append(len(positions))
            now[0] += of_a_lot + of_an_example * len(positions)

        lots.clear()
        return estimates.expected_seconds(work, torch.arange(count), size)

    assert expected(0, 60, 100) == pytest.approx(6000)
    assert lots == [1]
    assert expected(0.01, 0.001, 10_000) == pytest.approx(10_000 * (0.01 / 16 + 0.001))
    assert lots == [1, 1, 2, 4, 8, 16]
    assert expected(0.01, 0.001, 100) == pytest.approx(1.1)  # too short for a word: no more is tried
    assert lots == [1]
    assert expected(0, 1, 0) == 0


def test_a_failure_leaves_the_time_unknown_and_is_reported_by_the_run():
    x, labels = examples()
    x[0, 0] = 1.0
    seen = []
    report = ox.certify(small(), (x, labels), EPS, relaxation=Spiteful(), progress=seen.append)
    assert seen[0].expected is None
    assert report.examples["verdict"][0] == "error"
    assert report.errors < 1


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, r"eps must be a finite number >= 0, got -0.1"),
        ({"eps": math.nan}, ValueError, r"eps must be a finite number >= 0, got nan"),
        ({"relaxation": "cauchy"}, ValueError, r"cauchy is an estimate, not a bound"),
        ({"relaxation": "crwon"}, ValueError, r"unknown relaxation 'crwon'; did you mean 'crown'"),
        ({"relaxation": ["crown", "crown"]}, ValueError, r"'crown' is given twice"),
        ({"relaxation": []}, ValueError, r"at least one relaxation"),
        ({"dtype": torch.float16}, ValueError, r"dtype must be torch.float32 or torch.float64"),
        ({"clip": (1.0, 0.0)}, ValueError, r"clip must be \(low, high\)"),
        ({"clip": ([0.0], [1.0])}, ValueError, r"for one a channel or an input: region=ox.LinfBall\(x, eps, clip\)"),
        ({"eps": torch.tensor([0.1, 0.2])}, ValueError, r"for one a channel or an input: region=ox.LinfBall"),
        ({"clip": (0.0, 0.5)}, ValueError, r"x lies outside clip \[0, 0.5\] in \d+ of 96 entries \(first at \[0, 0\]"),
        ({"batch_size": 0}, ValueError, r"batch_size must be at least 1"),
        ({"subset": 25}, ValueError, r"subset: must lie in 1 .. 24, the examples there are, got 25"),
    ],
)
def test_bad_options(change, error, message):
    options = {"eps": EPS} | change
    with pytest.raises(error, match=message):
        ox.certify(small(), examples(), options.pop("eps"), **options)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((torch.zeros(2, 4), torch.tensor([0, 3])), ValueError, r"labels must lie in \[0, 2\], got 3"),
        ((torch.zeros(2, 4), torch.tensor([0, -1])), ValueError, r"labels must lie in \[0, 2\], got -1"),
        ((torch.zeros(2, 4), torch.tensor([0])), ValueError, r"labels must be \[2\], one an example, got \(1,\)"),
        (
            (torch.zeros(2, 4), torch.tensor([0.0, 1.0])),
            ValueError,
            r"labels must be integers, got torch.float32; use labels.long\(\)",
        ),
        ((torch.zeros(2, 4).byte(), torch.tensor([0, 1])), ValueError, r"x must be float32 or float64.*x / 255"),
        ((torch.zeros(0, 4), torch.zeros(0).long()), ValueError, r"n >= 1"),
        ((torch.zeros(2), torch.tensor([0, 1])), ValueError, r"x must be \[n, \*input_shape\]"),
        ((torch.zeros(2, 4),) * 3, ValueError, r"a pair \(x, labels\) has two entries, got 3"),
        (([[0.0] * 4], [1]), TypeError, r"x must be a tensor or an array, got list"),
        (3, TypeError, r"wants a pair \(x, labels\), a Dataset or a DataLoader, got int"),
        ((torch.zeros(2, 5), torch.tensor([0, 1])), ox.UnsupportedOpError, r"Linear"),
    ],
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        ox.certify(small(), data, EPS)


def test_float64_weights_are_not_rounded_to_float32():
    with pytest.raises(ValueError, match=r"1\.weight is float64"):
        ox.certify(small().double(), examples(), EPS, dtype=torch.float32)


def test_unsupported_networks_raise_at_once():
    net = nn.Sequential(nn.Linear(4, 6), nn.LPPool1d(2, 2))
    with pytest.raises(ox.UnsupportedOpError, match="LPPool1d"):
        ox.certify(net, examples(), EPS)


# --- forms of data ------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Examples without positions."""

    def __iter__(self):
        return iter(zip(*examples(), strict=True))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: [x.numpy(), y.numpy()],
        lambda x, y: TensorDataset(x, y),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=5),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=None),
        lambda x, y: Stream(),
        lambda x, y: DataLoader(Stream(), batch_size=7),
    ],
    ids=["arrays", "dataset", "loader", "loader of singles", "iterable", "loader of an iterable"],
)
def test_every_form_of_data_gives_one_result(form):
    x, labels = examples()
    expected = ox.certify(small(), (x, labels), EPS).examples.drop("seconds", "seconds:crown")
    report = ox.certify(small(), form(x, labels), EPS)
    assert report.examples.drop("seconds", "seconds:crown").equals(expected)


def test_own_dataset_and_network_objects():
    digits = ox.load_dataset("digits").subset(6)
    net = ox.models.fc(64, 10, 10, seed=0)
    direct = ox.certify(net, digits, 0.01)
    captured = ox.certify(ox.capture(net, (1, 8, 8)), (digits.images, digits.labels), 0.01)
    assert direct.examples["verdict"].to_list() == captured.examples["verdict"].to_list()


def test_a_data_set_of_the_users_own_keeps_its_transform():
    class Scaled(TensorDataset):
        """Attributes that look like pixels, items that are not."""

        def __init__(self):
            self.images, self.labels = examples()
            super().__init__(self.images, self.labels)

        def __getitem__(self, i):
            return self.images[i] / 2, self.labels[i]

    x, labels = examples()
    own = ox.certify(small(), Scaled(), EPS).examples["natural_margin"]
    assert own.to_list() == ox.certify(small(), (x / 2, labels), EPS).examples["natural_margin"].to_list()


def test_items_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="item 0 is not a pair"):
        ox.certify(small(), TensorDataset(torch.zeros(2, 4)), EPS)
    with pytest.raises(ValueError, match="examples differ in shape"):
        ox.certify(small(), [(torch.zeros(n), 0) for n in (4, 5, 4)].__iter__(), EPS)


# --- journals -----------------------------------------------------------------------------------------------------


def results(report: ox.CertificationReport):
    return report.examples.drop([name for name in report.examples.columns if name.startswith("seconds")])


def interrupt_after(batches: int):
    """A progress callback that presses Ctrl-C."""
    seen = []

    def callback(progress):
        seen.append(progress)
        if len(seen) > batches:
            raise KeyboardInterrupt

    return callback


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path):
    path = tmp_path / "journal.jsonl"
    options = {"relaxation": ["box", "crown"], "batch_size": 5, "exact": True}
    whole = ox.certify(small(), examples(), EPS, **options)
    with pytest.raises(KeyboardInterrupt):
        ox.certify(small(), examples(), EPS, resume=path, progress=interrupt_after(2), **options)
    assert len(path.read_text().splitlines()) == 1 + 10
    seen = []
    resumed = ox.certify(small(), examples(), EPS, resume=path, progress=seen.append, **options)
    assert seen[0].done == 10
    assert results(resumed).equals(results(whole))
    again = ox.certify(small(), examples(), EPS, resume=path, **options)
    assert again.examples.equals(resumed.examples)  # times too: nothing is computed again


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = ox.certify(small(), examples(), EPS, resume=path)
    text = path.read_text()
    for cut in (1, 30, len(text.splitlines()[-1])):
        path.write_text(text[:-cut])
        assert results(ox.certify(small(), examples(), EPS, resume=path)).equals(results(whole))
        assert len(path.read_text().splitlines()) == 25


def test_infinite_bounds_survive_the_journal(tmp_path):
    class Hopeless(ox.Box):
        def lower_bounds(self, network, region, rows):
            return torch.full((len(region.lower), rows.shape[1]), -torch.inf, dtype=region.dtype)

    path = tmp_path / "journal.jsonl"
    first = ox.certify(small(), examples(3), EPS, relaxation=Hopeless(), resume=path)
    second = ox.certify(small(), examples(3), EPS, relaxation=Hopeless(), resume=path)
    assert first.examples.equals(second.examples)
    assert second.examples["lower:Hopeless"].to_list() == [-math.inf] * 3


def test_errors_are_tried_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = ox.certify(small(), examples(), EPS, relaxation=["crown", Spiteful()], resume=path)
    assert first.errors > 0
    edit(path, lambda record: record | {"message": record.get("message", "") and "an old reason"})
    second = ox.certify(small(), examples(), EPS, relaxation=["crown", Spiteful()], resume=path)
    assert results(second).equals(results(first))


def edit(path: Path, change: Callable[[dict], dict], *numbers: int) -> None:
    """Change examples of a journal (all, or those of these lines) as a forger would: with checksums that are right."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number in numbers or range(2, len(lines) + 1):
        record = json.loads(lines[number - 1])
        del record["check"]
        lines[number - 1] = json_lines._line(change(record))
    path.write_bytes(b"".join(lines))


def changed_weights() -> nn.Sequential:
    net = small()
    with torch.no_grad():
        net[1].weight[0, 0] += 1e-6
    return net


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("weights", {"net": changed_weights()}),
        ("data", {"data": examples(25)}),
        ("data", {"subset": 12}),
        ("eps", {"eps": 0.16}),
        ("clip", {"clip": (0.0, 2.0)}),
        ("relaxations", {"relaxation": "crown-0"}),
        ("relaxations", {"relaxation": "crown-soft:gamma=2"}),
        ("dtype", {"dtype": torch.float32}),
        ("rounding", {"rounding": "nearest"}),
        ("attack", {"attack": PGD(seed=1)}),
        ("exact", {"exact": Milp(time_limit=1)}),
        ("cascade", {"cascade": True}),
    ],
)
def test_a_journal_of_other_settings_is_refused(tmp_path, what, change):
    path = tmp_path / "journal.jsonl"
    base = {"net": small(), "data": examples(), "eps": EPS, "relaxation": "crown-soft"}
    ox.certify(**base, resume=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=rf"journal of another run \(.*{what} was"):
        ox.certify(**base | change, resume=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\n", "line 1 is damaged"),
        ("{}\n", "is not a certification journal"),
        ("[1]\n", "is not a certification journal"),
    ],
)
def test_other_files_are_no_journals(tmp_path, content, message):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ox.certify(small(), examples(), EPS, resume=path)
    assert path.read_text() == content


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    ox.certify(small(), examples(), EPS, resume=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match="line 4 is damaged"):
        ox.certify(small(), examples(), EPS, resume=path)
    path.write_text("\n".join(lines) + "\n")
    edit(path, lambda record: {"index": 1}, 4)
    with pytest.raises(ValueError, match="line 4 is not an example"):
        ox.certify(small(), examples(), EPS, resume=path)


def test_a_digit_changed_anywhere_is_found(tmp_path):
    """A bound of another size is JSON as good as the true one: only the checksum tells."""
    path = tmp_path / "journal.jsonl"
    ox.certify(small(), examples(6), EPS, resume=path)
    content = path.read_bytes()
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    assert len(places) > 500
    for place in places[::3]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"line \d is damaged: its checksum"):
            json_lines.read_lines(path)


@pytest.mark.parametrize(
    ("was", "change", "message"),
    [
        ("undecided", {"verdict": "certified"}, "its own bounds and margins make it 'undecided'"),
        ("undecided", {"verdict": "attacked"}, "its own bounds and margins make it 'undecided'"),
        ("undecided", {"verdict": "certified (MILP)"}, "its own bounds and margins make it 'undecided'"),
        ("undecided", {"verdict": "certified (MILP)", "milp_lower": 1.0}, "make it 'undecided'"),
        ("undecided", {"lower": [0.5]}, "make it 'certified'"),
        ("undecided", {"lower": []}, "it lacks bounds of 1 relaxations"),
        ("undecided", {"lower": [None]}, "it lacks a bound that this run asks for"),
        ("undecided", {"attack_margin": None}, "this run attacks none, or the other way round"),
        ("attacked", {"verdict": "certified"}, "make it 'attacked'"),
        ("attacked", {"verdict": "certified", "lower": [0.5]}, "make it 'error'"),
        ("certified", {"label": 2}, r"its label is 2 there and \d in the data"),
        ("certified", {"prediction": 7}, "its prediction is 7 at a margin of"),
        ("certified", {"attack_margin": 1e9}, "its attack found less than its input"),
        ("certified", {"index": 10**6}, "it is no example of this run"),
        ("certified", {"lower": ["nan"]}, "make it 'error'"),
    ],
)
def test_a_verdict_that_its_own_numbers_contradict_is_refused(tmp_path, was, change, message):
    path = tmp_path / "journal.jsonl"
    report = ox.certify(small(), examples(), 0.05, relaxation="box", resume=path)
    rows = report.examples.filter(report.examples["verdict"] == was)
    labels = [change.get("label", -1), change.get("prediction", -1)]
    index = next(i for i, label in zip(rows["index"], rows["label"], strict=True) if label not in labels)
    edit(path, lambda record: record | change, index + 2)
    with pytest.raises(ValueError, match=message):
        ox.certify(small(), examples(), 0.05, relaxation="box", resume=path)


def test_milp_verdicts_are_resumed_and_checked(tmp_path):
    path = tmp_path / "journal.jsonl"
    options = {"relaxation": "box", "exact": True}
    report = ox.certify(small(), examples(), EPS, resume=path, **options)
    assert report.certified_milp > 0
    assert ox.certify(small(), examples(), EPS, resume=path, **options).examples.equals(report.examples)
    proved = report.examples.filter(report.examples["verdict"] == "certified (MILP)")["index"][0]
    edit(path, lambda record: record | {"milp_lower": -0.5}, proved + 2)
    with pytest.raises(ValueError, match="make it 'undecided' or 'attacked'"):
        ox.certify(small(), examples(), EPS, resume=path, **options)


# --- the published table ------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "eps", "wrong", "uncertified"),
    [
        ("adv-mlp-b-0.05", 0.05, 162, 3309),
        ("adv-mlp-b-0.1", 0.1, 333, 7134),
        ("nor-mlp-b", 0.02, 205, 3511),
        ("nor-mlp-b", 0.03, 205, 7585),
        ("nor-mlp-b", 0.05, 205, 9939),
        ("lpd-mlp-b-0.1", 0.1, 409, 1832),
    ],
)
def test_published_table(data_dir, name, eps, wrong, uncertified):
    """Salman et al. 2019, LP-GREEDY (Wong and Kolter's dual) and natural error, of 10,000 test images."""
    from optrelax.networks.checkpoint_files import read_npz

    net = read_npz(data_dir / "barrier" / f"{name}.npz")
    mnist = ox.load_dataset("mnist", data_dir)
    report = ox.certify(net, mnist, eps, relaxation="fast-lin", attack=None)
    assert 10_000 - round(10_000 * report.accuracy) == wrong
    assert 10_000 - round(10_000 * report.certified) == uncertified
    assert report.errors == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gives_the_same_verdicts(dtype):
    x, labels = examples()
    rounding = "nearest" if dtype == torch.float32 else "outward"  # no proof for cuDNN's float32
    options = {"relaxation": ["box", "crown"], "dtype": dtype, "rounding": rounding, "exact": True}
    here = ox.certify(small(), (x, labels), EPS, **options)
    there = ox.certify(small().cuda(), (x, labels), EPS, **options)
    assert there.examples["verdict"].to_list() == here.examples["verdict"].to_list()
    lower = [r.examples["lower:crown"].to_numpy() for r in (here, there)]
    assert np.allclose(*lower, atol=1e-5)


# --- specifications and regions -----------------------------------------------------------------------------------


def test_margins_given_as_a_specification_are_margins(tmp_path):
    x, labels = examples(8)
    plain = ox.certify(small(), (x, labels), EPS, relaxation="crown")
    region, spec = ox.LinfBall(x.double(), EPS, (0.0, 1.0)), {"right": ox.margins(labels, 3)}
    journal = tmp_path / "journal.jsonl"
    given = ox.certify(small(), x, region=region, spec=spec, resume=journal)
    assert given.examples["verdict"].to_list() == plain.examples["verdict"].to_list()
    for column in ("natural_margin", "attack_margin", "lower:crown"):
        assert given.examples[column].to_list() == pytest.approx(plain.examples[column].to_list(), rel=1e-6)
    assert given.accuracy == plain.accuracy
    assert given.certified_rows.keys() == {"right.0", "right.1"}
    assert min(given.certified_rows.values()) >= given.certified
    again = ox.certify(small(), x, region=region, spec=spec, resume=journal)
    assert again.examples.equals(given.examples)
    with pytest.raises(ValueError, match="journal of another run"):
        ox.certify(small(), x, region=region, spec=ox.margins(labels, 3), resume=journal)


def test_any_of_is_certified_where_no_row_is():
    x, _ = examples(8)
    rows = ox.margins(torch.tensor([0]), 3)[0]
    spec = ox.any_of(ox.Specification(rows[:1], 0.02), ox.Specification(-rows[:1], 0.02))
    report = ox.certify(small(), x, region=ox.LinfBall(x.double(), 0.2), spec=spec, relaxation=["box", "crown"])
    alone = [ox.lower_bounds(small().double(), ox.LinfBall(x.double(), 0.2), r, "crown") for r in (rows[:1], -rows[:1])]
    assert report.certified == 1  # one of two opposite numbers is at least 0
    assert bool((torch.cat(alone, 1).amax(1) + 0.02 < 0).any())
    verdict = ox.verify(small(), spec, region=ox.LinfBall(x[:3].double(), 0.2), relaxation="crown")
    assert str(verdict.status) == "holds"
    broken = ox.verify(small(), rows, region=ox.LinfBall(x.double(), 0.2), relaxation="crown")
    assert str(broken.status) == "violated"


def test_regression_and_comparison_and_losses_take_specifications():
    x, _ = examples(6)
    net, region = small(), ox.LinfBall(x.double(), 0.02)
    target = net(x).detach()
    spec = ox.within(target, 0.3)
    table = ox.compare(net, x, relaxations=["box", "crown"], region=region, spec=spec, repeats=1).table
    assert table["certified %"].to_list() == [100, 100]
    assert table["mean bound"][0] <= table["mean bound"][1] <= 0.3
    wrong = ox.certify(net, x, region=region, spec=ox.within(target + 1, 0.3))
    assert (wrong.attacked, wrong.accuracy) == (1, 0)
    box = ox.LinfBall(x, 0.02)
    terms = ox.CertifiedLoss("box", kappa=0.5)(net, box, target + 1, spec=ox.within(target + 1, 0.3))
    assert float(terms.natural.detach()) == pytest.approx(1.0)
    expected = ox.certified_cross_entropy(ox.lower_bounds(net, box, ox.within(target + 1, 0.3), "box"))
    torch.testing.assert_close(terms.robust, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": None}, "give eps, or a region"),
        ({"region": None, "eps": None}, "give eps, or a region"),
        ({"region": ox.InputBox(torch.zeros(4, 4), torch.zeros(4, 4))}, "lies outside its region"),
        ({"region": ox.InputBox(torch.zeros(2, 4), torch.ones(2, 4))}, r"region is of inputs \(2, 4\)"),
        ({"spec": torch.eye(4)}, "the specification is of 4 outputs, the network has 3"),
        ({"spec": torch.zeros(2, 1, 3)}, r"has batch \(2,\), the inputs \(4,\)"),
        ({"spec": None}, "inputs alone want a spec"),
        ({"spec": ox.Specification(torch.eye(3), 1.0), "exact": True}, "settles plain rows"),
    ],
)
def test_questions_that_do_not_fit_are_refused(change, message):
    x, _ = examples(4)
    asked = {"region": ox.LinfBall(x.double(), 0.1), "spec": torch.eye(3)} | change
    if change == {"eps": None}:
        asked["eps"] = 0.1
    with pytest.raises(ValueError, match=message):
        ox.certify(small(), x, **asked)


def test_a_loss_of_margins_takes_no_specification():
    x, labels = examples(4)
    with pytest.raises(ValueError, match="FusedLoss: is made of the margins of labels"):
        FusedLoss()(small(), ox.LinfBall(x, 0.1), labels, spec=torch.eye(3))


def test_choices_in_float32_are_certified_attacked_and_settled_one_by_one():
    net = ox.models.fc(4, 8, 2, seed=0)
    x = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].round()
    labels = net(x).argmax(1)
    region = ox.ChoiceBox(x - 0.1, x + 0.1, {0: torch.tensor([0.0, 1.0])})
    report = ox.certify(net, (x, labels), region=region, relaxation="crown", exact=True)
    assert report.errors == 0
    assert report.undecided == 0
    for value in (0.0, 1.0):
        moved = x.index_fill(1, torch.tensor([0]), value)
        robust = torch.from_numpy(report.examples["verdict"].str.starts_with("certified").to_numpy())
        assert (net(moved).argmax(1) == labels)[robust].all()
