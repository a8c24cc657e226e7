"""Measurements over balls of other norms: the same questions, asked about the ball that is named."""

import pytest
import torch

import optrelax as ox
from optrelax.errors import UnsupportedRegionError
from optrelax.margin_rows import label_rows
from optrelax.regions import ball_of
from optrelax.training.loss_terms import certified_cross_entropy

NAMES = ["box", "crown", "triangle"]


def question() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    net = ox.models.fc(5, 6, 3, seed=0)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_losses_and_jumps_are_those_over_the_ball(norm):
    net, x, labels = question()
    how = {"clip": (0.0, 1.0), "norm": norm, "examples": 2}
    asked = (net, (x, labels), 0.2)
    landscape = ox.measure_landscape(*asked, NAMES[:2], dimensions=1, points=3, **how)
    sensitivity = ox.measure_sensitivity(*asked, NAMES[:2], steps=[1e-3], draws=1, ascent=1, **how)
    continuity = ox.measure_continuity(*asked, NAMES, lines=1, cells=4, budget=60, **how)
    assert landscape.settings["norm"] == sensitivity.settings["norm"] == continuity.settings["norm"] == norm
    assert sensitivity.settings["degrees"] == {}
    chosen = torch.tensor([0, 3])
    region = ball_of(norm)(x[chosen].double(), 0.2, (0.0, 1.0))
    rows = label_rows(labels[chosen], (3,), "test").double()
    for name in NAMES[:2]:
        loss = float(certified_cross_entropy(ox.lower_bounds(net.double(), region, rows, name).detach()))
        (centre,) = landscape.points.filter(relaxation=name, a=0.0)["loss"].to_list()
        (probed,) = sensitivity.table.filter(relaxation=name)["loss"].unique().to_list()
        assert centre == pytest.approx(loss, rel=1e-9)
        assert probed == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_radii_are_of_the_norm_and_no_smaller_than_those_of_the_box(norm):
    net, x, labels = question()
    how = {"limit": 1.0, "resolution": 1e-2, "points": 8}
    ball = ox.measure_tightness(net, (x, labels), NAMES[:2], norm=norm, **how)
    box = ox.measure_tightness(net, (x, labels), NAMES[:2], **how)
    assert "l" + norm[1] in ball.figure().axes[0].get_xlabel()
    for name in NAMES[:2]:
        mine, theirs = ball.examples[f"radius:{name}"], box.examples[f"radius:{name}"]
        assert (mine >= theirs - 0.02).all()
        assert (mine <= ball.examples["radius:attack"] + 1e-9).all()


def test_radii_by_milp_are_those_of_polyhedra():
    net, x, labels = question()
    how = {"limit": 0.5, "resolution": 0.1, "points": 4, "milp": True, "subset": 2}
    radii = ox.measure_tightness(net, (x, labels), "crown", norm="l1", **how).examples
    assert (radii["radius:milp"] >= radii["radius:crown"]).all()
    with pytest.raises(UnsupportedRegionError, match="Milp: takes polyhedra"):
        ox.measure_tightness(net, (x, labels), "crown", norm="l2", **how)
