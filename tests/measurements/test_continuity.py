"""Continuity: jumps computed by hand are found to 1e-9 and nothing else is; verdicts; the command."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.cli import main
from optrelax.layers import InteriorPoint
from optrelax.measurements.jumps import JumpFinder, Sample
from optrelax.output.plots import write_figure
from optrelax.relaxations import Relaxation, resolve

X, LABEL = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])


def network(first: list[float], bias: list[float], second: list[float]) -> nn.Sequential:
    """One margin, second . relu(first x + bias), of one input."""
    n = len(first)
    net = nn.Sequential(nn.Linear(1, n), nn.ReLU(), nn.Linear(n, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(first)[:, None])
        net[0].bias.copy_(torch.tensor(bias))
        net[2].weight.copy_(torch.tensor([second, [0.0] * n]))
        net[2].bias.zero_()
    return net


def measured(net: nn.Sequential, name: str, length: float = 2.0, **options) -> tuple[ox.Continuity, float]:
    """The first neuron's bias rises by 1 a unit of t, x lies in [0, 1]; and the norm of the weights, a unit of `at`."""
    way = {"0.bias": torch.tensor([1.0, *[0.0] * (len(net[0].bias) - 1)])}
    settings = {"direction": way, "length": length, "examples": 1, "clip": None, "cells": 5, **options}
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in net.parameters()))
    return ox.measure_continuity(net, (X, LABEL), 0.5, [name], **settings), size


# By hand. The first neuron is z = x + b with b = t - 1.5, so l = t - 1.5, u = t - 0.5: it is dead up to t = 0.5,
# crosses up to 1.5, and |l| = |u| at t = 1. The second one, where there is one, is x itself (stable).
ONE = ([1.0], [-1.5], [1.0])  # margin relu(z)
MINUS_X = ([1.0, 1.0], [-1.5, 0.0], [1.0, -1.0])  # margin relu(z) - x
PLUS_X = ([1.0, 1.0], [-1.5, 0.0], [1.0, 1.0])  # margin relu(z) + x
HAND = {
    # Lower line 0 up to t = 1, then x: min z = -0.5 there.
    "crown, one neuron": (ONE, "crown", [(1.0, -0.5, "|l| = |u|")]),
    "crown-ibp, one neuron": (ONE, "crown-ibp", [(1.0, -0.5, "|l| = |u|")]),
    # Slope 0: min(0 - x) = -1; slope 1: z - x = b = -0.5.
    "crown, two neurons": (MINUS_X, "crown", [(1.0, 0.5, "|l| = |u|")]),
    # Slope 0 forgets x: -1, until at l = 0 z - x = b = 0 is exact.
    "crown-0, two neurons": (MINUS_X, "crown-0", [(1.5, 1.0, "l = 0")]),
    "hbox, two neurons": (MINUS_X, "hbox", [(1.5, 1.0, "l = 0")]),
    "deepz-box, two neurons": (MINUS_X, "deepz-box", [(1.5, 1.0, "l = 0")]),
    # Dead: min(0 + x) = 0; at u = 0 slope 1 sets in: min(z + x) = b = -1.
    "crown-1, two neurons": (PLUS_X, "crown-1", [(0.5, -1.0, "u = 0")]),
    "deepz-diag, two neurons": (PLUS_X, "deepz-diag", [(0.5, -1.0, "u = 0")]),
    "hbox-diag, two neurons": (PLUS_X, "hbox-diag", [(0.5, -1.0, "u = 0")]),
    # Slope 0 up to |l| = |u|: min(0 + x) = 0, then slope 1: b = -0.5.
    "deepz-switch, two neurons": (PLUS_X, "deepz-switch", [(1.0, -0.5, "|l| = |u|")]),
    "hbox-switch, two neurons": (PLUS_X, "hbox-switch", [(1.0, -0.5, "|l| = |u|")]),
    # Slope 0 below: -1 up to l = 0; its other side above is never used.
    "crown-0-tria, two neurons": (MINUS_X, "crown-0-tria", [(1.5, 1.0, "l = 0")]),
    "crown-1-tria, two neurons": (PLUS_X, "crown-1-tria", [(0.5, -1.0, "u = 0")]),
    # At l = 0 the slope is kappa: kappa z + 0 - x, at least -(1 - kappa), and exact z - x = 0 beyond.
    "deepz-slanted, two neurons": (MINUS_X, "deepz-slanted:kappa=0.75", [(1.5, 0.25, "l = 0")]),
}


@pytest.mark.parametrize("case", HAND)
def test_jumps_computed_by_hand_are_found_and_nothing_else(case):
    parts, name, jumps = HAND[case]
    net = network(*parts)
    result, size = measured(net, name)
    assert result.jumps.height == len(jumps)
    for row, (at, jump, cause) in zip(result.jumps.iter_rows(named=True), jumps, strict=True):
        assert row["at"] * size == pytest.approx(at, abs=1e-9)
        assert row["bound"] == pytest.approx(jump, abs=1e-9)
        assert row["cause"] == cause
        left, right = _losses(result, row["at"])
        assert row["loss"] == pytest.approx(right - left, abs=1e-9)
    (row,) = result.table.iter_rows(named=True)
    assert row["verdict"] == "jumps, as listed"
    assert row["complete"]
    assert row["bound / unit"] == pytest.approx(len(jumps) * size / 2)


def _losses(result: ox.Continuity, at: float) -> tuple[float, float]:
    """log(1 + exp(-m)) on both sides, from the samples next to a jump."""
    near = result.lines.filter((result.lines["at"] - at).abs() < 1e-12).sort("at")
    bound = near["bound"].to_list()
    return math.log1p(math.exp(-bound[0])), math.log1p(math.exp(-bound[-1]))


SMOOTH = ["box", "deepz", "fast-lin", "hzono", "crown-soft", "deepz-soft"]
SMOOTH += ["hbox-diag-c", "deepz-diag-c", "crown-0-c", "crown-1-c", "crown-0-tria-c", "crown-1-tria-c"]


@pytest.mark.parametrize("name", [*SMOOTH, "triangle", "layerwise"])
def test_nothing_is_found_where_nothing_jumps(name):
    """Three neurons: relu(z), and x with either sign, in turn; every switch of the first is on the line."""
    result, _ = measured(network([1.0, 1.0, -1.0], [-1.51, 0.3, 0.6], [1.0, -1.0, 1.5]), name)
    assert result.jumps.height == 0
    assert result.table["verdict"].item() == "none, as listed"


def test_a_jump_that_undoes_itself_within_a_cell_is_found():
    """One cell: at t = 0.495 and 0.505 the sign of the tie changes and changes back, unseen by the grid's ends."""

    def evaluate(t: float) -> Sample:
        tie = (t - 0.5) ** 2 - 0.005**2
        values = torch.tensor([1.0 if tie < 0 else 0.0], dtype=torch.float64)
        return Sample(t, values, torch.tensor([tie], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    found = JumpFinder(evaluate, 1e-9, 1e-14, 3, 1000).run(0.0, 1.1)
    assert [jump.at for jump in found.jumps] == pytest.approx([0.495, 0.505], abs=1e-12)
    assert [float(jump.size) for jump in found.jumps] == [1.0, -1.0]


def test_a_switch_that_itself_jumps_is_closed_in_on():
    def evaluate(t: float) -> Sample:
        switch = torch.tensor([-5.0 if t < 1 / 3 else 0.001], dtype=torch.float64)
        values = torch.tensor([float(t >= 1 / 3) + t], dtype=torch.float64)
        return Sample(t, values, switch, torch.zeros(1, dtype=torch.float64))

    found = JumpFinder(evaluate, 1e-9, 1e-15, 4, 1000).run(0.0, 1.0)
    (jump,) = found.jumps
    assert jump.at == pytest.approx(1 / 3, abs=1e-14)
    assert float(jump.size) == pytest.approx(1, abs=1e-12)


def test_a_budget_that_ends_is_reported():
    result, _ = measured(network(*MINUS_X), "crown", budget=15)
    assert result.table["complete"].to_list() == [False]


@dataclass(frozen=True, kw_only=True)
class Stairs(Relaxation):
    """A user's own: it states no pre-activation bounds and jumps by 1 where the first bias passes 0.1 and 0.25."""

    def lower_bounds(self, network, region, rows):
        bias = next(p for name, p in network.module.named_parameters() if name == "0.bias")
        height = (bias[0] > 0.1).double() + (bias[0] > 0.25).double() - 2
        return height * torch.ones(region.shape[0], rows.shape[1], dtype=region.dtype)


def test_jumps_of_a_users_relaxation_without_events_are_found():
    net = network(*MINUS_X)
    way = {"0.bias": torch.tensor([1.0, 0.0])}
    options = {"direction": way, "length": 2.0, "examples": 1, "clip": None}
    result = ox.measure_continuity(net, (X, LABEL), 0.5, {"stairs": Stairs()}, **options)
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in net.parameters()))
    assert [at * size for at in result.jumps["at"]] == pytest.approx([1.6, 1.75], abs=1e-9)
    assert result.jumps["bound"].to_list() == [1.0, 1.0]
    assert result.table["verdict"].to_list() == ["jumps"]
    assert result.table["listed"].to_list() == [None]


def deep() -> nn.Sequential:
    return ox.models.fc(4, 6, 5, 3, seed=5)


def digits(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    return x, deep()(x).argmax(1)


NAMES = ["box", "deepz", "crown-soft", "hbox", "crown", "crown-0"]


@pytest.mark.parametrize(("direction", "length"), [("gradient", 0.02), ("random", 0.08)])
def test_verdicts_on_a_deep_network(direction, length):
    options = {"direction": direction, "length": length, "lines": 1, "examples": 1, "cells": 4}
    result = ox.measure_continuity(deep(), digits(), 0.15, NAMES, **options)
    table = {row["relaxation"]: row for row in result.table.iter_rows(named=True)}
    assert all(table[name]["verdict"] == "none, as listed" for name in NAMES[:3])
    assert all("CONTRADICTS" not in table[name]["verdict"] for name in NAMES)
    assert sum(table[name]["verdict"] == "jumps, as listed" for name in NAMES) >= 2
    assert all(row["complete"] for row in table.values())
    for row in table.values():
        assert row["length"] == pytest.approx(length)
        assert row["bound jumps"] >= row["loss jumps"]


def test_every_jump_is_one_of_the_loss_evaluated_afresh():
    """Both limits again, by the entry points, on a network whose weights are set by hand."""
    result = ox.measure_continuity(
        deep(), digits(1), 0.15, ["hbox"], direction="random", length=0.1, lines=1, examples=1, cells=8
    )
    assert result.jumps.height > 0
    net = deep().double()
    start = [p.detach().clone() for p in net.parameters()]
    from optrelax.measurements.weight_lines import random_direction

    way = random_direction(tuple(start), torch.Generator().manual_seed(0), "")
    x, labels = digits(1)
    region = ox.LinfBall(x.double(), 0.15, (0.0, 1.0))
    for row in result.jumps.iter_rows(named=True):
        losses = []
        for t in (row["at"] - 1e-12, row["at"] + 1e-12):
            with torch.no_grad():
                for p, w, d in zip(net.parameters(), start, way, strict=True):
                    p.copy_(w + t * d)
                lower = ox.lower_bounds(net, region, ox.margins(labels, 3), "hbox")
                losses.append(float(ox.certified_cross_entropy(lower)))
        assert losses[1] - losses[0] == pytest.approx(row["loss"], abs=1e-9)


def two_layers() -> nn.Sequential:
    """Margin a - relu(a - 1/4), a = relu(x + b); the sum a + 10 is carried by a stable neuron."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(-1.5)
        net[2].weight.fill_(1.0)
        net[2].bias.copy_(torch.tensor([-0.25, 10.0]))
        net[4].weight.copy_(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
        net[4].bias.copy_(torch.tensor([-10.0, 0.0]))
    return net


def test_lps_inherit_the_jumps_of_their_preactivation_bounds():
    """By hand: at |l| = |u| CROWN's lower bound of a falls from 0 to -1/2, and the chord of the second neuron with it.

    Its interval goes from [-1/4, 1/4] to [-3/4, 1/4], so at a = 0 the chord rises from 0 to 1/8. Box's does not jump.
    """
    options = {"direction": {"0.bias": torch.ones(1)}, "length": 0.4, "examples": 1, "clip": None, "cells": 2}
    names = ["triangle:preactivation=crown", "triangle", "layerwise"]
    net = two_layers()
    with torch.no_grad():
        net[0].bias.add_(0.83)  # from t = 0.83: no event on the grid
    result = ox.measure_continuity(net, (X, LABEL), 0.5, names, **options)
    assert result.table["verdict"].to_list() == ["jumps, as listed", "none, as listed", "none, as listed"]
    (row,) = result.jumps.iter_rows(named=True)
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in net.parameters()))
    assert row["at"] * size == pytest.approx(0.17, abs=1e-9)
    assert row["bound"] == pytest.approx(-0.125, abs=1e-6)
    assert row["cause"] == "|l| = |u|"
    assert result.settings["solvers"] == dict.fromkeys(names, repr(InteriorPoint()))


def test_a_line_to_another_network_and_the_weights_are_put_back():
    net, other = deep(), ox.models.fc(4, 6, 5, 3, seed=6)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    places = {name: p.data_ptr() for name, p in net.named_parameters()}
    net[1].weight.requires_grad_(False)
    result = ox.measure_continuity(net, digits(2), 0.05, "box", direction=other, examples=2, cells=4)
    distance = math.sqrt(sum(float((q.double() - p.double()).square().sum()) for p, q in _pairs(net, other)))
    size = math.sqrt(sum(float(p.double().square().sum()) for p in before.values()))
    assert result.table["length"].item() == pytest.approx(distance / size)
    for name, p in net.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])
        assert p.data_ptr() == places[name]
        assert p.requires_grad == (p is not net[1].weight)
        assert p.grad is None


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("box", set()),
        ("box-round", {"everywhere"}),
        ("hbox", {"l = 0"}),
        ("crown", {"|l| = |u|"}),
        ("crown-0-tria", {"l = 0", "u = 0"}),
        ("triangle", set()),
        ("triangle:preactivation=crown", {"|l| = |u|"}),
        ("deepz-slanted:kappa=1", set()),
        ("deepz-slanted", {"l = 0"}),
        ("crown-ibp", {"|l| = |u|"}),
    ],
)
def test_what_the_paper_lists(name, expected):
    assert resolve(name).jumps == expected


def test_the_figure_breaks_at_each_jump(tmp_path):
    result, size = measured(network(*ONE), "crown")
    figure = result.figure("title")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "crown: 1 jump"
    curve, stroke, *_ = axes.lines
    assert sum(math.isnan(y) for y in curve.get_ydata()) == 1
    assert stroke.get_xdata()[0] == pytest.approx(100 / size)
    low, high = stroke.get_ydata()
    assert high - low == pytest.approx(result.jumps["loss"].item())
    assert write_figure(figure, tmp_path / "c.png")[0].exists()


BAD = {
    "eps": ({"eps": -0.1}, "eps must be a finite number >= 0"),
    "length": ({"length": 0.0}, "length must be positive"),
    "least": ({"least": -1.0}, "least must be positive"),
    "name": ({"direction": {"x": torch.ones(1)}}, "no parameter 'x'"),
    "shape": ({"direction": {"1.bias": torch.ones(9)}}, r"1.bias is \(6,\), the direction has \(9,\)"),
    "other": ({"direction": nn.Linear(2, 2)}, "the other network has parameters"),
    "examples": ({"examples": 100}, "wants 400 examples, the data has 8"),
    "zero": ({"direction": {}}, "norm 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"measure_continuity: .*{message}"):
        ox.measure_continuity(deep(), digits(), **{"eps": 0.1, "examples": 1, **options})


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["measure", "continuity", *arguments])
    return int(done.value.code or 0)


def test_the_command(tmp_path, capsys):
    checkpoint, out = str(tmp_path / "net.safetensors"), tmp_path / "out"
    ox.save(ox.models.fc(64, 10, 10, seed=4).eval(), checkpoint, input_shape=(1, 8, 8))
    words = [checkpoint, "--data", "digits", "--eps", "0.1", "--lines", "1", "--examples", "1"]
    words += ["--relaxations", "box", "hbox", "--cells", "4"]
    assert run(*words, "--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = ox.measure_continuity(
        ox.load(checkpoint), ox.load_dataset("digits"), 0.1, ["box", "hbox"], lines=1, examples=1, cells=4
    )
    assert found["table"] == expected.table.to_dicts()
    assert sorted(path.name for path in out.iterdir()) == [
        "jumps.csv",
        "line0.png",
        "line0.svg",
        "lines.csv",
        "summary.json",
        "table.csv",
    ]
    for bad in (["--direction", "up"], ["--length", "-1"], ["--to", "missing.safetensors"], ["--relaxation", "bx"]):
        assert run(*words, *bad) == 2


def test_the_command_on_a_line_to_another_checkpoint(tmp_path, capsys):
    """By hand, as above: from b = -1.5 to 0, CROWN's bound falls by 1/2 at b = -1, a third of the way."""
    for name, bias in (("from", -1.5), ("to", 0.0)):
        arrays = {"weight0": [[1.0]], "bias0": [bias], "weight1": [[1.0], [0.0]], "bias1": [0.0, 0.0]}
        np.savez(tmp_path / f"{name}.npz", **{key: np.array(value) for key, value in arrays.items()})
    np.savez(tmp_path / "data.npz", x=np.ones((1, 1)), labels=np.zeros(1, np.int64))
    words = [str(tmp_path / "from.npz"), "--to", str(tmp_path / "to.npz"), "--data", str(tmp_path / "data.npz")]
    words += ["--eps", "0.5", "--no-clip", "--examples", "1", "--cells", "5", "--relaxations", "crown"]
    assert run(*words, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["table"]
    way, size = 1.5, math.sqrt(1.5**2 + 2)
    assert row["length"] == pytest.approx(way / size)
    assert (row["bound jumps"], row["loss jumps"]) == (1, 1)
    assert row["bound / unit"] == row["loss / unit"] == pytest.approx(size / way)
    assert row["largest bound"] == row["mean bound"] == pytest.approx(0.5, abs=1e-9)
    fall = math.log1p(math.exp(0.5)) - math.log(2)
    assert row["largest loss"] == row["mean loss"] == pytest.approx(fall, abs=1e-9)
    # The first quarter of the way ends before the jump.
    assert run(*words, "--length", "0.25", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["table"]
    assert row["length"] == pytest.approx(way / size / 4)
    assert row["bound jumps"] == 0
