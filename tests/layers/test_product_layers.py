"""Products of two values in the LP layers: McCormick's planes, two a side, mixed as well as an LP can."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.optimize
import torch
from cases import Attention, inputs, random_points
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers import DualAscent, Highs, InteriorPoint, Layerwise, Status, Triangle
from optrelax.layers.milp import Milp
from optrelax.layers.network_solver import NetworkSolver, Points
from optrelax.layers.problems import DualPoint, PrimalPoint

CLOSE = DualAscent(tol=2e-4, max_iterations=300)


class Twice(nn.Module):
    """Products of affine functions, of such products again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.b(x)
        return self.last(self.c(y) * self.d(y))


def region(eps: float = 0.4) -> ox.LinfBall:
    return ox.LinfBall(inputs((3,), 2), eps)


def optimum(net: Twice, box: ox.InputBox, bounds: list[ox.Bounds], row: np.ndarray) -> float:
    """The LP of one example spelt out for HiGHS: columns x [3], y [3], z [2], the rows by corners of the factors."""
    w = {n: m.weight.detach().numpy() for n, m in net.named_children()}
    bias = {n: m.bias.detach().numpy() for n, m in net.named_children()}
    rows, sides = [], []

    def product(first: str, second: str, read: slice, made: int, x: ox.Bounds, y: ox.Bounds) -> None:
        for i in range(len(bias[first])):
            lx, ux, ly, uy = (float(t[0, i]) for t in (x.lower, x.upper, y.lower, y.upper))
            for p, q, sign in ((lx, ly, 1), (ux, uy, 1), (lx, uy, -1), (ux, ly, -1)):
                # sign * (value - q * first - p * second + p q) >= 0, both factors affine in what they read.
                line = np.zeros(8)
                line[made + i] = 1.0
                line[read] -= q * w[first][i] + p * w[second][i]
                rows.append(-sign * line)
                sides.append(sign * (p * q - q * bias[first][i] - p * bias[second][i]))

    product("a", "b", slice(0, 3), 3, bounds[0], bounds[1])
    product("c", "d", slice(3, 6), 6, bounds[2], bounds[3])
    cost = np.concatenate([np.zeros(6), row @ w["last"]])
    ends = [*zip(box.lower[0].tolist(), box.upper[0].tolist(), strict=True), *[(None, None)] * 5]
    found = scipy.optimize.linprog(cost, np.array(rows), np.array(sides), bounds=ends)
    assert found.status == 0
    return float(found.fun + row @ bias["last"])


@pytest.mark.parametrize("preactivation", ["box", "crown"])
def test_the_bound_is_the_optimum_of_the_mccormick_program(preactivation):
    net, ball = Twice().double(), region()
    layer = Triangle(preactivation=preactivation, solver=CLOSE)
    lowered = ox.capture(net, (3,)).lowered
    with torch.no_grad():
        found = layer.solve(net, ball, torch.eye(2).double())
        given = layer.closed_form(lowered, ball)
        crown = ox.lower_bounds(net, ball, torch.eye(2).double(), ox.Crown(preactivation=preactivation))
    assert bool((found.status == Status.OPTIMAL).all())
    for i in range(2):
        bounds = [ox.Bounds(b.lower[i : i + 1], b.upper[i : i + 1]) for b in given.values()]
        for j in range(2):
            exact = optimum(net, ball.select(slice(i, i + 1)), bounds, np.eye(2)[j])
            # CROWN chooses its planes at intervals of its own, where those of the layer are tighter.
            assert float(found.lower[i, j]) == pytest.approx(max(exact, float(crown[i, j])), abs=2e-4)


@torch.no_grad()
def test_layers_are_tighter_than_crown_and_hold():
    net, ball = Attention().double(), ox.LinfBall(inputs((6,), 3), torch.tensor([0.0, 0.1, 0.3]).double())
    points = random_points(ball, 500)
    values = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    crown = ox.bounds(net, ball, "crown")
    tighter = {}
    for name, looser in (("alpha-crown:iterations=5", crown), ("triangle", crown), ("layerwise", None)):
        before = looser or tighter["triangle"]
        found, outward = ox.bounds(net, ball, name), ox.bounds(net, ball, name, rounding="outward")
        torch.testing.assert_close(outward.lower, found.lower, rtol=1e-5, atol=1e-5)
        assert bool(((outward.lower <= values) & (values <= outward.upper)).all())
        assert bool((found.lower >= before.lower - 1e-4).all())
        assert bool((found.upper <= before.upper + 1e-4).all())
        singles = [ox.bounds(net, ball.select(slice(i, i + 1)), name).lower for i in range(3)]
        torch.testing.assert_close(torch.cat(singles), found.lower, rtol=1e-4, atol=1e-4)
        assert float(found.width[2].mean()) < 0.95 * float(crown.width[2].mean())
        assert float(found.width[0].max()) < 1e-12
        tighter[name] = found
    assert ox.bounds(net, ball.select(slice(0, 0)), "triangle").lower.shape == (0, 3)


@dataclass(frozen=True)
class Careless(NetworkSolver):
    """Weights and fractions of any size, an input outside of the region."""

    tol: float = 1e-4
    products = True

    def solve(self, problems, starts):
        g = torch.Generator().manual_seed(0)

        def anything(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: 5 * torch.randn(w.shape, generator=g, dtype=w.dtype) for n, w in weights.items()}

        dual = DualPoint(anything(starts[0].alpha), anything(starts[0].beta))
        primal = PrimalPoint(problems.region.center + 10, anything(starts[0].alpha))
        return Points(dual, primal, torch.zeros(problems.count, dtype=torch.int64))


@torch.no_grad()
def test_a_solver_that_errs_is_loose_and_never_wrong():
    net, ball, rows = Twice().double(), region(), torch.eye(2).double()
    best = Triangle(preactivation="crown", solver=CLOSE).solve(net, ball, rows)
    careless = Triangle(preactivation="crown", solver=Careless()).solve(net, ball, rows)
    assert bool((careless.lower <= best.lower + 2e-4).all())
    assert bool((careless.lower + careless.gap >= best.lower - 1e-6).all())
    assert not bool((careless.status == Status.OPTIMAL).any())


def test_gradients_are_those_of_the_optimal_value():
    """Along a direction in all weights and the radius, by central differences."""
    net, x, rows = Twice().double(), inputs((3,), 2), torch.eye(2).double()
    made = Triangle(solver=replace(CLOSE, tol=1e-6))
    eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    params = [*net.parameters(), eps]
    g = torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]
    made(net, ox.InputBox(x - eps, x + eps), rows).sum().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(params, way, strict=True))

    def value(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(params, way, strict=True):
                p.add_(step * d)
            found = float(made(net, ox.InputBox(x - eps, x + eps), rows).sum())
            for p, d in zip(params, way, strict=True):
                p.sub_(step * d)
        return found

    assert slope == pytest.approx((value(3e-3) - value(-3e-3)) / 6e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("relaxation", "reason"),
    [
        (Triangle(solver=Highs()), "is for solver=DualAscent"),
        (Layerwise(solver=InteriorPoint()), "is for solver=DualAscent"),
        (Triangle(solver=DualAscent(exact=True)), "without exact=True"),
        (Triangle(preactivation="deepz"), "wants pre-activation bounds that its LP implies"),
    ],
    ids=["highs", "interior point", "exact", "zonotopes"],
)
def test_what_takes_no_products_says_so(relaxation, reason):
    with pytest.raises(ox.UnsupportedOpError, match=f"Multiply: .*{reason}"):
        ox.bounds(Attention(), ox.LinfBall(torch.zeros(1, 6), 0.1), relaxation)


def test_a_milp_takes_no_products():
    network = ox.capture(Attention().double(), (6,))
    with pytest.raises(ox.UnsupportedOpError, match="Multiply: a program of rows takes no product"):
        Milp().minima(network, ox.LinfBall(torch.zeros(1, 6).double(), 0.1), torch.eye(3).double()[None])
