"""Loss landscape: filter normalisation, points evaluated afresh, one scale, and the command."""

import json

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.cli import main
from optrelax.measurements.weight_lines import filter_normalised
from optrelax.output.plots import write_figure

NAMES = ["box", "crown"]
EPS = 0.05


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def seeded() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network()


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return x, seeded()(x).argmax(1)


def measured(**options) -> ox.Landscape:
    return ox.measure_landscape(
        seeded(), examples(), EPS, NAMES, **{"points": 3, "examples": 4, "radius": 0.4, **options}
    )


def test_every_filter_of_a_direction_is_as_long_as_the_filter_it_moves():
    weights = tuple(p.detach().double() for p in seeded().parameters())
    direction = filter_normalised(weights, torch.Generator().manual_seed(1))
    for d, w in zip(direction, weights, strict=True):
        if w.dim() == 1:
            assert not d.any()
        else:
            assert torch.allclose(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))


def test_points_are_the_loss_at_moved_weights():
    net = seeded().double()
    weights = tuple(p.detach().clone() for p in net.parameters())
    generator = torch.Generator().manual_seed(0)
    first, second = (filter_normalised(weights, generator) for _ in range(2))
    x, labels = examples()
    region = ox.LinfBall(x.double(), EPS, (0.0, 1.0))
    result = measured()
    assert result.points.height == 2 * 9
    for row in result.points.iter_rows(named=True):
        with torch.no_grad():
            for p, w, d, e in zip(net.parameters(), weights, first, second, strict=True):
                p.copy_(w + row["a"] * d + row["b"] * e)
            lower = ox.lower_bounds(net, region, ox.margins(labels, 3), row["relaxation"])
            assert row["loss"] == pytest.approx(float(ox.certified_cross_entropy(lower)), rel=1e-12)


def test_table():
    for row in measured(dimensions=1, points=5).table().iter_rows(named=True):
        assert row["least"] <= row["center"] <= row["greatest"]
        assert row["roughness"] >= 0


def test_maps_share_one_colour_scale(tmp_path):
    figure = measured().figure("title")
    meshes = [mesh for axes in figure.axes for mesh in axes.collections if hasattr(mesh, "_coordinates")]
    norms = {(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes}
    loss = measured().points["loss"]
    assert (loss.min(), loss.max()) in norms
    assert len({id(mesh.norm) for mesh in meshes if mesh.get_array().size == 9}) == 1
    assert write_figure(figure, tmp_path / "l.png")[0].exists()


def test_a_line_is_drawn_as_curves():
    result = measured(dimensions=1)
    assert result.points["b"].unique().to_list() == [0.0]
    (axes,) = result.figure().axes
    assert [line.get_label() for line in axes.lines] == NAMES


BAD = {
    "dimensions": ({"dimensions": 3}, "dimensions must be 1 or 2, got 3"),
    "radius": ({"radius": -1.0}, "radius must be positive"),
    "points": ({"points": 4}, "points must be odd and at least 3, got 4"),
    "examples": ({"examples": 0}, "examples must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"measure_landscape: {message}"):
        measured(**options)


def test_the_command(tmp_path, capsys):
    checkpoint, out = str(tmp_path / "net.safetensors"), tmp_path / "out"
    ox.save(ox.models.fc(64, 10, 10, seed=4).eval(), checkpoint, input_shape=(1, 8, 8))
    words = ["measure", "landscape", checkpoint, "--data", "digits", "--eps", "0.02", "--points", "3"]
    words += ["--examples", "2", "--relaxations", "box", "hbox"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as done:
            main([*words, *more])
        return int(done.value.code or 0)

    assert run("--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    data = ox.load_dataset("digits")
    expected = ox.measure_landscape(ox.load(checkpoint), data, 0.02, ["box", "hbox"], points=3, examples=2)
    assert found["table"] == expected.table().to_dicts()
    assert {path.name for path in out.iterdir()} >= {"points.csv", "landscape.png", "landscape.svg"}
    for bad in (["--points", "4"], ["--dimensions", "3"], ["--radius", "0"]):
        assert run(*bad) == 2
