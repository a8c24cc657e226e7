"""Random networks, regions and rows against every relaxation and LP layer: `python -m tests.attack --minutes 60`.

Each number draws one question: a network with odd scales, ties, dead layers and the like, a region, rows. Every bound
rounded outward is compared with exact rational values at vertices, random points and the worst points found, without
tolerance; bounds to nearest with `NEAREST` units of the sum of absolute terms; LPs with HiGHS's optimum; gradients with
central differences; statuses with what they claim. A violation prints the number that draws it again (`--only N`).
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if __package__:  # python -m tests.attack: the other helpers lie beside this file
    sys.path.insert(0, str(Path(__file__).parent))

from oracles import Affinity, exact, fractions, minimum

import optrelax as ox
from optrelax.layers import Status, Triangle
from optrelax.networks.activations import Activation
from optrelax.networks.models import Residual
from optrelax.networks.ops import Affine
from optrelax.relaxations import names, resolve
from optrelax.rounding import peak

NEAREST = 1000
"""Units of roundoff of the sum of absolute terms by which a bound to nearest may miss a value."""
CLOSED = [name for name in names() if name not in ("cauchy", "alpha-crown", "triangle", "layerwise")]
SMOOTH = [name for name in CLOSED if name != "box-round"]  # that one rounds its ends: a staircase has no derivative
LAYERS = ["alpha-crown", "triangle", "layerwise"]


@dataclass(frozen=True)
class Question:
    """A network, a region of it, and rows of its output."""

    net: nn.Sequential
    region: ox.InputBox
    rows: Tensor
    dtype: torch.dtype
    plain: bool
    """Ordinary scales, ReLU and affine ops alone: what the LP oracle takes."""


@dataclass
class Tally:
    """What an attack tried, and what it found."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        return f"{parts}; {len(self.violations)} violations"


# --- questions ----------------------------------------------------------------------------------------------------


def draw(number: int) -> Question:
    """Question `number`: the same on every machine."""
    r = random.Random(number)
    dtype = r.choice([torch.float32, torch.float64])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        style = r.choices(["ordinary", "odd", "ties", "dead"], [5, 4, 2, 1])[0]
        shape, net = _convolutional(r) if r.random() < 0.3 else _dense(r)
        for layer in net.modules():
            _fill(layer, r, style, dtype)
        net = net.to(dtype).eval()
        region = _region(r, shape, dtype, style)
        outputs = net(torch.zeros(1, *shape).to(dtype)).shape[1]
        k = r.choice([0, 1, 2, 3, 3])
        rows = torch.randn(k, outputs) if r.random() < 0.5 else torch.randint(-1, 2, (k, outputs)).float()
    known = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.AvgPool2d, nn.Identity)
    plain = style != "odd" and all(isinstance(m, (*known, nn.Sequential, Residual)) for m in net.modules())
    return Question(net, region, rows.to(dtype), dtype, plain)


def _dense(r: random.Random) -> tuple[tuple[int, ...], nn.Sequential]:
    width = first = r.randint(1, 4)
    layers: list[nn.Module] = [_affinity(r)] if r.random() < 0.3 else []
    for _ in range(r.randint(1, 3)):
        wide = r.randint(1, 5)
        layers.append(nn.Linear(width, wide))
        if r.random() < 0.25:
            layers.append(nn.BatchNorm1d(wide))
        if r.random() < 0.15:
            layers.append(_affinity(r))
        layers.append(_activation(r))
        if r.random() < 0.25:
            layers.append(Residual(nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide))))
        width = wide
    return (first,), nn.Sequential(*layers, nn.Linear(width, r.randint(1, 3)))


def _convolutional(r: random.Random) -> tuple[tuple[int, ...], nn.Sequential]:
    c, side = r.randint(1, 2), r.randint(3, 4)
    layers: list[nn.Module] = []
    shape: tuple[int, ...] = (c, side, side)
    x = torch.zeros(1, *shape)
    for _ in range(r.randint(1, 2)):
        out = r.randint(1, 2)
        kernel = r.randint(1, min(2, *x.shape[2:]))
        layers.append(nn.Conv2d(x.shape[1], out, kernel, r.randint(1, 2), r.randint(0, kernel - 1)))
        if r.random() < 0.25:
            layers.append(nn.BatchNorm2d(out))
        layers.append(_activation(r))
        x = nn.Sequential(*layers).eval()(torch.zeros(1, *shape))
        if min(x.shape[2:]) >= 2 and r.random() < 0.4:
            layers.append(r.choice([nn.AvgPool2d, nn.MaxPool2d])(2, 1))
            x = nn.Sequential(*layers).eval()(torch.zeros(1, *shape))
    return shape, nn.Sequential(*layers, nn.Flatten(), nn.Linear(x[0].numel(), r.randint(1, 3)))


def _affinity(r: random.Random) -> nn.Module:
    size = 10.0 ** r.choice([0, 0, 1, 20, 50, -20, -50])
    return Affinity(size * r.uniform(1, 2), size if r.random() < 0.7 else r.uniform(-1, 1), r.choice([0.0, 0.1]))


def _activation(r: random.Random) -> nn.Module:
    if r.random() < 0.7:
        return nn.ReLU()
    low = r.choice([-1.0, -0.1, 0.0, 0.1])
    slope, width = r.choice([0.01, 0.3, 1e-46, -0.5]), r.choice([0.3, 1, 1e-3])
    return r.choice([nn.LeakyReLU(slope), nn.Hardtanh(low, low + width)])


def _fill(layer: nn.Module, r: random.Random, style: str, dtype: torch.dtype) -> None:
    """Weights of the style, exact in the type."""
    most = 36 if dtype == torch.float32 else 290
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 1e-3, 2)
    parameters = list(layer.parameters(recurse=False))
    if not parameters:
        return
    with torch.no_grad():
        for p in parameters:
            if style == "ties":
                p.copy_(torch.randint(-2, 3, p.shape).float())
            elif p.dim() > 1:
                p.mul_(2)
            if r.random() < 0.1:
                p[torch.rand(p.shape) < 0.4] = 0
        weight, bias = parameters[0], parameters[-1]
        if style == "dead" and r.random() < 0.5:
            bias.copy_(bias - r.choice([-50, 50]))
        if style == "odd" and r.random() < 0.7:
            layer.to(dtype)
            scale = 10.0 ** (most * r.choice([0.1, 0.5, 0.9, 1.0, 1.05]) * r.choice([-1, 1]))
            weight.data, bias.data = weight.data * scale, bias.data * (scale if r.random() < 0.7 else 1.0)
            limit = torch.finfo(dtype).max
            weight.data, bias.data = weight.data.clamp(-limit, limit), bias.data.clamp(-limit, limit)


def _region(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype, style: str) -> ox.InputBox:
    batch = r.choice([0, 1, 1, 2, 2])
    size = 1.0
    if style == "odd" and r.random() < 0.4:
        size = 10.0 ** ((37 if dtype == torch.float32 else 300) * r.uniform(-1, 0.95))
    x = torch.randn(batch, *shape, dtype=torch.float64)
    if style == "ties":
        x = x.round()
    eps = r.choice([0.0, 1e-7, 0.1, 0.5, 1.0])
    width = eps * (torch.rand(x.shape) < r.choice([0.5, 1.0])) * (1 if style == "ties" else torch.rand(x.shape))
    lower, upper = ((x + sign * width) * size for sign in (-1, 1))
    return ox.InputBox(lower.to(dtype), upper.to(dtype))


# --- points -------------------------------------------------------------------------------------------------------


def points(q: Question, example: int, r: random.Random) -> list[np.ndarray]:
    """Exact points of an example's box: vertices, the middle, random rationals, and the worst ones found in float64."""
    low, high = fractions(q.region.lower[example]), fractions(q.region.upper[example])
    found = [low, high, (low + high) / 2]
    for _ in range(2):
        t = np.vectorize(lambda _: Fraction(r.randint(0, 7), 7), otypes=[object])(low)
        found.append(low + t * (high - low))
    net = deepcopy(q.net).double()
    lower, upper = q.region.lower[example].double(), q.region.upper[example].double()
    pick = torch.rand(64, *lower.shape, generator=torch.Generator().manual_seed(r.randint(0, 2**31))) < 0.5
    corners = torch.where(pick, lower, upper)
    with torch.no_grad():
        values = net(corners).reshape(64, -1) @ q.rows.double().mT
    for index in {int(i) for part in (values.argmin(0), values.argmax(0)) for i in part}:
        found.append(np.where(pick[index].numpy(), low, high))
    return found


def traced(net: nn.Sequential, x: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The network's exact value, and what goes into each of its own activations."""
    before = {}
    for name, layer in net.named_children():
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.Hardtanh)):
            before[name] = x
        x = exact(layer, x)
    return x, before


# --- the attack ---------------------------------------------------------------------------------------------------


class Attack:
    """One question against everything."""

    def __init__(self, number: int, tally: Tally) -> None:
        self.number, self.tally, self.question = number, tally, draw(number)
        self.random = random.Random(number)
        self.network = ox.capture(self.question.net, self.question.region.shape[1:])

    def blame(self, what: str) -> None:
        self.tally.violations.append(f"--only {self.number}: {what}")

    def run(self) -> None:
        q = self.question
        self.tally.counts["networks"] += 1
        self.exact = [[traced(q.net, x) for x in points(q, i, self.random)] for i in range(len(q.region.lower))]
        self.tally.counts["points"] += sum(map(len, self.exact))
        names = [*CLOSED, self.random.choice(LAYERS)]
        for name in names:
            for rounding in ("outward", "nearest"):
                self.guarded(f"{name} {rounding}", lambda n=name, r=rounding: self.bounds(n, r))
        self.guarded("triangle solution", self.solution)
        self.guarded("gradient", self.gradient)

    def guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except ox.UnsupportedOpError:
            self.tally.counts["refused"] += 1
        except Exception as error:  # noqa: BLE001 - every crash is a violation
            self.blame(f"{what}: {type(error).__name__}: {str(error)[:200]}")

    def bounds(self, name: str, rounding: str) -> None:
        q = self.question
        relaxation = resolve(name)
        with torch.no_grad():
            low = ox.lower_bounds(self.network, q.region, q.rows, relaxation, rounding=rounding)
            before = ox.preactivation_bounds(self.network, q.region, relaxation, rounding=rounding)
        if low.shape != (len(q.region.lower), len(q.rows)):
            self.blame(f"{name} {rounding}: shape {tuple(low.shape)}")
        slack = self.slack(rounding)
        rows = fractions(q.rows)
        for i, traces in enumerate(self.exact):
            values = [rows @ value if len(rows) else value[:0] for value, _ in traces]
            self.below(f"{name} {rounding} example {i}", low[i], values, slack("", i))
            for path, b in before.items():
                if path in traces[0][1]:
                    inside, room = [trace[path] for _, trace in traces], slack(path, i)
                    self.below(f"{name} {rounding} before {path}, example {i}", b.lower[i], inside, room)
                    self.below(f"{name} {rounding} above {path}, example {i}", -b.upper[i], [-v for v in inside], room)

    def below(self, what: str, low: Tensor, values: list[np.ndarray], slack: np.ndarray | None) -> None:
        """Whether no value lies below the bounds."""
        self.tally.counts["bounds"] += low.numel()
        for place, bound in enumerate(low.flatten().tolist()):
            if math.isnan(bound) or bound == math.inf:
                self.blame(f"{what}: [{place}] is {bound}")
            if not math.isfinite(bound):
                self.tally.counts["bounds that are none"] += 1
                continue
            least = min(v.reshape(-1)[place] for v in values)
            room = 0.0 if slack is None else slack[place]
            if Fraction(bound) > least and not (room == math.inf or Fraction(bound) <= least + Fraction(float(room))):
                self.blame(f"{what}: [{place}] {bound!r} above a value by {float(Fraction(bound) - least):.3g}")

    @torch.no_grad()
    def slack(self, rounding: str) -> Callable[[str, int], np.ndarray | None]:
        """Room of a node's bounds, or the rows' (""): none outward; to nearest `NEAREST` roundings of every op's sum of
        absolute terms, and as many numbers lost below the normal range, of the values or of rows that meet them."""
        if rounding == "outward":
            return lambda path, i: None
        region, numbers = self.question.region, torch.finfo(self.question.dtype)
        size = torch.maximum(region.lower.abs(), region.upper.abs()).double()
        found = {self.network.input: (size, numbers.eps * size)}
        for node in self.network:
            sizes, errors = zip(*(found[name] for name in node.inputs), strict=True)
            if isinstance(node.op, Affine):
                size = node.op.apply_abs(*sizes)
                bias = node.op.bias_size(size)
                size = size if bias is None else size + bias
                greatest = 1 + sum(peak(p).reshape(-1, *[1] * len(node.shape)) for p in sizes)
                lost = NEAREST * numbers.tiny * node.op.fan_in * greatest
                found[node.name] = size, node.op.apply_abs(*errors) + NEAREST * numbers.eps * size + lost
            else:  # of slopes up to 1, its kinks up to 1 in size
                change = torch.abs if isinstance(node.op, Activation) else node.op
                size = change(sizes[0]) + 1
                found[node.name] = size, change(errors[0]) + NEAREST * numbers.eps * size
        # Rows pulled back underflow too, and what they lose is multiplied by the values that they come to.
        below = sum(size.flatten(1).sum(1) for size, _ in found.values()) * NEAREST * numbers.tiny
        paths = {node.path: found[node.inputs[0]][1] for node in self.network.activations}
        output = found[self.network.output][1].flatten(1) @ self.question.rows.abs().double().mT

        def room(path: str, i: int) -> np.ndarray:
            error = paths[path][i].flatten() if path else output[i]
            return (error + below[i]).nan_to_num(math.inf).numpy() + numbers.tiny

        return room

    def solution(self) -> None:
        """Status and gap of the triangle LP, and on plain networks HiGHS's optimum."""
        q = self.question
        for rounding in ("nearest", "outward"):
            layer = Triangle(rounding=rounding)
            with torch.no_grad():
                found = layer.solve(self.network, q.region, q.rows)
            self.tally.counts["LPs"] += found.lower.numel()
            tol = layer.solver.tol
            rounded = max(1e-6, 64 * torch.finfo(found.gap.dtype).eps)  # two sums of some hundred terms each
            for at in np.ndindex(*found.lower.shape):
                low, gap, status = (float(t[at]) for t in (found.lower, found.gap, found.status))
                if math.isnan(low) or low == math.inf or math.isnan(gap) or gap < -rounded * max(1.0, abs(low)):
                    self.blame(f"triangle {rounding} {at}: lower {low}, gap {gap}")
                if status == Status.OPTIMAL and not gap <= tol * max(1.0, abs(low)) * 1.001:
                    self.blame(f"triangle {rounding} {at}: OPTIMAL with gap {gap}, lower {low}")
                if status in (Status.INFEASIBLE, Status.UNBOUNDED):
                    self.blame(f"triangle {rounding} {at}: status {Status(int(status)).name} of a network's LP")
        if q.plain and q.dtype == torch.float64 and len(q.region.lower) and len(q.rows) and self.sane():
            with torch.no_grad():
                layer = Triangle()
                found = layer.solve(self.network, q.region, q.rows)
                before = resolve(layer.preactivation).preactivation_bounds(self.network, q.region)
            try:
                best = minimum(self.network, q.region, q.rows, before, integer=False)
            except AssertionError:  # HiGHS gave up
                return
            self.tally.counts["LPs by HiGHS"] += best.numel()
            room = 1e-5 * best.abs().clamp_min(1)
            for at in np.ndindex(*best.shape):
                low, gap, want = float(found.lower[at]), float(found.gap[at]), float(best[at])
                if low > want + float(room[at]) or (math.isfinite(gap) and low + gap < want - float(room[at])):
                    self.blame(f"triangle {at}: {low} with gap {gap}, HiGHS has {want}")

    def sane(self) -> bool:
        return all(bool((p.abs() < 1e4).all()) for p in self.question.net.parameters())

    def gradient(self) -> None:
        """Along a random direction of the weights, where two central differences agree."""
        q = self.question
        if q.dtype != torch.float64 or not len(q.region.lower) or not len(q.rows) or not self.sane():
            return
        name = self.random.choice(SMOOTH)
        parameters = list(q.net.parameters())
        g = torch.Generator().manual_seed(self.number)
        step = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]

        def value(by: float) -> float:
            with torch.no_grad():
                for p, d in zip(parameters, step, strict=True):
                    p.add_(by * d)
                found = float(ox.lower_bounds(self.network, q.region, q.rows, name).sum())
                for p, d in zip(parameters, step, strict=True):
                    p.sub_(by * d)
            return found

        low = ox.lower_bounds(self.network, q.region, q.rows, name).sum()
        grads = torch.autograd.grad(low, parameters, allow_unused=True)
        slope = sum(float((t * d).sum()) for t, d in zip(grads, step, strict=True) if t is not None)
        wide, near, nearer = ((value(h) - value(-h)) / (2 * h) for h in (1e-5, 5e-6, 2.5e-6))
        here = float(low.detach())
        size = max(1.0, abs(near), abs(here))
        # Only where the function is smooth: at kinks the differences say something else.
        smooth = max(abs(wide - near), abs(near - nearer)) <= 1e-6 * size
        middle = abs(value(5e-6) + value(-5e-6) - 2 * here) <= 1e-9 * size
        if not (smooth and middle):
            self.tally.counts["gradients at kinks"] += 1
            return
        self.tally.counts["gradients"] += 1
        if not abs(slope - near) <= 1e-4 * size:
            self.blame(f"{name}: gradient {slope}, central difference {near}")


def attack(numbers: Iterator[int], tally: Tally, until: float, report: Callable[[str], None]) -> Tally:
    """Ask these questions, until then."""
    told = 0
    for number in numbers:
        if time.monotonic() > until:
            break
        try:
            Attack(number, tally).run()
        except Exception as error:  # noqa: BLE001 - so is a network that cannot be captured
            tally.violations.append(f"--only {number}: {type(error).__name__}: {str(error)[:200]}")
        for line in tally.violations[told:]:
            report(line)
        told = len(tally.violations)
        if tally.counts["networks"] % 50 == 0:
            report(str(tally))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--seed", type=int, default=0, help="where the numbers begin: seed * 1,000,000 (0)")
    parser.add_argument("--only", type=int, help="the one question of this number")
    given = parser.parse_args()
    warnings.simplefilter("error")

    def report(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    first = given.seed * 1_000_000
    numbers = iter([given.only]) if given.only is not None else iter(range(first, first + 1_000_000))
    tally = attack(numbers, Tally(), time.monotonic() + 60 * given.minutes, report)
    report(str(tally))
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
