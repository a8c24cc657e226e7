"""Networks of smooth activations through every relaxation: bounds that hold, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
from cases import CLOSED_FORMS, random_points
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import Layerwise, Status, Triangle


class Powers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rsqrt(torch.exp(x) + 0.5) + torch.log(torch.exp(-x) + 0.5) - x**3 / 10


ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "selu": nn.SELU, "powers": Powers}
REFUSED = [n for n in CLOSED_FORMS if any(part in n for part in ("diag", "switch", "slanted", "deepz-soft"))]
REFUSED += [n for n in CLOSED_FORMS if n.startswith(("crown-0", "crown-1"))]
SOUND = [n for n in CLOSED_FORMS if n not in REFUSED and n != "cauchy"]


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = ACTIVATIONS[name]
        return nn.Sequential(nn.Linear(4, 6), kind(), nn.Linear(6, 5), kind(), nn.Linear(5, 3)).double()


def region() -> ox.LinfBall:
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ox.LinfBall(x, torch.tensor([0.0, 0.02, 0.2, 0.7], dtype=torch.float64))


@pytest.mark.parametrize("activation", ["tanh", "gelu", "powers"])
def test_bounds_hold(activation):
    net, ball = network(activation), region()
    points = random_points(ball, 200)
    with torch.no_grad():
        values = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        for name in [*SOUND, "alpha-crown", "triangle", "layerwise"]:
            for rounding, slack in (("nearest", 1e-10), ("outward", 0.0)):
                found = ox.bounds(net, ball, name, rounding=rounding)
                assert (found.lower - slack <= values).all(), (name, rounding)
                assert (found.upper + slack >= values).all(), (name, rounding)


@pytest.mark.parametrize("name", REFUSED)
def test_choices_among_slopes_are_refused_by_name(name):
    with pytest.raises(ox.UnsupportedOpError, match=r"1: tanh: has no constant slopes to choose among; take box"):
        ox.bounds(network("tanh"), region(), name)


@pytest.mark.parametrize("activation", ["sigmoid", "selu"])
def test_the_layers_are_tighter_than_crown_on_its_bounds_and_close_their_gap(activation):
    net, ball = network(activation), region()
    rows = torch.eye(3, dtype=torch.float64)
    crown = ox.lower_bounds(net, ball, rows, "crown")
    found = Triangle(preactivation=ox.Crown()).solve(net, ball, rows)
    assert (found.lower >= crown - 1e-9).all()
    assert (found.status == Status.OPTIMAL).all()
    tighter = Layerwise(preactivation=ox.Crown()).solve(net, ball, rows)
    assert (tighter.lower >= found.lower - 1e-3).all()
    exact = Triangle(preactivation=ox.Crown(), solver=ox.layers.Highs()).solve(net, ball, rows)
    torch.testing.assert_close(found.lower, exact.lower, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["box", "deepz", "crown", "crown-ibp"])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_gradients_through_a_network(activation, name):
    net, ball = network(activation), region().select(slice(2, 3))
    rows = torch.eye(3, dtype=torch.float64)[:1]
    weight = net[0].weight

    def bound(w: Tensor) -> Tensor:
        with torch.no_grad():
            weight.copy_(w)
        found = ox.lower_bounds(net, ball, rows, name).sum()
        (gradient,) = torch.autograd.grad(found, weight)
        return found.detach(), gradient  # type: ignore[return-value]

    origin = weight.detach().clone()
    way = torch.randn(origin.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, gradient = bound(origin)
    ahead, behind = (bound(origin + step * way)[0] for step in (1e-6, -1e-6))
    torch.testing.assert_close((ahead - behind) / 2e-6, (gradient * way).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_a_network_trained_on_digits_is_certified(activation):
    """Trained through CROWN-IBP; what a relaxation certifies, none of the attacks breaks."""
    train, test = ox.load_dataset("digits", split="train"), ox.load_dataset("digits", split="test")
    x, y = train.images.flatten(1).double(), train.labels
    torch.manual_seed(0)
    kind = ACTIVATIONS[activation]
    net = nn.Sequential(nn.Linear(64, 40), kind(), nn.Linear(40, 20), kind(), nn.Linear(20, 10)).double()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(50):
        index = torch.randint(len(x), (100,))
        bound = ox.lower_bounds(
            net, ox.LinfBall(x[index], 0.02, (0.0, 1.0)), ox.margins(y[index], classes=10), "crown-ibp"
        )
        loss = ox.certified_cross_entropy(bound)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    part = (test.images[:20].flatten(1).double(), test.labels[:20])
    certified = {}
    for name in [*SOUND, "alpha-crown", "triangle", "layerwise"]:
        report = ox.certify(net, part, eps=0.02, clip=(0.0, 1.0), relaxation=name)
        certified[name] = report.certified
        assert report.accuracy > 0.7, name
        assert report.certified + report.attacked <= 1, name
        assert report.certified <= report.accuracy, name
    assert certified["crown"] > 0.4
    assert certified["layerwise"] >= certified["triangle"] >= certified["crown-ibp"] >= certified["box"]
    assert certified["alpha-crown"] >= certified["crown"]


@pytest.mark.data
@pytest.mark.parametrize(("kind", "scale"), [(nn.Sigmoid, 3.0), (nn.Tanh, 1.0)])
def test_six_layers_of_two_hundred_on_mnist(kind, scale, data_dir):
    """The shape of ERAN's sigmoid network, with weights that keep its neurons from saturating."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential()
        for inputs in (784, *[200] * 5):
            net += nn.Sequential(nn.Linear(inputs, 200), kind())
        net += nn.Sequential(nn.Linear(200, 10))
        with torch.no_grad():
            for layer in net[::2]:
                layer.weight.mul_(scale)
    images = ox.load_dataset("mnist", data_dir=data_dir).images[::5000].flatten(1).double()
    net = net.double()
    ball = ox.LinfBall(images, 0.012, (0.0, 1.0))
    points = random_points(ball, 50)
    with torch.no_grad():
        values = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        widths = {}
        for name in ("box", "deepz", "crown-ibp", "crown"):
            found = ox.bounds(net, ball, name, rounding="outward")
            assert (found.lower <= values).all(), name
            assert (found.upper >= values).all(), name
            widths[name] = float((found.upper - found.lower).mean())
    assert widths["crown"] < widths["crown-ibp"] < widths["box"]
    assert widths["crown"] < widths["box"] / 5
