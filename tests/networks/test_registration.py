"""What users add: activations, ops and relaxations of their own."""

from dataclasses import dataclass

import pytest
import torch
from cases import SOUND, corners, inputs, random_points, specification
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks.calls import Call
from optrelax.networks.ops import Affine, Linear
from optrelax.relaxations import name_of, names, resolve

pytestmark = pytest.mark.usefixtures("registries_as_before")


ABS = ox.PiecewiseLinear("abs", torch.abs, kinks=(0.0,), slopes=(-1.0, 1.0), intercepts=(0.0, 0.0))


class Absolute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.abs(self.first(x))
        return self.last((h - 0.5).abs())


def assert_sound(net: nn.Module, shape: tuple[int, ...], relaxation: object) -> None:
    region = ox.LinfBall(inputs(shape, 4), torch.tensor([0.0, 0.05, 0.3, 1.0]).double())
    rows = specification(net(region.center).shape[1])
    points = torch.cat([random_points(region, 80), corners(region, 80)])
    with torch.no_grad():
        values = net(points.flatten(0, 1)).unflatten(0, points.shape[:2]) @ rows.mT
        low = ox.lower_bounds(net, region, rows, relaxation)  # type: ignore[arg-type]
        outward = ox.lower_bounds(net, region, rows, relaxation, rounding="outward")  # type: ignore[arg-type]
    assert (low <= values + 1e-10).all()
    assert (outward <= values).all()


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_an_activation_of_the_user_works_in_every_relaxation(case):
    """As a function and as a method, before the rule that the library has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Absolute().double()
    ox.register_activation(torch.abs, "abs", activation=ABS)
    assert [node.op for node in ox.capture(net, (4,)).activations] == [ABS, ABS]
    assert_sound(net, (4,), case.make())


def test_modules_can_be_activations_too():
    class Notch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 1, 3 * x - 2, -x.sin() * 0 + x)

    notch = ox.PiecewiseLinear("notch", lambda x: torch.maximum(x, 3 * x - 2), (1.0,), (1.0, 3.0), (0.0, -2.0))
    ox.register_activation(Notch, activation=notch)
    net = nn.Sequential(nn.Linear(4, 5), Notch(), nn.Linear(5, 3)).double()
    for name in ("box", "hbox-diag", "deepz", "crown", "crown-1-tria-c"):
        assert_sound(net, (4,), name)


def test_an_activation_wants_an_activation():
    with pytest.raises(TypeError):
        ox.register_activation(torch.abs, activation=torch.abs)  # type: ignore[arg-type]


class Reverse(Affine):
    """The last dimension in reverse order: an op of a user's own."""

    diagonal = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.input_shapes, self.shape = (shape,), shape

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0].flip(-1)

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return rs[0].flip(-1)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a.flip(-1),)


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.flip(self.first(x), (-1,))))


@pytest.mark.parametrize("name", ["box", "hbox", "deepz", "crown", "cauchy"])
def test_an_op_of_the_user_is_one_class(name):
    net = Reversed().double()

    @ox.register_op(torch.flip)
    def _flip(call: Call) -> Affine:
        if call.argument(1, "dims") != (-1,):
            raise ValueError("only the last dimension")
        return Reverse(call.shape())

    if name != "cauchy":
        assert_sound(net, (4,), name)
    assert any(isinstance(node.op, Reverse) for node in ox.capture(net, (4,)))
    torch.testing.assert_close(ox.capture(net, (4,))(torch.ones(1, 4).double()), net(torch.ones(1, 4).double()))


def test_a_builder_refuses_with_a_reason():
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.flip(x, (0,))

    @ox.register_op(torch.flip)
    def _flip(call: Call) -> Affine:
        raise ValueError("only the last dimension")

    (problem,) = ox.check(Wrong(), (4,)).problems
    assert (problem.where, problem.op, problem.reason) == ("flip", "flip", "only the last dimension")
    assert problem.source.startswith(__file__)


def test_constants_of_a_builder_s_op_are_read_at_each_use():
    @ox.register_op(torch.addmm)
    def _addmm(call: Call) -> Affine:
        weight, bias = call.constant(2, "mat2"), call.constant(0, "input")
        assert weight is not None
        return Linear(call.shape(1), lambda: weight().mT, bias)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.b, x, self.w)

    net, x = Product().double(), inputs((4,), 2)
    network = ox.capture(net, (4,))
    with torch.no_grad():
        net.w.mul_(2)
    torch.testing.assert_close(network(x), net(x))
    ox.bounds(network, ox.LinfBall(x, 0.1)).lower.sum().backward()
    assert net.w.grad is not None


def test_what_is_registered_is_a_type_a_function_or_a_name():
    with pytest.raises(TypeError):
        ox.register_op(3)(lambda site: ABS)  # type: ignore[arg-type]


# --- relaxations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tenth(ox.Crown):
    """CROWN whose lower slope is a given number, on the bounds of Box: a relaxation of a user's own."""

    slope: float = 0.1

    def lines(self, activation: ox.Activation, l: Tensor, u: Tensor) -> ox.Lines:
        chord = super().lines(activation, l, u)
        crossing = activation.crossing(l, u)
        lower = torch.where(crossing, self.slope, chord.lower_slope)
        return ox.Lines(lower, chord.lower_intercept, chord.upper_slope, chord.upper_intercept)


def test_a_relaxation_of_the_user_has_a_name_and_options():
    ox.register_relaxation("tenth", Tenth)
    assert "tenth" in names()
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    for name in ("tenth", "tenth:slope=0.9", "tenth:slope=1,preactivation=box"):
        assert_sound(net, (4,), name)
    assert resolve("tenth:slope=0.9") == Tenth(slope=0.9)
    assert name_of(Tenth()) == "tenth"
    assert name_of(Tenth(slope=0.9)) == "tenth:slope=0.9"
    region = ox.LinfBall(inputs((4,), 2), 0.3)
    torch.testing.assert_close(ox.bounds(net, region, "tenth:slope=0").lower, ox.bounds(net, region, "crown-0").lower)


@pytest.mark.parametrize("name", ["crown", "tenth", "a:b", "a,b", ""])
def test_a_name_is_free_and_plain(name):
    ox.register_relaxation("tenth", Tenth)
    with pytest.raises(ValueError, match="register_relaxation: "):
        ox.register_relaxation(name, Tenth)


@pytest.mark.parametrize("name", [n for n in names() if n not in ("alpha-crown", "triangle", "layerwise")])
def test_every_name_is_the_name_of_what_it_stands_for(name):
    assert name_of(resolve(name)) == name
    assert resolve(name_of(resolve(name))) == resolve(name)


@pytest.mark.parametrize(
    ("relaxation", "name"),
    [
        (ox.Crown(lower="soft", gamma=10.0), "crown-soft:gamma=10.0"),
        (ox.Box(omega=0.01), "box:omega=0.01"),
        (ox.Box(omega=0.5, F=300.0), "box-widen:F=300.0"),
        (ox.DeepZ(slope="slanted", kappa=0.5), "deepz-slanted:kappa=0.5"),
        (ox.Cauchy(k=10), "cauchy:k=10"),
        (ox.CrownIBP(), "crown-ibp"),
        (ox.Crown(preactivation=ox.FastLin()), "crown:preactivation=fast-lin"),
    ],
)
def test_names_with_options_lead_back(relaxation, name):
    assert resolve(name_of(relaxation)) == relaxation
    assert resolve(name) == relaxation
