"""LPs and MILPs over regions that are polyhedra, as rows for HiGHS, beside the same by their support function."""

import itertools

import pytest
import torch
from cases import BY_NAME, KINDS, inputs, specification

import optrelax as ox
from optrelax.errors import UnsupportedRegionError
from optrelax.layers import DualAscent, Highs, Status, Triangle
from optrelax.layers.milp import Milp

POLYHEDRA = [kind for kind in KINDS if "l2" not in kind.name]


@pytest.mark.parametrize("kind", POLYHEDRA, ids=str)
def test_highs_and_the_ascent_meet_over_polyhedra(kind):
    net, rows = BY_NAME["fc"].network(), specification(3)
    region = kind.make(inputs((5,), 2), torch.Generator().manual_seed(7))
    with torch.no_grad():
        exact = Triangle(solver=Highs()).solve(net, region, rows)
        near = Triangle(solver=DualAscent(tol=1e-4)).solve(net, region, rows)
    assert (exact.status == Status.OPTIMAL).all()
    assert (exact.gap <= 1e-6).all()
    assert (near.lower <= exact.lower + 1e-6).all()
    torch.testing.assert_close(near.lower, exact.lower, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", POLYHEDRA, ids=str)
def test_a_milp_finds_the_least_value_of_the_region_itself(kind):
    """Of choices one by one, not of their hull."""
    net, rows = BY_NAME["fc"].network(), specification(3)
    region = kind.make(inputs((5,), 1), torch.Generator().manual_seed(7))
    found = Milp().minima(net, region, rows[None])
    points = torch.stack([region.project(x) for x in region.sample(400, torch.Generator().manual_seed(1))])[:, 0]
    if isinstance(region, ox.ChoiceBox):  # every choice of both groups, the rest of the box at its middle
        first, second = region.choices
        more = region.center.repeat(9, 1)
        for i, (a, b) in enumerate(itertools.product(first.values, second.values)):
            more[i, first.index], more[i, second.index] = a, b
        points = torch.cat([points, more])
    with torch.no_grad():
        values = net.module(points) @ rows.mT
    assert (found.lower <= values.amin(0) + 1e-6).all()
    assert found.point is not None
    assert region.contains(found.point[None]).all()
    torch.testing.assert_close(found.lower, found.upper, rtol=0, atol=1e-4)


def test_a_ball_without_corners_is_refused_in_one_sentence():
    net, region, rows = BY_NAME["fc"].network(), ox.L2Ball(inputs((5,), 1), 0.3), specification(3)
    with pytest.raises(UnsupportedRegionError, match=r"export: takes polyhedra .* got L2Ball; .*DualAscent"):
        Triangle(solver=Highs()).solve(net, region, rows)
    with pytest.raises(UnsupportedRegionError, match=r"Milp: takes polyhedra .* got L2Ball; .+"):
        Milp().minima(net, region, rows[None])
