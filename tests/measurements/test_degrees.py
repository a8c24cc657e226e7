"""Degrees along a line in weight space: propagated op by op, as sympy finds them in the bounds written out."""

import itertools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import sympy as sp
import torch
from torch import nn

import optrelax as ox
from optrelax.measurements.degrees import step_degrees

T = sp.Symbol("t")
EPS = sp.Rational(1, 5)
NETWORKS = [((2, 3, 2), 1), ((2, 3, 2), 5), ((2, 2, 2, 2), 4), ((2, 2, 2, 2), 5)]


class Symbolic:
    """A network whose weights are rational polynomials of degree 1 in t, and its bounds, branches taken at t = 0."""

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        draw = random.Random(seed)
        self.layers = []
        for n, m in itertools.pairwise(sizes):
            weight = sp.Matrix(m, n, lambda i, j: self.entry(draw))
            self.layers.append((weight, sp.Matrix(m, 1, lambda i, j: self.entry(draw) / 3)))
        self.x = sp.Matrix(sizes[0], 1, lambda i, j: sp.Rational(1 + i, 4))

    @staticmethod
    def entry(draw: random.Random) -> sp.Expr:
        """Of sizes in which no leading coefficient vanishes by accident."""
        slope = sp.Rational(draw.randint(100, 997), 499)
        return sp.Rational(draw.choice([-1, 1]) * draw.randint(300, 1700), 800) + T * slope

    def module(self) -> nn.Sequential:
        parts: list[nn.Module] = []
        for weight, bias in self.layers:
            layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(np.array(weight.subs(T, 0), dtype=float)))
                layer.bias.copy_(torch.tensor(np.array(bias.subs(T, 0), dtype=float)[:, 0]))
            parts += [layer, nn.ReLU()]
        return nn.Sequential(*parts[:-1])


def at0(e: sp.Expr) -> sp.Rational:
    return sp.sympify(e).subs(T, 0)


def absolute(e: sp.Expr) -> sp.Expr:
    return e if at0(e) >= 0 else -e


def boxes(s: Symbolic) -> list[tuple[sp.Matrix, sp.Matrix]]:
    """Pre-activation intervals by layer."""
    l, u = s.x - sp.ones(*s.x.shape) * EPS, s.x + sp.ones(*s.x.shape) * EPS
    found = []
    for weight, bias in s.layers[:-1]:
        size = weight.applyfunc(absolute)
        c, r = weight * (l + u) / 2 + bias, size * (u - l) / 2
        found.append((c - r, c + r))
        l, u = (end.applyfunc(lambda e: e if at0(e) > 0 else sp.Integer(0)) for end in found[-1])
    return found


def box(s: Symbolic, row: sp.Matrix) -> sp.Expr:
    l, u = (end.applyfunc(lambda e: e if at0(e) > 0 else sp.Integer(0)) for end in boxes(s)[-1])
    a = row * s.layers[-1][0]
    return (row * s.layers[-1][1])[0] + (a * (l + u) / 2)[0] - (a.applyfunc(absolute) * (u - l) / 2)[0]


def lines(name: str, l: sp.Expr, u: sp.Expr) -> tuple[sp.Expr, sp.Expr, sp.Expr, sp.Expr]:
    if at0(u) <= 0:
        return (sp.Integer(0),) * 4
    if at0(l) >= 0:
        return sp.Integer(1), sp.Integer(0), sp.Integer(1), sp.Integer(0)
    s = u / (u - l)
    if name == "fast-lin":
        return s, sp.Integer(0), s, -s * l
    if name == "deepz-diag":
        return sp.Integer(1), sp.Integer(0), sp.Integer(1), -l
    if name == "deepz-box":
        return sp.Integer(0), sp.Integer(0), sp.Integer(0), u
    lower = sp.Integer(1 if at0(u) >= -at0(l) else 0)
    return lower, sp.Integer(0), s, -s * l


def substituted(s: Symbolic, depth: int, row: sp.Matrix, given: list[list[tuple[sp.Expr, ...]]]) -> sp.Expr:
    """Least value of row . pre-activation (or output) `depth` by back-substitution through the lines before."""
    a, constant = row, sp.Integer(0)
    for k in range(depth, -1, -1):
        weight, bias = s.layers[k]
        constant += (a * bias)[0]
        a = a * weight
        if k == 0:
            break
        pulled = []
        for i in range(a.shape[1]):
            slope, intercept = given[k - 1][i][0:2] if at0(a[i]) > 0 else given[k - 1][i][2:4]
            constant += a[i] * intercept
            pulled.append(a[i] * slope)
        a = sp.Matrix([pulled])
    a = a.applyfunc(sp.cancel)
    return constant + (a * s.x)[0] - (a.applyfunc(absolute) * sp.ones(*s.x.shape))[0] * EPS


def crown(s: Symbolic, row: sp.Matrix, name: str) -> sp.Expr:
    given: list[list[tuple[sp.Expr, ...]]] = []
    intervals = boxes(s)
    for k in range(len(s.layers) - 1):
        n = s.layers[k][0].shape[0]
        if k == 0 or name == "crown-ibp":
            ends = [(intervals[k][0][i], intervals[k][1][i]) for i in range(n)]
        else:
            units = [sp.Matrix([[1 if i == j else 0 for j in range(n)]]) for i in range(n)]
            ends = [(substituted(s, k, e, given), -substituted(s, k, -e, given)) for e in units]
        given.append([lines(name, sp.cancel(l), sp.cancel(u)) for l, u in ends])
    return substituted(s, len(s.layers) - 1, row, given)


def hbox(s: Symbolic, row: sp.Matrix) -> sp.Expr:
    """Centre, one noise term a pixel, and an interval part."""
    c, g, beta = s.x, sp.eye(s.x.shape[0]) * EPS, sp.zeros(s.x.shape[0], 1)
    for k, (weight, bias) in enumerate(s.layers):
        matrix = row * weight if k == len(s.layers) - 1 else weight
        c = matrix * c + (row * bias if k == len(s.layers) - 1 else bias)
        g, beta = matrix * g, matrix.applyfunc(absolute) * beta
        width = beta + g.applyfunc(absolute) * sp.ones(g.shape[1], 1)
        if k == len(s.layers) - 1:
            return c[0] - width[0]
        for i in range(c.shape[0]):
            l, u = c[i] - width[i], c[i] + width[i]
            if at0(l) >= 0:
                continue
            top = u / 2 if at0(u) > 0 else sp.Integer(0)
            c[i], beta[i] = top, top
            g[i, :] = sp.zeros(1, g.shape[1])
    raise AssertionError


def degrees(e: sp.Expr) -> tuple[int, int]:
    top, bottom = sp.fraction(sp.cancel(sp.together(e)))
    return sp.Poly(top, T).degree(), sp.Poly(bottom, T).degree()


def symbolic(s: Symbolic, row: sp.Matrix, name: str) -> sp.Expr:
    if name == "box":
        return box(s, row)
    return hbox(s, row) if name == "hbox" else crown(s, row, name)


NAMES = ["box", "hbox", "fast-lin", "crown", "crown-ibp", "deepz-diag", "deepz-box"]


@pytest.mark.parametrize(("sizes", "seed"), NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_degrees_and_values_are_those_of_the_bound_written_out(name, sizes, seed):
    s = Symbolic(sizes, seed)
    region, net = ox.LinfBall(point(s), float(EPS)), s.module()
    for row in ([1, -1], [-1, 1]):
        expression = symbolic(s, sp.Matrix([row]), name)
        spec = torch.tensor([row], dtype=torch.float64)
        # The oracle bounds the same thing: else its degrees would be of something else.
        found = float(ox.lower_bounds(net, region, spec, name).detach())
        assert found == pytest.approx(float(at0(expression)), abs=1e-9)
        assert step_degrees(net, region, spec, name) == [degrees(expression)]


def test_terms_that_cancel_beyond_what_is_tracked_leave_an_upper_bound():
    """Here a chord's run is a difference in which the earlier denominators happen to divide out."""
    s = Symbolic((2, 2, 2, 2), 2)
    region, spec = ox.LinfBall(point(s), float(EPS)), torch.tensor([[-1.0, 1.0]])
    found = step_degrees(s.module(), region, spec, "fast-lin")[0]
    assert degrees(symbolic(s, sp.Matrix([[-1, 1]]), "fast-lin")) == (7, 4)
    assert found == (9, 6)


def point(s: Symbolic) -> torch.Tensor:
    return torch.tensor([[float(v) for v in s.x]], dtype=torch.float64)


def test_the_networks_have_crossing_neurons_in_every_layer():
    counts = [
        [sum(bool(at0(l) < 0 < at0(u)) for l, u in zip(*ends, strict=True)) for ends in boxes(Symbolic(*network))]
        for network in NETWORKS
    ]
    assert max(first for first, *_ in counts) == 1
    assert max(later for _, *rest in counts for later in rest) == 2
    assert all(sum(layers) > 0 for layers in counts)


def fit_residual(t, values, numerator, denominator):
    """How far the best ratio of polynomials of these degrees stays from the values, relative to the largest.

    Fitted to every other point (the linearised problem's smallest singular vector, in Chebyshev polynomials) and judged
    on the others.  t ascending [n], n at least 2 (numerator + denominator + 2).
    """
    x = 2 * (t - t[0]) / (t[-1] - t[0]) - 1
    scale = float(np.abs(values).max()) or 1.0
    f = values / scale
    top, bottom = (np.polynomial.chebyshev.chebvander(x, degree) for degree in (numerator, denominator))
    system = np.hstack([top, -f[:, None] * bottom])
    fitted, judged = slice(0, None, 2), slice(1, None, 2)
    kernel = np.linalg.svd(system[fitted])[2][-1]
    p, q = top @ kernel[: numerator + 1], bottom @ kernel[numerator + 1 :]
    return float(np.abs(p[judged] / q[judged] - f[judged]).max())


@pytest.mark.parametrize(("name", "sizes", "seed"), [("fast-lin", (2, 2, 2, 2), 5), ("box", (2, 2, 2, 2), 2)])
def test_a_fit_along_the_line_needs_these_degrees(name, sizes, seed):
    """The library's own bound at moved weights: the degrees fit it to rounding, one less of either does not."""
    s = Symbolic(sizes, seed)
    net, region, spec = s.module(), ox.LinfBall(point(s), float(EPS)), torch.tensor([[1.0, -1.0]])
    numerator, denominator = step_degrees(net, region, spec, name)[0]
    layers = [m for m in net if isinstance(m, nn.Linear)]
    t = np.linspace(-0.02, 0.02, 44)
    values = []
    for at in t:
        with torch.no_grad():
            for layer, (weight, bias) in zip(layers, s.layers, strict=True):
                moved = [np.array(m.subs(T, sp.Float(at)), dtype=float) for m in (weight, bias)]
                layer.weight.copy_(torch.tensor(moved[0]))
                layer.bias.copy_(torch.tensor(moved[1][:, 0]))
            values.append(float(ox.lower_bounds(net, region, spec, name)))
    f = np.array(values)
    assert fit_residual(t, f, numerator, denominator) < 1e-12
    assert fit_residual(t, f, 1, 0) > 1e-7
    if name == "box":
        assert fit_residual(t, f, numerator - 1, 0) > 1e-9


def test_box_has_a_degree_a_layer_and_chords_many_more():
    net = ox.models.fc(3, 6, 6, 6, 2, seed=1)
    region, spec = ox.LinfBall(torch.full((1, 3), 0.5), 0.5), torch.tensor([[1.0, -1.0]])
    found = {name: step_degrees(net, region, spec, name)[0] for name in ("box", "hbox", "fast-lin", "crown")}
    assert found["box"] == found["hbox"] == (4, 0)
    assert min(found["fast-lin"]) > 4
    assert min(found["crown"]) > 4


def test_convolutions_and_residual_branches():
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    region = ox.LinfBall(torch.full((1, 1, 3, 3), 0.5), 0.2)
    assert step_degrees(conv, region, torch.eye(2), "box") == [(2, 0), (2, 0)]


@dataclass(frozen=True, kw_only=True)
class Halved(ox.Crown):
    """A relaxation of a user's, whose bounds are no longer those of its lines."""

    def lower_bounds(self, network, region, rows):
        return super().lower_bounds(network, region, rows) / 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crown-soft", "not rational"),
        ("triangle", "no rule for triangle"),
        ("crown:preactivation=deepz", "pre-activ"),
        (Halved(), "other bounds than its lines give"),
    ],
)
def test_bounds_that_are_not_rational_are_refused(name, message):
    net = ox.models.fc(3, 6, 6, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        step_degrees(net, ox.LinfBall(torch.full((1, 3), 0.5), 0.4), torch.eye(2), name)


def test_bad_input():
    net = ox.models.fc(3, 6, 2, seed=0)
    with pytest.raises(ValueError, match="one example, got 2"):
        step_degrees(net, ox.LinfBall(torch.full((2, 3), 0.5), 0.4), torch.eye(2), "box")
    with pytest.raises(ValueError, match="at most 64 hidden neurons, got 65"):
        step_degrees(ox.models.fc(3, 65, 2), ox.LinfBall(torch.full((1, 3), 0.5), 0.4), torch.eye(2), "box")
    pool = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2))
    with pytest.raises(ox.UnsupportedOpError, match="no rule for degrees"):
        step_degrees(pool, ox.LinfBall(torch.full((1, 1, 2, 2), 0.5), 0.4), torch.eye(2), "box")
