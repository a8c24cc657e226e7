"""Doors that take numbers: labels for outputs, eps and clip of every form; what is refused says what to type."""

import numpy as np
import pytest
import torch
from torch import nn

import optrelax as ox

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CHANNELS = [0.1, 0.2, 0.3]


def ends(eps: object, clip: object = None) -> ox.LinfBall:
    return ox.LinfBall(X, eps, clip)  # type: ignore[arg-type]


FORMS = {
    "number": (0.1, torch.full((1, 1, 1, 1), 0.1)),
    "tensor without dimensions": (torch.tensor(0.1), torch.full((1, 1, 1, 1), 0.1)),
    "array without dimensions": (np.float64(0.1), torch.full((1, 1, 1, 1), 0.1)),
    "an example": (torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)),
    "a list of examples": ([0.1, 0.2], torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)),
    "channels": (torch.tensor(CHANNELS).reshape(3, 1, 1), torch.tensor(CHANNELS).reshape(1, 3, 1, 1)),
    "channels of a batch": (torch.tensor(CHANNELS).reshape(1, 3, 1, 1), torch.tensor(CHANNELS).reshape(1, 3, 1, 1)),
    "array of channels": (np.array(CHANNELS).reshape(3, 1, 1), torch.tensor(CHANNELS).reshape(1, 3, 1, 1)),
    "nested list": ([[[0.1]], [[0.2]], [[0.3]]], torch.tensor(CHANNELS).reshape(1, 3, 1, 1)),
    "like an example": (torch.full((3, 4, 4), 0.2), torch.full((1, 1, 1, 1), 0.2)),
    "like x": (torch.full((2, 3, 4, 4), 0.2), torch.full((1, 1, 1, 1), 0.2)),
}


@pytest.mark.parametrize("form", FORMS)
def test_eps(form):
    eps, radius = FORMS[form]
    found = ends(eps)
    torch.testing.assert_close(found.lower, X - radius, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.upper, X + radius, rtol=0, atol=1e-7)
    outward = found.outward()
    assert (outward.lower <= found.lower).all()
    assert (outward.upper >= found.upper).all()


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_clip_a_channel(make):
    low, high = [[[-0.1]], [[0.0]], [[-1.0]]], [[[1.0]], [[1.1]], [[2.0]]]
    found = ends(0.5, (make(low), make(high)))
    bottom, top = (torch.tensor(end, dtype=torch.float64) for end in (low, high))
    torch.testing.assert_close(found.lower, (X - 0.5).maximum(bottom))
    torch.testing.assert_close(found.upper, (X + 0.5).minimum(top))
    outward = found.outward()
    assert (outward.lower >= bottom - 1e-7).all()
    assert (outward.lower <= found.lower).all()
    with pytest.raises(ValueError, match="x lies outside clip"):
        ends(0.5, (torch.tensor(high), torch.tensor(high) + 1))


def test_clip_of_tensors_without_dimensions_is_clip_of_numbers():
    found = ends(0.5, (torch.tensor(0.0), np.float32(1.0)))
    assert found.clip == (0.0, 1.0)
    assert torch.equal(found.lower, ends(0.5, (0.0, 1.0)).lower)


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (torch.tensor(CHANNELS), r"3 entries for a batch of 2; for one a channel type eps\.reshape\(3, 1, 1\)"),
        (torch.ones(4, 4), r"broadcast against an example of x \(2, 3, 4, 4\)"),
        (torch.ones(2, 1, 1), r"got \(2, 1, 1\)"),
        (-0.1, "eps must be >= 0"),
        ([0.1, -0.2], "eps must be >= 0, got -0.2"),
        ([0.1, float("nan")], "eps must be >= 0"),
    ],
)
def test_eps_that_fits_nothing(eps, message):
    with pytest.raises(ValueError, match=message):
        ends(eps)


@pytest.mark.parametrize(("eps", "clip"), [("0.1", None), (0.1, "01"), (0.1, (0.0,)), (0.1, (0.0, "1")), ({}, None)])
def test_what_is_no_number(eps, clip):
    with pytest.raises(TypeError, match="LinfBall: "):
        ends(eps, clip)


# --- labels -------------------------------------------------------------------------------------------------------


def linear(*outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, int(torch.tensor(outputs).prod())))
    return nn.Sequential(net, nn.Unflatten(1, outputs)) if len(outputs) > 1 else net


@pytest.mark.parametrize("make", [torch.tensor, np.float64])
def test_certify_takes_any_number(make):
    net, x = linear(3), torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    wanted = ox.certify(net, (x, y), 0.01, relaxation="box")
    found = ox.certify(net, (x, y), make(0.01), clip=(make(0.0), make(1.0)), relaxation="box")
    assert list(found.examples["lower:box"]) == pytest.approx(list(wanted.examples["lower:box"]), abs=1e-7)


@pytest.mark.parametrize("outputs", [(3, 2), (1, 3), (2, 1)])
def test_outputs_that_are_no_class_scores(outputs):
    net, x = linear(*outputs), torch.rand(4, 4)
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels want outputs \[batch, classes\], got \[batch, \d, \d\]"):
        ox.certify(net, (x, labels), 0.01)
    with pytest.raises(ValueError, match="labels want outputs"):
        ox.compare(net, (x, labels), 0.01, ["box"])
    with pytest.raises(ValueError, match="labels want outputs"):
        ox.Bounded(net, "box")(x, 0.01, labels)


@pytest.mark.parametrize("other", [0, -1])
def test_one_output_by_its_sign(other):
    net, x = linear(1).double(), torch.rand(50, 4, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        net[2].bias -= net(x).median() + 1e-3
        values = net(x)[:, 0]
    labels = torch.where(values > 0, 1, other)
    labels[:5] = torch.where(values[:5] > 0, other, 1)  # five are wrong
    rows = ox.sign_margin(labels)
    assert rows.shape == (50, 1, 1)
    assert ((rows[:, 0, 0] * values > 0) == (labels == torch.where(values > 0, 1, other))).all()
    report = ox.certify(net, (x, labels), 1e-9, relaxation=["box", "crown"])
    assert report.accuracy == report.certified == 0.9
    bound = ox.lower_bounds(net, ox.LinfBall(x, 0.1), rows, "crown")
    corners = (x[:, None] + 0.1 * torch.randn(50, 200, 4).double().sign()).flatten(0, 1)
    with torch.no_grad():
        margins = rows[:, 0] * net(corners).reshape(50, 200)
    assert (bound <= margins + 1e-12).all()


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0, 1], [7]])
def test_labels_of_one_output_are_two(labels):
    with pytest.raises(ValueError, match="labels must be 0 and 1"):
        ox.sign_margin(torch.tensor(labels))


def test_weights_in_double_precision_are_never_rounded():
    net, x = linear(3).double(), torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"bounds would be those of a rounded network; use a float64 region"):
        ox.bounds(net, ox.LinfBall(x, 0.1))
    with pytest.raises(ValueError, match=r"float64, which dtype=torch\.float32 would round"):
        ox.certify(net, (x, torch.tensor([0, 1])), 0.1, dtype=torch.float32)
