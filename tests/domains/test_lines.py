"""Lines and hulls of one activation: the paper's table, soundness, conventions at ties, and rounding outward."""

from fractions import Fraction

import pytest
import torch
from oracles import exact_activation
from torch import Tensor

from optrelax.domains.lines import Lines, outward_lines, soft_weight
from optrelax.networks.activations import PiecewiseLinear, clamp, leaky_relu, relu
from optrelax.relaxations import resolve

NAMES = [
    "hbox",
    "hbox-diag",
    "hbox-diag-c",
    "hbox-switch",
    "hzono",
    "deepz-soft",
    "deepz-soft:gamma=10",
    "deepz-slanted",
    "deepz-slanted:kappa=0",
    "deepz-slanted:kappa=1",
    "fast-lin",
    "crown",
    "crown-0",
    "crown-1",
    "crown-0-c",
    "crown-1-c",
    "crown-0-tria",
    "crown-1-tria",
    "crown-0-tria-c",
    "crown-1-tria-c",
    "crown-soft",
    "crown-soft:gamma=10",
]
ACTIVATIONS = [
    relu(),
    leaky_relu(0.2),
    leaky_relu(1.7),
    leaky_relu(-0.6),
    PiecewiseLinear("abs", torch.abs, (0.0,), (-1.0, 1.0), (0.0, 0.0)),
    PiecewiseLinear("hinge", lambda x: -torch.relu(x - 0.5), (0.5,), (0.0, -1.0), (0.0, 0.5)),
    clamp(0.0, 6.0, "relu6"),
    clamp(-0.5, 0.25),
]
each_name = pytest.mark.parametrize("name", NAMES)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.name}{a.slopes}")


def lines_of(name: str, activation: PiecewiseLinear, l: Tensor, u: Tensor) -> Lines:
    return resolve(name).lines(activation, l, u)


def intervals(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Intervals of every kind: crossing, dead, active, of no width, ends on a kink, |l| = |u|."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, generator=g, dtype=torch.float64)
    special = torch.tensor(
        [[-1, 1], [0, 1], [-1, 0], [0, 0], [2, 2], [-2, -2], [0.5, 0.5], [-7, 8], [0, 6], [1, 5], [-0.5, 0.25]],
        dtype=torch.float64,
    )
    l = torch.cat([torch.minimum(a, b), special[:, 0]])
    return l.to(dtype), torch.cat([torch.maximum(a, b), special[:, 1]]).to(dtype)


def points(activation: PiecewiseLinear, l: Tensor, u: Tensor) -> Tensor:
    """A grid over each [l, u], its ends and the kinks inside: [points, n]."""
    grid = l + torch.linspace(0, 1, 41, dtype=l.dtype)[:, None] * (u - l)
    kinks = [torch.full_like(l, kink).clamp(l, u) for kink in activation.kinks]
    return torch.cat([grid.clamp(l, u), torch.stack(kinks)])


@each_activation
@each_name
def test_the_function_lies_between_its_lines(name, activation):
    l, u = intervals()
    found = lines_of(name, activation, l, u)
    x = points(activation, l, u)
    assert (found.lower_slope * x + found.lower_intercept <= activation(x) + 1e-12).all()
    assert (found.upper_slope * x + found.upper_intercept >= activation(x) - 1e-12).all()


@each_activation
@each_name
def test_the_hull_implies_every_line(name, activation):
    """No line of any relaxation cuts into the hull that the LP uses."""
    l, u = intervals()
    hull = activation.hull(l, u)
    x = points(activation, l, u)
    floor = torch.maximum(*(s * x + i for s, i in hull.below))
    roof = torch.minimum(*(s * x + i for s, i in hull.above))
    found = lines_of(name, activation, l, u)
    assert (floor <= activation(x) + 1e-12).all()
    assert (roof >= activation(x) - 1e-12).all()
    assert (found.lower_slope * x + found.lower_intercept <= floor + 1e-12).all()
    assert (found.upper_slope * x + found.upper_intercept >= roof - 1e-12).all()


@each_activation
def test_the_hull_is_the_convex_hull(activation):
    """At every point the hull's sides are attained by chords of the graph: the lower and upper envelopes."""
    l, u = intervals()
    x = points(activation, l, u)
    y = activation(x)
    hull = activation.hull(l, u)
    floor = torch.maximum(*(s * x + i for s, i in hull.below))
    roof = torch.minimum(*(s * x + i for s, i in hull.above))
    # Envelopes by enumeration: the least (greatest) value at x of any chord between two points of the graph around x.
    low, high = y.clone(), y.clone()
    for i in range(len(x)):
        for j in range(len(x)):
            inside = (x[i] < x) & (x < x[j])
            chord = y[i] + (x - x[i]) * (y[j] - y[i]) / torch.where(x[j] > x[i], x[j] - x[i], 1.0)
            low = torch.where(inside, torch.minimum(low, chord), low)
            high = torch.where(inside, torch.maximum(high, chord), high)
    torch.testing.assert_close(floor, low, rtol=0, atol=1e-12)
    torch.testing.assert_close(roof, high, rtol=0, atol=1e-12)


def soft(l: float, u: float, gamma: float = 1.0) -> float:
    return float(torch.sigmoid(torch.tensor(gamma * (l / u - u / l), dtype=torch.float64)))


def zono(lam: float, mu: float) -> tuple[float, float, float, float]:
    """y = lam x + mu +- mu as lines."""
    return lam, 0.0, lam, 2 * mu


def paper(name: str, l: float, u: float) -> tuple[float, float, float, float]:
    """(lower slope, lower intercept, upper slope, upper intercept): the tables of arXiv 2102.06700, by hand."""
    exact = (1.0, 0.0, 1.0, 0.0) if l >= 0 else (0.0, 0.0, 0.0, 0.0)
    crossing = l < 0 < u
    if name.endswith("-c"):
        return (
            {
                "crown-0-c": (0, l, 1, 0) if l >= 0 else exact,
                "crown-1-c": exact if l >= 0 else (1, 0, 0, 0),
                "crown-0-tria-c": (0, max(l, 0), 1, 0 if l >= 0 else -l),
                "crown-1-tria-c": (1, 0, 0, max(u, 0)),
                "hbox-diag-c": exact if l >= 0 else zono(1, -l / 2),
            }[name]
            if not crossing or "tria" in name or "diag" in name
            else paper(name[:-2], l, u)
        )
    if not crossing:
        return exact
    s = u / (u - l)
    chord = (s, -s * l)
    weight = 1.0 if u >= -l else 0.0
    lam = {"deepz-soft": soft(l, u), "deepz-slanted": 0.9 * s}.get(name, 0.0)
    mu = -l * lam / 2 if lam > s else u * (1 - lam) / 2
    return {
        "crown": (weight, 0, *chord),
        "crown-0": (0, 0, *chord),
        "crown-1": (1, 0, *chord),
        "crown-0-tria": (0, 0, 1, -l),
        "crown-1-tria": (1, 0, 0, u),
        "crown-soft": (soft(l, u), 0, *chord),
        "fast-lin": (s, 0, *chord),
        "hzono": zono(s, -s * l / 2),
        "hbox": zono(0, u / 2),
        "hbox-diag": zono(1, -l / 2),
        "hbox-switch": zono(1, -l / 2) if -l <= u else zono(0, u / 2),
        "deepz-soft": zono(lam, mu),
        "deepz-slanted": zono(lam, mu),
    }[name]


@pytest.mark.parametrize("name", [n for n in NAMES if ":" not in n])
@pytest.mark.parametrize(
    ("l", "u"), [(-1.0, 2.0), (-2.0, 1.0), (-1.0, 1.0), (-3.0, -1.0), (1.0, 3.0), (0.0, 2.0), (-2.0, 0.0), (0.0, 0.0)]
)
def test_relu_lines_are_those_of_the_paper(name, l, u):
    found = lines_of(name, relu(), torch.tensor([l], dtype=torch.float64), torch.tensor([u], dtype=torch.float64))
    values = [float(v[0]) for v in (found.lower_slope, found.lower_intercept, found.upper_slope, found.upper_intercept)]
    assert values == pytest.approx(paper(name, l, u), abs=1e-12)


@each_name
def test_at_l_equals_u_equals_zero_the_slope_is_one(name):
    zero = torch.zeros(1, dtype=torch.float64)
    found = lines_of(name, relu(), zero, zero)
    if name in ("crown-0-c", "crown-0-tria-c"):  # the continuous forms' own lines there
        expected = (0, 1)
    elif name in ("crown-1-c", "crown-1-tria-c"):
        expected = (1, 1 if name == "crown-1-c" else 0)
    else:
        expected = (1, 1)
    assert (float(found.lower_slope), float(found.upper_slope)) == expected
    assert float(found.lower_intercept) == float(found.upper_intercept) == 0


def test_ties_of_the_choices():
    """|l| = |u|: the adaptive lower slope is 1, and switch is diag."""
    l, u = torch.tensor([-1.5]), torch.tensor([1.5])
    assert float(lines_of("crown", relu(), l, u).lower_slope) == 1
    assert float(lines_of("hbox-switch", relu(), l, u).lower_slope) == 1


EXTREME = [
    (-1e-45, 1e-45),  # subnormal in float32: the width's reciprocal overflows
    (-1e-40, 3e-39),
    (-1e-38, 1e-38),
    (-1e-30, 1.0),
    (-1.0, 1e-30),
    (-1e-45, 1.0),
    (-1.0, 1e-45),
    (-1e30, 1e30),
    (-1e-20, 1e20),
    (-1e20, 1e-20),
    (0.0, 0.0),
    (0.0, 1e-45),
    (-1e-45, 0.0),
    (-3.0, -3.0),
    (3.0, 3.0),
]


@each_activation
@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_value_and_no_gradient_is_nan(name, activation, dtype):
    l, u = torch.tensor(EXTREME, dtype=dtype).T.contiguous()
    l.requires_grad_()
    u.requires_grad_()
    found = lines_of(name, activation, l, u)
    values = found.lower_slope, found.lower_intercept, found.upper_slope, found.upper_intercept
    assert all(v.isfinite().all() for v in values)
    # Weights of ordinary size, as the rows of a back-substitution bring them.
    total = sum(((w * v).sum() for w, v in zip((0.7, -1.3, 0.4, 1.1), values, strict=True)), 0 * l.sum())
    gradients = torch.autograd.grad(total, (l, u), allow_unused=True)
    assert not any(g.isnan().any() for g in gradients if g is not None), gradients


def test_soft_is_the_ratio_it_stands_for():
    l, u = torch.tensor([-1.0, -2.0, -0.5, -3.0]).double(), torch.tensor([2.0, 1.0, 0.5, 2.9]).double()
    for gamma in (0.3, 1.0, 10.0):
        torch.testing.assert_close(soft_weight(relu(), l, u, gamma), torch.sigmoid(gamma * (l / u - u / l)))


@each_activation
@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outward_lines_hold_in_rational_arithmetic(name, activation, dtype):
    """At every end and kink the exact function lies between the exact values of the lines: no tolerance."""
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 12, generator=g, dtype=torch.float64)
    tiny = torch.tensor([[-1e-45, 2e-45], [-3e-41, 1e-40], [-1e-3, 1e-39], [-1e-25, 1e-20], [1e-30, 1.0], [0.1, 0.1]])
    l = torch.cat([torch.minimum(a, b), tiny[:, 0].double()]).to(dtype)
    u = torch.cat([torch.maximum(a, b), tiny[:, 1].double()]).to(dtype)
    found = outward_lines(lines_of(name, activation, l, u), activation, l, u)
    for i in range(len(l)):
        low, high = Fraction(float(l[i])), Fraction(float(u[i]))
        ends = [low, high, *(Fraction(k) for k in activation.kinks if low <= Fraction(k) <= high)]
        for v in ends:
            y = exact_activation(activation, v)
            assert Fraction(float(found.lower_slope[i])) * v + Fraction(float(found.lower_intercept[i])) <= y
            assert Fraction(float(found.upper_slope[i])) * v + Fraction(float(found.upper_intercept[i])) >= y


@each_activation
def test_images_are_attained(activation):
    l, u = intervals()
    low, high = activation.image(l, u)
    y = activation(points(activation, l, u))
    torch.testing.assert_close(low, y.amin(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(high, y.amax(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (1.0,), (0.0,)), "wants one or two kinks"),
        (((0.0,), (0.0, 1.0, 2.0), (0.0, 0.0, 0.0)), "wants one or two kinks"),
        (((0.0,), (0.0, 1.0), (0.0, 0.5)), "pieces 0 and 1 do not meet at 0.0: 0.0 and 0.5"),
        (((1.0, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0, -1.0)), "kinks must ascend"),
        (((0.0, 1.0), (0.5, 1.0, 0.5), (0.0, 0.0, 0.5)), "flat-rising-flat"),
    ],
)
def test_an_activation_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseLinear("mine", torch.relu, *arguments)


def test_clamp_wants_low_below_high():
    with pytest.raises(ValueError, match=r"hardtanh: needs low < high, got 1.0 and 1.0"):
        clamp(1.0, 1.0)
