"""Networks that multiply their values: capture, soundness, rounding, gradients, files, and derivatives as networks."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Attention, inputs, random_points
from oracles import fractions
from torch import Tensor, nn

import optrelax as ox
from optrelax.lipschitz import lipschitz_bound
from optrelax.networks.derivatives import derivative

RELAXATIONS = ["box", "hbox", "deepz", "deepz-box", "fast-lin", "crown", "crown-ibp", "crown-soft"]


def corners(region: ox.InputBox) -> Tensor:
    """[2 ** inputs, batch, inputs]."""
    n = region.lower.shape[1]
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=region.dtype)
    return region.lower + choices[:, None] * (region.upper - region.lower)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x[:, :3] * x[:, 3:], (6,)),
        (lambda x: x * x[:, :1], (4,)),
        (lambda x: x[:, 0] @ x[:, 1].mT, (2, 3, 4)),
        (lambda x: torch.bmm(x, x.mT), (3, 4)),
        (lambda x: x.mT @ x[:, :, :1], (3, 4)),
        (lambda x: torch.einsum("bhid,bhjd->bhij", x, x), (2, 3, 2)),
        (lambda x: torch.einsum("bi,bj->bij", x, x), (3,)),
    ],
)
def test_products_of_values_are_captured(function, shape):
    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    network = ox.capture(Net(), shape)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x), function(x))
    point = ox.bounds(network, ox.InputBox(x, x), "crown")
    torch.testing.assert_close(point.lower, function(x))


@pytest.mark.parametrize("name", RELAXATIONS)
def test_bounds_of_products_hold(name):
    network = ox.capture(Attention().double(), (6,))
    x = inputs((6,), 3)
    for eps in (0.0, 0.02, 0.3):
        region = ox.LinfBall(x, eps)
        inside = region.lower + torch.rand(300, 3, 6, generator=torch.Generator().manual_seed(1)) * 2 * region.radius
        with torch.no_grad():
            y = torch.stack(
                [network(p) for p in torch.cat([corners(region), inside.clamp(region.lower, region.upper)])]
            )
            found = ox.bounds(network, region, name, rounding="outward")
            near = ox.bounds(network, region, name)
        assert bool((found.lower <= y.amin(0)).all())
        assert bool((found.upper >= y.amax(0)).all())
        torch.testing.assert_close(found.lower, near.lower)
        if eps == 0.02:  # to first order nothing is lost
            assert float(near.width.mean()) < (4.0 if name == "box" else 1.6) * float((y.amax(0) - y.amin(0)).mean())
        singles = [ox.bounds(network, region.select(slice(i, i + 1)), name).lower for i in range(3)]
        torch.testing.assert_close(torch.cat(singles), near.lower)


class Cubic(nn.Module):
    """(W x + b) times x, a square of it, in single precision: small enough for fractions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * x
        return self.last(y * y - y)

    def rational(self, x: np.ndarray) -> np.ndarray:
        w, b, v, c = (fractions(p) for p in (self.first.weight, self.first.bias, self.last.weight, self.last.bias))
        y = (w @ x + b) * x
        return v @ (y * y - y) + c


@pytest.mark.parametrize("name", ["box", "deepz", "hbox", "crown", "crown-ibp", "triangle"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e6])
def test_rounding_outward_holds_in_fractions(name, scale):
    """At corners and without width, with no tolerance."""
    net = Cubic()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)) * scale
    for eps in (0.0, 1e-7 * scale, 0.1 * scale):
        region = ox.InputBox(x - eps, x + eps)
        with torch.no_grad():
            found = ox.bounds(net, region, name, rounding="outward")
        for i, point in itertools.product(range(2), corners(region)):
            y = net.rational(fractions(point[i]))
            for j in range(2):
                assert Fraction(float(found.lower[i, j])) <= y[j] <= Fraction(float(found.upper[i, j]))


@pytest.mark.parametrize("name", ["box", "deepz", "hbox", "crown", "crown-ibp"])
def test_bounds_of_products_have_exact_gradients(name):
    net = Cubic().double()
    x = inputs((3,), 2).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: ox.bounds(net, ox.InputBox(x - 0.1, x + 0.2), name).lower, (x,))
    ox.bounds(net, ox.InputBox(x.detach(), x.detach()), name).lower.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_samples_take_no_products():
    with pytest.raises(ox.UnsupportedOpError, match="Multiply: has no rule"):
        ox.bounds(Attention(), ox.LinfBall(torch.zeros(1, 6), 0.1), "cauchy")


def test_products_are_stored(tmp_path):
    net, x = Attention(), torch.randn(2, 6)
    for path in (tmp_path / "net.safetensors", tmp_path / "net.onnx"):
        ox.save(net, path, input_shape=(6,))
        torch.testing.assert_close(ox.load(path)(x), net(x))


# --- derivatives ----------------------------------------------------------------------------------------------------


def jacobians(net: nn.Module, x: Tensor) -> Tensor:
    """By autograd, [batch, outputs, inputs]."""
    return torch.stack([torch.autograd.functional.jacobian(lambda v: net(v[None])[0], point) for point in x])


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: ox.models.fc(6, 9, 7, 3, seed=4), Attention], ids=["fc", "attention"])
def test_jacobian_bounds_hold(make):
    net = make().double()
    x = inputs((6,), 2)
    torch.testing.assert_close(derivative(ox.capture(net, (6,)))(x), jacobians(net, x))
    for eps, name in itertools.product((0.0, 0.1), ("box", "deepz", "crown")):
        region = ox.LinfBall(x, eps)
        found = ox.jacobian_bounds(net, region, name, rounding="outward")
        assert found.lower.shape == (2, 3, 6)
        points = region.lower + torch.rand(60, 2, 6, generator=torch.Generator().manual_seed(0)) * 2 * region.radius
        exact = torch.stack([jacobians(net, p.clamp(region.lower, region.upper)) for p in points])
        slack = 1e-12  # autograd itself rounds
        assert bool((found.lower <= exact.amin(0) + slack).all())
        assert bool((found.upper >= exact.amax(0) - slack).all())
        if eps == 0:
            assert float(found.width.max()) < 1e-10
        for norm in (1, 2, math.inf):
            constant = lipschitz_bound(net, region, norm, name, rounding="outward")
            assert bool((torch.linalg.matrix_norm(exact, norm).amax(0) <= constant).all())


class Curved(nn.Module):
    """A smooth function between two affine ones."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.last = function, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(3 * self.first(x)))


SMOOTH = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "softsign": F.softsign,
    "atan": torch.atan,
    "erf": torch.erf,
    "cos": torch.cos,
    "log": lambda x: torch.log(x * x + 1),
    "sqrt": lambda x: torch.sqrt(x * x + 1),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SMOOTH)
def test_jacobians_of_smooth_activations_are_bounded(name):
    net, x = Curved(SMOOTH[name]).double(), inputs((3,), 2)
    jacobian = torch.func.vmap(torch.func.jacrev(net))
    torch.testing.assert_close(derivative(ox.capture(net, (3,)))(x), jacobian(x))
    region = ox.LinfBall(x, torch.tensor([0.0, 0.5]).double())
    points = random_points(region, 100)
    exact = jacobian(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    for relaxation in ("box", "crown"):
        found = ox.jacobian_bounds(net, region, relaxation, rounding="outward")
        assert bool((found.lower <= exact.amin(0) + 1e-12).all())  # autograd itself rounds
        assert bool((found.upper >= exact.amax(0) - 1e-12).all())
        assert float(found.width[0].max()) < 1e-10
        assert float(found.width[1].mean()) < 10 * float((exact.amax(0) - exact.amin(0))[1].mean())
    constant = lipschitz_bound(net, region, 2, "crown", rounding="outward")
    assert bool((torch.linalg.matrix_norm(exact, 2).amax(0) <= constant * (1 + 1e-12)).all())


@torch.no_grad()
def test_a_kink_in_the_region_gives_both_slopes():
    """|x| at 0: every slope between -1 and 1; and only where the region holds the kink, its end included."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[2].weight.fill_(1.0)
    ends = torch.tensor([[-1.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.5, 1.0]]).double()
    found = ox.jacobian_bounds(net, ox.InputBox(ends[:, :1], ends[:, 1:]), "box")
    assert found.lower.flatten().tolist() == [-1, -1, -1, -1, 1]
    assert found.upper.flatten().tolist() == [1, 1, 1, 1, 1]


def test_what_has_no_derivative_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten())
    with pytest.raises(ox.UnsupportedOpError, match="MaxPool: has no derivative"):
        ox.jacobian_bounds(net, ox.LinfBall(torch.zeros(1, 4), 0.1))
    for kind, reason in ((nn.SELU, "elu has a corner at 0"), (nn.Mish, "mish says nothing of its derivative")):
        with pytest.raises(ox.UnsupportedOpError, match=reason):
            ox.jacobian_bounds(nn.Sequential(nn.Linear(4, 4), kind()), ox.LinfBall(torch.zeros(1, 4), 0.1))
    with pytest.raises(ValueError, match="norm must be 1, 2 or"):
        lipschitz_bound(net, ox.LinfBall(torch.zeros(1, 4), 0.1), 3)
