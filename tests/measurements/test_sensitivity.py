"""Sensitivity: every figure against the library's own entry points on weights moved by hand; the command."""

import json
import math

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.cli import main
from optrelax.output.plots import write_figure

EPS = 0.1
NAMES = ["box", "crown", "crown-soft"]


def network() -> nn.Sequential:
    return ox.models.fc(4, 6, 5, 3, seed=5)


def examples(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    return x, network()(x).argmax(1)


@pytest.fixture(scope="module")
def measured() -> ox.Sensitivity:
    return ox.measure_sensitivity(network(), examples(), EPS, NAMES, steps=(1e-6, 1e-3, 1e-1), draws=3, examples=6)


def rows(result: ox.Sensitivity, kind: str, name: str) -> list[dict]:
    return [r for r in result.table.iter_rows(named=True) if r["kind"] == kind and r["relaxation"] == name]


def loss_and_gradient(net: nn.Sequential, name: str) -> tuple[float, list[torch.Tensor]]:
    x, labels = examples()
    lower = ox.lower_bounds(net, ox.LinfBall(x.double(), EPS, (0.0, 1.0)), ox.margins(labels, 3), name)
    loss = ox.certified_cross_entropy(lower)
    return float(loss.detach()), list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_steps_are_what_a_step_by_hand_gives(measured, name):
    for row in rows(measured, "gradient step", name):
        net = network().double()
        loss, gradient = loss_and_gradient(net, name)
        before = [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradient, strict=True):
                p.sub_(row["step"] * p.norm() * g / g.norm())
        there, other = loss_and_gradient(net, name)
        moved = [p.detach() - w for p, w in zip(net.parameters(), before, strict=True)]
        size = math.sqrt(sum(float(w.square().sum()) for w in before))
        length = math.sqrt(sum(float(m.square().sum()) for m in moved)) / size
        turn = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(other, gradient, strict=True)))
        scale = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        expected = sum(float((m * g).sum()) for m, g in zip(moved, gradient, strict=True))
        assert row["loss"] == pytest.approx(loss)
        assert row["loss change"] == pytest.approx(abs(there - loss))
        assert row["relative change"] == pytest.approx(abs(there - loss) / loss)
        assert row["gradient change"] == pytest.approx(turn / scale)
        assert row["loss Lipschitz"] == pytest.approx(abs(there - loss) / length)
        assert row["gradient Lipschitz"] == pytest.approx(turn / length)
        assert row["predicted"] == pytest.approx((there - loss) / expected)
        assert length == pytest.approx(row["step"])


@pytest.mark.parametrize("name", NAMES)
def test_small_steps_are_predicted_by_the_gradient(measured, name):
    small, *_ = rows(measured, "gradient step", name)
    assert small["predicted"] == pytest.approx(1, abs=1e-4)
    assert small["agreement"] == pytest.approx(1, abs=1e-6)
    assert rows(measured, "random", name)[0]["predicted"] is None


@pytest.mark.parametrize("name", NAMES)
def test_adversarial_steps_move_the_loss_more_than_random_ones(measured, name):
    for random, adversarial in zip(rows(measured, "random", name), rows(measured, "adversarial", name), strict=True):
        assert adversarial["loss change"] > random["loss change"]


def test_an_affine_bound_changes_by_its_gradient_alone():
    """Without activations and with eps 0 the bound is affine in the last layer's bias; its change is the step's."""
    net = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([1.0, 0.0]))
    data = torch.full((1, 2), 0.5), torch.tensor([0])
    result = ox.measure_sensitivity(net, data, 0.0, "box", steps=[0.1], draws=2, examples=1)
    (row,) = [r for r in result.table.iter_rows(named=True) if r["kind"] == "gradient step"]
    # The gradient in the bias is along (-1, 1): a step of 0.1 raises the margin by 0.1 sqrt(2).
    assert row["bound change"] == pytest.approx(0.1 * math.sqrt(2))
    assert row["loss"] == pytest.approx(math.log1p(math.exp(-1)))


def test_degrees_are_given_where_they_are_known(measured):
    degrees = measured.settings["degrees"]
    assert degrees["box"] == [3, 0]
    assert degrees["crown"][0] >= 3
    assert degrees["crown-soft"] is None or degrees["crown-soft"][1] == 0  # no neuron crosses


def test_weights_are_put_back_and_results_repeat(measured):
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    again = ox.measure_sensitivity(net, examples(), EPS, NAMES, steps=(1e-6, 1e-3, 1e-1), draws=3, examples=6)
    assert again.table.equals(measured.table)
    assert all(torch.equal(p, w) and p.dtype == w.dtype for p, w in zip(net.parameters(), before, strict=True))


def test_the_figure(measured, tmp_path):
    figure = measured.figure("title")
    assert len(figure.axes) == 6
    line = next(line for line in figure.axes[0].lines if line.get_label() == "crown")
    expected = [row["relative change"] for row in rows(measured, "random", "crown")]
    assert line.get_ydata().tolist() == pytest.approx(expected)
    assert write_figure(figure, tmp_path / "s.png")[0].exists()


BAD = {
    "steps": ({"steps": [0.0]}, "steps must be positive"),
    "no steps": ({"steps": []}, "steps must be positive"),
    "draws": ({"draws": 0}, "draws must be at least 1"),
    "ascent": ({"ascent": 0}, "ascent must be at least 1"),
    "examples": ({"examples": 7}, "wants 7 examples, the data has 6"),
    "twice": ({"relaxations": ["box", "box"]}, "'box' is given twice"),
    "none": ({"relaxations": []}, "give at least one relaxation"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"measure_sensitivity: .*{message}"):
        ox.measure_sensitivity(network(), examples(), **{"eps": EPS, "examples": 1, **options})


def test_the_command(tmp_path, capsys):
    checkpoint, out = str(tmp_path / "net.safetensors"), tmp_path / "out"
    ox.save(ox.models.fc(64, 10, 10, seed=4).eval(), checkpoint, input_shape=(1, 8, 8))
    words = ["measure", "sensitivity", checkpoint, "--data", "digits", "--eps", "0.02", "--draws", "2"]
    words += ["--examples", "2", "--relaxations", "box", "--steps", "1e-4", "1e-3"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as done:
            main([*words, *more])
        return int(done.value.code or 0)

    assert run("--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    data = ox.load_dataset("digits")
    expected = ox.measure_sensitivity(ox.load(checkpoint), data, 0.02, "box", steps=[1e-4, 1e-3], draws=2, examples=2)
    assert found["table"] == expected.table.to_dicts()
    assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".json", ".png", ".svg"]
    for bad in (["--steps", "-1"], ["--eps", "x"], ["--examples", "0"], ["--relaxation", "bx"]):
        assert run(*bad) == 2
