"""Specifications: margins, the shapes rows may have, and the rows that are refused."""

import pytest
import torch
from cases import inputs
from torch import nn

import optrelax as ox
from optrelax.specifications import check_specification


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
