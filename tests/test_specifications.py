"""Specifications: margins, the shapes rows may have, and the rows that are refused."""

from fractions import Fraction

import oracles
import pytest
import torch
from cases import inputs
from torch import nn

import optrelax as ox
from optrelax.layers import Highs, Triangle
from optrelax.margin_rows import check_specification


def test_margins_are_label_minus_other_in_class_order():
    spec = ox.margins(torch.tensor([0, 2, 3]), 4)
    assert spec.shape == (3, 3, 4)
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).expand(3, 4)
    values = (spec @ logits[..., None])[..., 0]
    assert values.tolist() == [[-1, -3, -7], [3, 2, -4], [7, 6, 4]]


def test_margins_of_any_batch_shape_and_integer_type():
    labels = torch.tensor([[0, 1], [2, 0]])
    spec = ox.margins(labels, 3)
    assert spec.shape == (2, 2, 2, 3)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(ox.margins(labels.to(dtype), 3), spec)
    assert torch.equal(ox.margins(torch.tensor(1), 3), ox.margins(torch.tensor([1]), 3)[0])
    assert ox.margins(torch.zeros(0, dtype=torch.long), 3).shape == (0, 2, 3)
    assert ox.margins(torch.tensor([1]), 2).tolist() == [[[-1, 1]]]


@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        (torch.tensor([0, 3]), 3, ValueError, r"margins: labels must lie in \[0, 2\], got 3"),
        (torch.tensor([-1]), 3, ValueError, r"margins: labels must lie in \[0, 2\], got -1"),
        (torch.tensor([0.0]), 3, TypeError, "margins: labels must be integers, got torch.float32"),
        (torch.tensor([True]), 3, TypeError, "margins: labels must be integers, got torch.bool"),
        (torch.tensor([0]), 1, ValueError, "margins: classes must be at least 2, got 1"),
    ],
)
def test_labels_that_are_none_are_refused(labels, classes, error, message):
    with pytest.raises(error, match=message):
        ox.margins(labels, classes)


def test_rows_for_all_are_rows_for_each():
    net, region = nn.Linear(3, 4).double(), ox.LinfBall(inputs((3,), 5), 0.1)
    rows = torch.randn(2, 4)
    shared = ox.lower_bounds(net, region, rows)
    assert shared.shape == (5, 2)
    torch.testing.assert_close(shared, ox.lower_bounds(net, region, rows.expand(5, 2, 4)))


def test_rows_are_cast_to_the_type_of_the_region():
    net, region = nn.Linear(3, 4).double(), ox.LinfBall(inputs((3,), 5), 0.1)
    rows = torch.randint(-2, 3, (2, 4))
    assert ox.lower_bounds(net, region, rows).dtype == torch.float64


def test_rows_of_images_are_flat():
    """Outputs of any shape are counted flat, in the order of flatten."""
    net, region = nn.Conv2d(1, 2, 2).double(), ox.LinfBall(inputs((1, 3, 3), 2), 0.1)
    bounds = ox.bounds(net, region)
    assert bounds.lower.shape == (2, 2, 2, 2)
    torch.testing.assert_close(ox.lower_bounds(net, region, torch.eye(8)), bounds.lower.flatten(1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(4), r"rows must be \[k, 4\] or \[\*batch, k, 4\] for a network with 4 outputs, got \(4,\)"),
        (torch.zeros(2, 3), r"for a network with 4 outputs, got \(2, 3\)"),
        (torch.zeros(3, 2, 4), r"rows have batch \(3,\), the region has \(5,\)"),
        (torch.zeros(1, 2, 4), r"rows have batch \(1,\), the region has \(5,\)"),
        (torch.tensor([[0.0, 1.0, torch.nan, 0.0]]), "specification: rows must be finite"),
        (torch.tensor([[0.0, 1.0, torch.inf, 0.0]]), "specification: rows must be finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        check_specification(rows, torch.Size([5]), 4)
    with pytest.raises(ValueError, match=message):
        ox.lower_bounds(nn.Linear(3, 4), ox.LinfBall(torch.rand(5, 3), 0.1), rows)


@pytest.mark.parametrize("labels", [torch.tensor(3), torch.tensor([3, 4])])
def test_rows_are_the_callers_own(labels):
    kept = ox.margins(labels, 10).clone()
    ox.margins(labels, 10).mul_(-1)
    assert torch.equal(ox.margins(labels, 10), kept)


# --- rows with offsets, joined by "and" and "or" ---------------------------------------------------------------------


def holds(spec: ox.Specification, y: torch.Tensor) -> list[bool]:
    """Which outputs [n, outputs] fulfil it, by the booleans of its rows."""
    values = spec.values(y)
    good = (values > 0) | (spec.closed & (values == 0))
    return [all(any(good[i, k] for k in group) for group in spec.groups) for i in range(len(y))]


def test_and_and_or_are_those_of_their_parts():
    y = torch.randint(-2, 3, (200, 3)).double()
    a, b, c = (ox.Specification(torch.randn(2, 3).double().round(), torch.tensor([0.0, 1.0])) for _ in range(3))
    for made, wanted in (
        (a & b, [p and q for p, q in zip(holds(a, y), holds(b, y), strict=True)]),
        (a | b, [p or q for p, q in zip(holds(a, y), holds(b, y), strict=True)]),
        (ox.any_of(a & c, b), [(p and r) or q for p, q, r in zip(holds(a, y), holds(b, y), holds(c, y), strict=True)]),
    ):
        assert holds(made, y) == wanted
        assert (made.worst(made.values(y)) > 0).all(-1).tolist() == wanted
        failing = [any(made.failing(value)) for value in made.values(y)]
        assert failing == [not good for good in wanted]


def test_a_region_of_tolerance_has_its_ends():
    target, delta = torch.tensor([[0.1, -3.0], [2.0, 0.0]]), 0.3
    spec = ox.within(target, delta)
    assert holds(spec.select(slice(0, 1)), target[:1].double()) == [True]
    exact = ox.within(torch.tensor([1.0]), 0.5)
    assert holds(exact, torch.tensor([[0.5], [1.5], [0.49], [1.51]]).double()) == [True, True, False, False]
    # Offsets are the exact ones or less.
    for offset, y, sign in zip(spec.offsets[0].tolist(), target[0].tolist() * 2, (-1, -1, 1, 1), strict=True):
        gap = Fraction(delta) + sign * Fraction(y) - Fraction(offset)
        assert 0 <= gap < Fraction(1, 10**15)


def test_an_order_is_strict():
    spec = ox.ordering([2, 0, 1], 4)
    y = torch.tensor([[2.0, 1.0, 3.0, 9.0], [2.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 0.0]]).double()
    assert holds(spec, y) == [True, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.Specification(torch.zeros(3)), r"rows must be \[k, outputs\]"),
        (lambda: ox.Specification(torch.zeros(2, 3), torch.zeros(3)), r"offsets must be \(2,\) or a number"),
        (lambda: ox.Specification(torch.zeros(2, 3), groups=[[0, 2]]), "a group names row 2 of 2"),
        (lambda: ox.Specification(torch.zeros(2, 3), names=["a", "a"]), "names wants 2 different names"),
        (lambda: ox.Specification(torch.full((1, 2), torch.inf)), "must be finite"),
        (lambda: ox.any_of(torch.zeros(1, 2), torch.zeros(1, 3)), "the parts are of"),
        (lambda: ox.any_of(*[torch.eye(10)] * 5), "at most 10000"),
        (lambda: ox.within(torch.zeros(2), -1.0), "delta must be finite and >= 0"),
        (lambda: ox.ordering([0, 3], 3), r"outputs must lie in \[0, 2\]"),
        (
            lambda: ox.lower_bounds(nn.Linear(2, 2), ox.InputBox(torch.zeros(1, 2), torch.ones(1, 2)), 3),
            "wants a tensor",
        ),
    ],
)
def test_what_is_no_specification_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_the_greatest_of_rows_is_bounded_as_its_lp_does():
    """The LP of the maximum, with a variable of its own above all rows, by HiGHS on equal pre-activation bounds."""
    net, region = ox.models.fc(3, 12, 8, 4, seed=2).double(), ox.LinfBall(inputs((3,), 3), 0.4)
    network = ox.capture(net, (3,))
    rows, offsets = torch.eye(4).double()[:3] - torch.eye(4).double()[3], torch.tensor([0.2, 0.0, -0.1]).double()
    spec = ox.Specification(rows, offsets, [[0, 1, 2], [1]])
    relaxation = Triangle(preactivation="crown", solver=Highs())
    before = ox.Crown().preactivation_bounds(network, region)
    with torch.no_grad():
        exact = oracles.greatest(network, region, rows, offsets, before)
    with torch.no_grad():
        found = ox.lower_bounds(net, region, spec, relaxation)
        alone = ox.lower_bounds(net, region, rows, relaxation) + offsets
    assert bool((found[:, 0] <= exact + 1e-9).all())
    torch.testing.assert_close(found[:, 0], exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 1], alone[:, 1])
    assert bool((alone.amax(1) < exact - 1e-3).any())  # no row alone does it
    for name in ("box", "crown", "deepz"):
        with torch.no_grad():
            loose = ox.lower_bounds(net, region, spec, name, rounding="outward")
            one_by_one = torch.cat([ox.lower_bounds(net, region.select(slice(i, i + 1)), spec, name) for i in range(3)])
        x = region.lower + torch.rand(50, 3, 3).double() * (region.upper - region.lower)
        values = torch.stack([spec.worst(spec.values(network(point))) for point in x]).amin(0)
        assert bool((loose <= values).all())
        torch.testing.assert_close(loose, one_by_one, rtol=1e-3, atol=1e-3)


def test_bounds_of_a_greatest_row_have_a_gradient():
    """That of the bound at the weights found: the search moves them only where it does not matter."""
    net, region = ox.models.fc(2, 6, 3, seed=2).double(), ox.LinfBall(inputs((2,), 1), 0.5)
    spec = ox.any_of(torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[-1.0, 0.0, 1.0]]))
    found = ox.lower_bounds(net, region, spec, "crown-ibp")
    weight = net[-1].weight
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    step = torch.zeros_like(weight)
    step[0, 0] = 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * step
            ends.append(ox.lower_bounds(net, region, spec, "crown-ibp"))
            weight -= sign * step
    assert float((ends[0] - ends[1]).sum() / 2e-3) == pytest.approx(float(gradient[0, 0]), abs=2e-2)
