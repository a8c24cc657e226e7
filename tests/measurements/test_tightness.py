"""Tightness: radii against brute force and a MILP, the area against its curve, orders, refusals, and the command."""

import json
import math
from dataclasses import dataclass

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.cli import main
from optrelax.layers import DualAscent, Triangle
from optrelax.layers.milp import Milp
from optrelax.measurements.stages import MeasurementProgress
from optrelax.output.plots import write_figure
from optrelax.relaxations import Relaxation, resolve

NAMES = ["box", "hbox", "crown-ibp", "deepz", "crown", "triangle"]
RESOLUTION = 1e-4


def network() -> nn.Sequential:
    """Random, with weights and last biases that give every class some of the inputs."""
    net = ox.models.fc(3, 10, 8, 3, seed=27)
    x = torch.rand(500, 3, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)
        net[-1].bias -= net(x).mean(0)
    return net


def examples(count: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs with the network's own labels, but for the first, which is wrong."""
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    labels = network()(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    return x, labels


@pytest.fixture(scope="module")
def measured() -> ox.Tightness:
    return ox.measure_tightness(network(), examples(), NAMES, resolution=RESOLUTION, milp=Milp(time_limit=20))


def radii(result: ox.Tightness, name: str) -> Tensor:
    return torch.tensor(result.examples[f"radius:{name}"].to_list(), dtype=torch.float64)


def test_the_examples_tell_relaxations_apart(measured):
    """Else the tests below would prove little."""
    found = torch.stack([radii(measured, name) for name in (*NAMES, "milp")])
    assert (found[:, 1:] > 0).all()
    assert (found < 1).all()
    assert len({round(value, 3) for value in found.mean(1).tolist()}) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_radii_equal_brute_force(measured, name):
    """Every eps of a fine grid, no search: the largest certified one."""
    x, labels = examples()
    grid = torch.arange(0, 0.3, 0.001, dtype=torch.float64)
    eps, every = grid.repeat(len(x)), torch.arange(len(x)).repeat_interleave(len(grid))
    region = ox.LinfBall(x.double()[every], eps, (0.0, 1.0))
    solver = {"relaxation": Triangle(solver=DualAscent(threshold=0.0)) if name == "triangle" else name}
    lower = ox.lower_bounds(network(), region, ox.margins(labels, 3)[every], **solver).amin(1)
    best = torch.where(lower > 0, eps, 0.0).reshape(len(x), -1).amax(1)
    found = radii(measured, name)
    assert (found >= best - RESOLUTION).all()
    assert (found <= best + 0.001 + RESOLUTION).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_radius_is_certified_itself(measured, name):
    x, labels = examples()
    found = radii(measured, name)
    assert found[0] == 0  # misclassified
    region = ox.LinfBall(x[1:].double(), found[1:], (0.0, 1.0))
    assert (ox.lower_bounds(network(), region, ox.margins(labels[1:], 3), name) > 0).all()


def test_no_relaxation_passes_the_exact_radius_and_that_none_the_attack(measured):
    exact = radii(measured, "milp")
    for name in NAMES:
        assert (radii(measured, name) <= exact + 1e-9).all()
    assert (exact <= radii(measured, "attack") + 1e-9).all()


def test_milp_radius_equals_brute_force_over_points(measured):
    """Dense points of three dimensions: within the exact radius no margin is negative, slightly beyond it one is."""
    x, labels = examples()
    generator = torch.Generator().manual_seed(1)
    for i in range(1, len(x)):
        radius = float(radii(measured, "milp")[i])
        rows = ox.margins(labels[i : i + 1], 3)[0].double()
        signs = torch.rand(20000, 3, generator=generator, dtype=torch.float64) * 2 - 1
        signs[:8000] = signs[:8000].sign()  # corners of the box
        inside = (x[i].double() + radius * signs).clamp(0, 1)
        beyond = (x[i].double() + (radius + 0.02) * signs).clamp(0, 1)
        net = network().double().requires_grad_(False)
        assert (net(inside) @ rows.T > 0).all()
        assert float((net(beyond) @ rows.T).amin()) <= 0


def test_order_of_the_areas(measured):
    """box <= hbox by theorem on equal pre-activation bounds; every relaxation <= the exact answer <= the attack."""
    area = dict(measured.table.select("relaxation", "area").iter_rows())
    assert area["box"] < area["hbox"]
    assert all(area[name] <= area["milp"] + 1e-9 <= area["attack"] + 2e-9 for name in NAMES)


def test_area_is_the_integral_of_the_curve(measured):
    for row in measured.table.iter_rows(named=True):
        eps, fraction = measured.curve(row["relaxation"])
        integral = sum((b - a) * f for a, b, f in zip(eps, eps[1:], fraction, strict=False))
        assert row["area"] == pytest.approx(100 * integral)
        assert row["low"] <= row["area"] <= row["high"]
        assert fraction[0] == pytest.approx(5 / 6)  # one is misclassified
        assert fraction[-1] == 0


def test_gap_and_propagation(measured):
    """Against the MILP's own smallest margins; an exact relaxation would have gap 0 and 100 %."""
    table = {row["relaxation"]: row for row in measured.table.iter_rows(named=True)}
    x, labels = examples()
    rows, at = ox.margins(labels[1:], 3).double(), measured.settings["at"]
    region = ox.LinfBall(x[1:].double(), at, (0.0, 1.0))
    net = ox.capture(network(), (3,))
    exact = torch.stack(
        [Milp().minima(net, region.select(slice(i, i + 1)), rows[i : i + 1]).lower.amin() for i in range(len(rows))]
    )
    for name in NAMES:
        lower = ox.lower_bounds(network(), region, rows, name).amin(1).detach()
        assert table[name]["gap"] == pytest.approx(float((exact - lower).mean()), abs=1e-5)
        assert 0 < table[name]["propagation %"] < 100
    assert table["box"]["propagation %"] < table["triangle"]["propagation %"]
    assert table["milp"]["gap"] is None


def test_an_affine_network_is_exact_by_every_relaxation():
    net = nn.Sequential(nn.Linear(3, 3))
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    result = ox.measure_tightness(net, (x, net(x).argmax(1)), ["box", "crown"], clip=None, limit=2.0)
    for row in result.table.filter(pl.col("relaxation") != "attack").iter_rows(named=True):
        assert row["propagation %"] == pytest.approx(100)
        assert row["gap"] == pytest.approx(0, abs=1e-9)
    difference = result.examples["radius:attack"] - result.examples["radius:crown"]
    assert difference.abs().max() <= 2e-4


def test_nothing_classified_correctly_is_an_area_of_zero(tmp_path):
    x, _ = examples()
    wrong = (network()(x).argmax(1) + 1) % 3
    result = ox.measure_tightness(network(), (x, wrong), ["box", "crown"])
    assert result.table["area"].to_list() == [0, 0, 0]
    assert result.table["gap"].to_list() == [None, None, None]
    write_figure(result.figure(), tmp_path / "none.png")


@dataclass(frozen=True, kw_only=True)
class Islands(Relaxation):
    """Certifies radii up to 0.05 and from 0.2 to 0.25: sound for a network that is robust everywhere."""

    def preactivation_bounds(self, network, region):
        return resolve("box").preactivation_bounds(network, region)

    def lower_bounds(self, network, region, rows):
        eps = region.radius.flatten(1).amax(1)
        yes = (eps <= 0.05) | ((eps >= 0.2) & (eps <= 0.25))
        return torch.where(yes, 1.0, -1.0).to(eps)[:, None].expand(-1, rows.shape[1])


@dataclass(frozen=True, kw_only=True)
class Climbing(Islands):
    """The same, but it claims what is not so."""

    monotone = True


def test_a_users_relaxation_is_scanned_and_certified_beyond_a_hole_counts():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.copy_(torch.tensor([1.0, 0.0]))
    data = torch.full((2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    given = {"islands": Islands(), "climbing": Climbing(), "box": "box"}
    result = ox.measure_tightness(net, data, given, clip=None, limit=0.8)
    assert radii(result, "islands").tolist() == pytest.approx([0.25, 0.25], abs=RESOLUTION)
    assert radii(result, "climbing").tolist() == pytest.approx([0.05, 0.05], abs=RESOLUTION)
    assert radii(result, "box").tolist() == [0.8, 0.8]  # nothing refutes the limit itself
    search = dict(result.table.select("relaxation", "search").iter_rows())
    assert search == {"islands": "grid scan", "climbing": "bisection", "box": "bisection", "attack": "bisection"}


def test_an_unsound_relaxation_is_found_out():
    @dataclass(frozen=True, kw_only=True)
    class Liar(Relaxation):
        def lower_bounds(self, network, region, rows):
            return torch.ones(region.shape[0], rows.shape[1], dtype=region.dtype)

    with pytest.raises(ValueError, match="liar is unsound: it gives example 1 a margin of at least 1 at radius"):
        ox.measure_tightness(network(), examples(), {"liar": Liar()})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("box", True),
        ("box-widen", True),
        ("box-round", False),
        ("layerwise", True),
        ("crown", False),
        ("crown-ibp", False),
        ("hbox-switch", False),
        ("triangle", False),
        ("triangle:preactivation=box", True),
    ],
)
def test_monotone_is_what_the_paper_says(name, expected):
    assert resolve(name).monotone is expected


def test_same_seed_same_result_and_progress_ends(measured):
    seen: list[MeasurementProgress] = []
    again = ox.measure_tightness(network(), examples(), NAMES[:3], resolution=RESOLUTION, progress=seen.append)
    columns = ["relaxation", "area", "low", "high"]
    both = [t.table.select(columns).filter(pl.col("relaxation").is_in(NAMES[:3])) for t in (measured, again)]
    assert both[0].equals(both[1])
    assert {p.stage.split(",")[0] for p in seen} >= {"attack", "hbox"}
    assert all(1 <= p.done <= p.total for p in seen)


def test_the_figure_holds_the_curves(measured, tmp_path):
    figure = measured.figure("title")
    (axes,) = figure.axes
    lines = {line.get_label().split(" (")[0]: line for line in axes.lines}
    eps, fraction = measured.curve("crown")
    assert lines["crown"].get_xdata().tolist() == eps
    assert lines["crown"].get_ydata().tolist() == pytest.approx([100 * f for f in fraction])
    assert [path.suffix for path in write_figure(figure, tmp_path / "t.png")] == [".png", ".svg"]


BAD = {
    "estimate": ({"relaxations": ["cauchy"]}, "cauchy is an estimate"),
    "limit": ({"limit": -1.0}, "limit must be positive and finite, got -1"),
    "no limit": ({"clip": None}, "without clip say the largest eps"),
    "resolution": ({"resolution": 0.0}, "resolution must be positive and finite, got 0"),
    "points": ({"points": 0}, "points must be at least 1, got 0"),
    "confidence": ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
    "resamples": ({"resamples": 0}, "resamples must be at least 1"),
    "at": ({"at": math.inf}, "at must be a finite eps"),
    "batch size": ({"batch_size": 0}, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"measure_tightness: .*{message}"):
        ox.measure_tightness(network(), examples(), **options)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["measure", "tightness", *arguments])
    return int(done.value.code or 0)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    ox.save(ox.models.fc(64, 12, 10, seed=4).eval(), tmp_path / "net.safetensors", input_shape=(1, 8, 8))
    return str(tmp_path / "net.safetensors")


def test_the_command_says_what_the_library_says(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--data", "digits", "--subset", "20", "--relaxations", "box", "crown", "--out", str(out)]
    assert run(checkpoint, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    digits = ox.load_dataset("digits")
    expected = ox.measure_tightness(ox.load(checkpoint), digits, ["box", "crown"], subset=20)
    for row, other in zip(found["table"], expected.table.iter_rows(named=True), strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert sorted(path.name for path in out.iterdir()) == [
        "examples.csv",
        "summary.json",
        "table.csv",
        "tightness.png",
        "tightness.svg",
    ]
    assert run(checkpoint, *words[:4]) == 0
    assert "crown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--relaxation", "crwn"],
        ["--relaxation", "cauchy"],
        ["--limit", "x"],
        ["--rounding", "up"],
        ["--format", "xml"],
        ["--subset", "0"],
        ["--resolution", "-1"],
        ["--confidence", "2"],
    ],
)
def test_bad_options_exit_with_2(checkpoint, words):
    assert run(checkpoint, "--data", "digits", *words) == 2


def test_help_states_units_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("--help") == 0
    out = capsys.readouterr().out
    for text in ("Largest eps", "(0.0001)", "width of --clip", "Where gaps are measured", "Seconds"):
        assert text in out
