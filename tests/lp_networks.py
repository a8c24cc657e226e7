"""Network LPs for the tests, and what they are compared with: SciPy's HiGHS on the exported data, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from cases import BY_NAME, inputs, specification
from scipy.optimize import linprog
from scipy.sparse import vstack
from torch import Tensor, nn

import optrelax as ox
from optrelax.layers.affine_maps import AffineMaps
from optrelax.layers.network_lp import NetworkLP, export
from optrelax.relaxations import identity_rows

Given = Mapping[str, ox.Bounds]

_OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def solve(program: NetworkLP, c: np.ndarray) -> float:
    """Least value of c.v over an exported LP; nan where it is infeasible."""
    equal = program.row_lower == program.row_upper
    below, above = (np.isfinite(side) & ~equal for side in (program.row_lower, program.row_upper))
    matrix = program.matrix.tocsr()
    found = linprog(
        c,
        A_ub=vstack([matrix[above], -matrix[below]]),
        b_ub=np.concatenate([program.row_upper[above], -program.row_lower[below]]),
        A_eq=matrix[equal],
        b_eq=program.row_lower[equal],
        bounds=np.stack([program.col_lower, program.col_upper], 1),
        method="highs-ds",
        options=_OPTIONS,
    )
    assert found.status in (0, 2), found.message
    return float(found.fun) if found.status == 0 else float("nan")


def optimum(network: ox.Network, region: ox.InputBox, rows: Tensor, before: Given, upto: str | None = None) -> Tensor:
    """Optimal value of the exported LP of each example and row [k, outputs of `upto`]: [batch, k].

    before: by path or node name.
    """
    maps = AffineMaps(network)
    values = []
    for i in range(region.shape[0]):
        one = slice(i, i + 1)
        bounds = {
            n.name: ox.Bounds(*(end[one].detach() for end in (b.lower, b.upper)))
            for n in network.activations
            for b in [before.get(n.name, before.get(n.path))]
            if b is not None
        }
        box = ox.InputBox(region.lower[one].detach(), region.upper[one].detach())
        program = export(network, box, bounds, upto=upto, maps=maps)
        shape = network.shape_of(upto or network.output)
        c, offset = program.objective(rows.detach().double().reshape(-1, *shape))
        values.append([solve(program, row) + float(add) for row, add in zip(c, offset, strict=True)])
    return torch.tensor(values, dtype=torch.float64).reshape(region.shape[0], len(rows))


def layerwise(network: ox.Network, region: ox.InputBox, before: Given) -> dict[str, ox.Bounds]:
    """LP-ALL's pre-activation bounds by node name: crossing neurons by LP on the layers before, the others as given."""
    found: dict[str, ox.Bounds] = {}
    for node in network.activations:
        b = before[node.path]
        lower, upper = b.lower.detach().clone(), b.upper.detach().clone()
        source = node.inputs[0]
        eye = identity_rows(network.shape_of(source), region.lower)[0]
        eye = eye.reshape(len(eye), -1)
        for i in range(region.shape[0]):
            crossing = node.op.crossing(lower[i], upper[i]).flatten().nonzero()[:, 0]
            if not len(crossing):
                continue
            one = region.select(slice(i, i + 1))
            known = {name: ox.Bounds(p.lower[i : i + 1], p.upper[i : i + 1]) for name, p in found.items()}
            low = optimum(network, one, eye[crossing], known, upto=source)[0]
            high = -optimum(network, one, -eye[crossing], known, upto=source)[0]
            lower[i].view(-1)[crossing] = torch.maximum(lower[i].view(-1)[crossing], low)
            upper[i].view(-1)[crossing] = torch.minimum(upper[i].view(-1)[crossing], high)
        found[node.name] = ox.Bounds(lower, upper)
    return found


@dataclass(frozen=True)
class Question:
    """A network, a region and rows [k, outputs]; float64, without gradients."""

    network: ox.Network
    region: ox.InputBox
    rows: Tensor


@dataclass(frozen=True)
class QuestionCase:
    """A question by name: built once, its answers by HiGHS kept."""

    name: str
    build: Callable[[], Question]

    def __str__(self) -> str:
        return self.name


@cache
def question(name: str) -> Question:
    return QUESTIONS[name].build()


@cache
def before(name: str, relaxation: str) -> dict[str, ox.Bounds]:
    """Pre-activation bounds by path; "default" for those of the LP layers."""
    q = question(name)
    source = ox.Intersect(ox.Box(), ox.FastLin()) if relaxation == "default" else relaxation
    with torch.no_grad():
        return ox.preactivation_bounds(q.network, q.region, source)


@cache
def answer(name: str, relaxation: str = "default") -> Tensor:
    """Optimal values on these pre-activation bounds, [batch, k]."""
    q = question(name)
    return optimum(q.network, q.region, q.rows, before(name, relaxation))


@cache
def layerwise_bounds(name: str) -> dict[str, ox.Bounds]:
    """LP-ALL's pre-activation bounds from the default ones, by node name."""
    q = question(name)
    return layerwise(q.network, q.region, before(name, "default"))


@cache
def layerwise_answer(name: str) -> Tensor:
    """LP-ALL's optimal values, [batch, k]."""
    q = question(name)
    return optimum(q.network, q.region, q.rows, layerwise_bounds(name))


def _random(name: str, eps: float, batch: int = 2, k: int = 3) -> QuestionCase:
    def build() -> Question:
        case = BY_NAME[name]
        network = ox.capture(case.module().requires_grad_(False), case.input_shape)
        region = ox.LinfBall(inputs(case.input_shape, batch, seed=7), eps)
        return Question(network, region, specification(network.outputs, k))

    return QuestionCase(f"{name}, eps {eps:g}", build)


class DeepResidual(nn.Module):
    """Two residual blocks of fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for block in self.blocks:
            x = torch.relu(block(x) + x)
        return self.last(x)


def _made(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], eps: float) -> QuestionCase:
    def make() -> Question:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            net = build().double().eval().requires_grad_(False)
        network = ox.capture(net, shape)
        return Question(network, ox.LinfBall(inputs(shape, 1, seed=8), eps), specification(network.outputs, 2))

    return QuestionCase(f"{name}, eps {eps:g}", make)


def small_conv() -> nn.Module:
    first = nn.Conv2d(1, 4, 4, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


@cache
def trained(kind: str) -> nn.Module:
    """A small classifier of the 8 x 8 digits, float64: "fc" 64-20-20-10 or "conv"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        net = ox.models.fc(64, 20, 20, 10) if kind == "fc" else small_conv()
    data = ox.load_dataset("digits", split="train")
    x, y = data.images, data.labels
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(120):
        part = slice(step * 100 % len(x), step * 100 % len(x) + 100)
        loss = nn.functional.cross_entropy(net(x[part]), y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.double().eval().requires_grad_(False)


def _trained(kind: str, eps: float) -> QuestionCase:
    def build() -> Question:
        network = ox.capture(trained(kind), (1, 8, 8))
        data = ox.load_dataset("digits", split="test")
        x = data.images[[0, 150]].double()
        rows = ox.margins(data.labels[[0, 150]], 10).double()[0, ::3]
        return Question(network, ox.LinfBall(x, eps, clip=(0.0, 1.0)), rows)

    return QuestionCase(f"trained {kind}, eps {eps:g}", build)


_ALL = [
    _random("fc", 1.0),
    _random("deep fc", 2.5),
    _random("functional residual", 0.3),
    _random("strided conv", 0.4),
    _random("residual conv", 0.3),
    _random("shared layers", 2.0),
    _random("leaky relu", 0.6),
    _random("bent leaky relu", 0.5),
    _random("relu6 and hardtanh", 0.5),
    _random("scalar output", 2.0, k=1),
    _made("deep residual", DeepResidual, (5,), 0.4),
    _trained("fc", 0.08),
    _trained("conv", 0.05),
]
QUESTIONS = {case.name: case for case in _ALL}
SMALL = [name for name in QUESTIONS if not name.startswith("trained")]


def assert_close(found: Tensor, wanted: Tensor, tol: float) -> None:
    """Equal to tol * max(1, |wanted|), entry by entry."""
    error = (found.detach() - wanted).abs() / wanted.abs().clamp_min(1)
    assert bool((error <= tol).all()), f"relative error up to {float(error.max()):.1e}, allowed {tol:.0e}"
