"""The picture of the relaxations: it shows the lines that bounds are computed with, and their areas are known ones."""

import json
import re

import pytest
import torch
from matplotlib.image import imread

import optrelax as ox
from optrelax.cli import main
from optrelax.networks.activations import clamp
from optrelax.output.relaxation_figures import neuron_hull, relaxation_panels
from optrelax.relaxations import names, resolve

LOOSENED = {"box-widen", "box-round"}
ABS = ox.PiecewiseLinear("abs", torch.abs, kinks=(0.0,), slopes=(-1.0, 1.0), intercepts=(0.0, 0.0))


def titles(figure) -> dict[str, float]:
    """Area by relaxation, as written above the panels."""
    found = {}
    for axes in figure.axes:
        *named, area = axes.get_title(loc="left").split("\n")
        found |= dict.fromkeys(" ".join(named).split(", "), float(area.removeprefix("area ")))
    return found


@pytest.mark.parametrize("name", sorted(set(names()) - LOOSENED))
@pytest.mark.parametrize("activation", [None, ABS, clamp(-0.5, 1.0)], ids=["relu", "abs", "clamp"])
def test_the_lines_enclose_the_activation(name, activation):
    ends = [(-1.0, 2.0), (-2.0, 1.0), (-1.0, 1.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 1.0), (-1.0, 0.0)]
    l, u = torch.tensor(ends).double().unbind(1)
    hull = neuron_hull(name, l, u, activation)
    x = l + (u - l) * torch.linspace(0, 1, 101).double()[:, None]
    values = torch.relu(x) if activation is None else activation(x)
    assert all((slope * x + intercept <= values + 1e-12).all() for slope, intercept in hull.below)
    assert all((slope * x + intercept >= values - 1e-12).all() for slope, intercept in hull.above)


def test_areas_are_those_of_the_field():
    """Closed forms of the areas over l < 0 < u."""
    l, u = -1.0, 3.0
    width, s = u - l, u / (u - l)
    areas = titles(relaxation_panels(l, u))
    assert set(areas) == set(names()) - LOOSENED - {"cauchy"}
    expected = {
        "box": width * u,
        "deepz": width * s * -l,  # Singh et al. 2018
        "deepz-diag": width * -l,
        "crown": width * -l / 2,  # Singh et al. 2019: the smaller of two triangles
        "crown-0": width * u / 2,
        "triangle": -l * u / 2,  # Ehlers 2017
    }
    assert {name: areas[name] for name in expected} == pytest.approx(expected, abs=0.005)
    assert min(areas.values()) == areas["triangle"]


def test_what_is_drawn_is_what_bounds_use():
    figure = relaxation_panels(-1.5, 0.5, ["crown-soft:gamma=3", ox.DeepZ(slope="slanted", kappa=0.25)])
    l, u = torch.tensor(-1.5).double(), torch.tensor(0.5).double()
    for axes, name in zip(figure.axes, ("crown-soft:gamma=3", "deepz-slanted:kappa=0.25"), strict=True):
        lines = resolve(name).lines(ox.activations.relu(), l, u)
        drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
        for label, slope, intercept in (
            ("lines below", lines.lower_slope, lines.lower_intercept),
            ("lines above", lines.upper_slope, lines.upper_intercept),
        ):
            x, y = drawn[label].T
            assert x.tolist() == [-1.5, 0.5]
            assert y.tolist() == pytest.approx([float(slope * end + intercept) for end in (l, u)])
        assert axes.get_title(loc="left").startswith(name.partition("-s")[0])
    looks = {(line.get_linestyle(), line.get_linewidth()) for line in figure.axes[0].lines}
    assert len(looks) == 3  # told apart without colour
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_equal_lines_share_a_panel():
    assert len(relaxation_panels(-1, 2, ["crown", "crown-1", "crown-0"]).axes) == 2
    assert len(relaxation_panels(-2, 1, ["crown", "crown-1", "crown-0"]).axes) == 2
    assert len(relaxation_panels(1, 2, ["crown", "crown-1", "crown-0"]).axes) == 1


def test_another_activation_may_be_drawn():
    (axes,) = relaxation_panels(-1.0, 2.0, ["triangle"], activation=ABS).axes
    # Twice the triangle's area of a ReLU: abs(x) = 2 relu(x) - x.
    assert axes.get_title(loc="left") == "triangle\narea 2.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1.0), "needs finite lower < upper, got 1 and 1"),
        ((-1.0, float("inf")), "needs finite lower < upper"),
        ((-1.0, 1.0, ["box-widen"]), "box-widen is not made of lines"),
        ((-1.0, 1.0, []), "at least one relaxation"),
        ((-1.0, 1.0, ["crwn"]), "did you mean 'crown'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        relaxation_panels(*arguments)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["relaxations", *arguments])
    return int(done.value.code or 0)


def test_the_command_draws(tmp_path, capsys):
    path = tmp_path / "relaxations.png"
    assert run("--plot", str(path), "--lower", "-0.5", "--upper", "2", "--relaxations", "box", "triangle") == 0
    assert capsys.readouterr().out == f"relaxations of one neuron: {path}\n"
    assert imread(path).shape[1] >= 700
    text = re.sub(r"<[^>]+>", "", path.with_suffix(".svg").read_text())
    assert "[-0.5, 2]" in text
    assert "area 0.50" in text  # of the triangle, 0.5 x 2 / 2
    assert run("--plot", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"pictures": [str(path), str(path.with_suffix(".svg"))]}


def test_the_command_refuses(tmp_path, capsys):
    assert run("--lower", "-2") == 2
    assert "belong to --plot" in capsys.readouterr().err
    assert run("--plot", str(tmp_path / "a.jpg")) == 2
    assert "must end in .png" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
