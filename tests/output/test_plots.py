"""Plots: what is drawn is what was given, and no line relies on colour alone."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.image import imread

from optrelax.output.plots import Point, certified_against_eps, line_styles, tightness_against_time, write_figure
from optrelax.relaxations import names

EPS = [0.0, 0.05, 0.1]
LINES = {"box": [0.9, 0.2, 0.0], "crown": [0.9, 0.6, 0.3]}


def drawn(figure):
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines}


def test_certified_lines_hold_the_data_in_percent():
    figure = certified_against_eps(EPS, LINES, title="digits", reference={"PGD": [0.95, 0.9, 0.85]})
    lines = drawn(figure)
    assert list(lines) == ["crown", "box", "PGD"]  # the best first
    assert lines["crown"].get_xdata().tolist() == EPS
    assert lines["crown"].get_ydata().tolist() == pytest.approx([90, 60, 30])
    assert lines["PGD"].get_marker() == "None"
    (axes,) = figure.axes
    assert "eps" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)


def test_every_relaxation_gets_a_look_of_its_own_without_colour():
    looks = line_styles(names())
    assert len(looks) > 30
    assert len({(dash, marker) for _, dash, marker in looks}) == len(looks)
    common = ("box", "crown", "triangle", "deepz", "layerwise", "crown-ibp", "hbox")
    assert len({colour for colour, _, _ in line_styles(common)}) == len(common)
    lines = drawn(certified_against_eps(EPS, {name: [0.5, 0.4, 0.3] for name in names()})).values()
    assert [line.get_color() for line in lines] == [colour for colour, _, _ in looks]
    assert [line.get_marker() for line in lines] == [marker for _, _, marker in looks]


def test_one_relaxation_looks_the_same_in_every_figure():
    alone = {name: line_styles([name])[0] for name in names()}
    assert dict(zip(names(), line_styles(names()), strict=True)) == alone
    mixed = ["mine", "crown", "triangle:preactivation=crown", "box"]
    looks = line_styles(mixed)
    assert (looks[1], looks[3]) == (alone["crown"], alone["box"])
    assert len({(dash, marker) for _, dash, marker in looks}) == 4


def test_points_stand_at_their_time_and_bound():
    points = [Point("box", 1e-4, -30.0), Point("triangle", 2e-2, -0.8)]
    figure = tightness_against_time(points, exact=0.1)
    lines = drawn(figure)
    assert lines["triangle"].get_xydata().tolist() == [[20.0, -0.8]]
    assert lines["box"].get_xydata()[0] == pytest.approx([0.1, -30])
    assert set(lines["exact (MILP)"].get_ydata()) == {0.1}
    (axes,) = figure.axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 0.1 < 20 < right
    assert bottom < -30 < 0.1 < top


@pytest.mark.parametrize("count", [2, 9])
def test_files_hold_the_picture(tmp_path, count):
    lines = {f"line {i}": [0.9 - 0.1 * i] * 3 for i in range(count)}
    png, svg = write_figure(certified_against_eps(EPS, lines), tmp_path / "plot.png")
    pixels = imread(png)[..., :3]
    assert pixels.shape[:2] == (630, 960)
    grey = pixels.mean(-1)
    assert 0.02 < float((grey < 0.7).mean()) < 0.5  # ink, and paper
    tree = ElementTree.parse(svg).getroot()
    text = " ".join(t for element in tree.iter() for t in [element.text or ""])
    assert all(name in text for name in lines)
    first = svg.read_bytes(), png.read_bytes()
    write_figure(certified_against_eps(EPS, lines), tmp_path / "plot.png")
    assert (svg.read_bytes(), png.read_bytes()) == first


def test_lines_differ_in_grey(tmp_path):
    """The same two lines with their colours taken away still make different pictures when swapped."""
    pictures = []
    for order in (["a", "b"], ["b", "a"]):
        values = dict(zip(order, ([0.8, 0.7, 0.6], [0.3, 0.2, 0.1]), strict=True))
        figure = certified_against_eps(EPS, values)
        for line in drawn(figure).values():
            line.set_color("black")
        (path,) = write_figure(figure, tmp_path / f"{order[0]}.png", svg=False)
        pictures.append(imread(path))
    assert not np.array_equal(*pictures)


def test_no_global_setting_moves(tmp_path):
    before = dict(rcParams)
    write_figure(certified_against_eps(EPS, LINES), tmp_path / "plot.png")
    assert dict(rcParams) == before


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="crown has 2 values for 3 radii"):
        certified_against_eps(EPS, {"crown": [0.1, 0.2]})
    with pytest.raises(ValueError, match="at least one radius and one line"):
        certified_against_eps(EPS, {})
    with pytest.raises(ValueError, match="at least one point"):
        tightness_against_time([])
    with pytest.raises(ValueError, match=r"box took 0\.0 s; a time must be > 0"):
        tightness_against_time([Point("box", 0.0, 1.0)])
    with pytest.raises(ValueError, match=r"plot\.jpg must end in \.png"):
        write_figure(certified_against_eps(EPS, LINES), tmp_path / "plot.jpg")
    assert list(tmp_path.iterdir()) == []
