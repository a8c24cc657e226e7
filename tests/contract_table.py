"""Every relaxation x activation x region x use: it runs, or is refused by name in one sentence.

`python -m tests.contract_table` goes through all of them and prints what is neither; the tests go through cells in
which every relaxation meets every region, and every activation and use several of both.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:  # python -m tests.contract_table: the registry lies beside this file
    sys.path.insert(0, str(Path(__file__).parent))

from cases import KINDS, inputs

import optrelax as ox
from optrelax.errors import UnsupportedOpError, UnsupportedRegionError
from optrelax.networks.activations import elementary
from optrelax.regions import InputBox, LinfBall, Region, ball_of, norms

RELAXATIONS = ("box", "hbox", "deepz", "crown", "crown-soft", "crown-ibp", "alpha-crown:iterations=2", "triangle")
RELAXATIONS += ("layerwise", "box+crown", "given")

# --- what is asked about ------------------------------------------------------------------------------------------

_POWERS = (2.0, 3.0, -1.0, -2.0)
_PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "abs": torch.abs,
    "floor": lambda x: x.clamp_min(-0.2),
    "max": lambda x: torch.maximum(x, x.flip(1)),
    "product": lambda x: x * x.flip(1),
    "quotient": lambda x: x / (1 + x * x),
    "softmax": lambda x: torch.softmax(x, 1),
}


def _function(name: str) -> Callable[[Tensor], Tensor]:
    """As people write it: of torch, where torch has it."""
    if name == "gelu_tanh":
        return partial(F.gelu, approximate="tanh")
    found: Callable[[Tensor], Tensor] = next(
        (getattr(room, name) for room in (torch, F) if hasattr(room, name)), elementary.known(name, ())
    )
    return found


def _functions() -> dict[str, Callable[[Tensor], Tensor]]:
    found = _PIECES | {f"power {n:g}": partial(torch.pow, exponent=n) for n in _POWERS}
    return found | {name: _function(name) for name in elementary.names() if name != "power"}


ACTIVATIONS = _functions()
"""Those that are registered, and what capture makes of several."""
POSITIVE = ("log", "sqrt", "rsqrt", "power -1", "power -2")
"""Asked about where they are defined."""

BALLS: dict[str, Callable[[Tensor, torch.Generator], Region]] = {
    "linf": lambda x, g: LinfBall(x, 0.1),
    "linf by coordinate": lambda x, g: LinfBall(x, 0.2 * torch.rand(x.shape, generator=g, dtype=x.dtype)),
    "clipped linf": lambda x, g: LinfBall(x, torch.linspace(0.0, 0.3, len(x), dtype=x.dtype), (0.0, 1.0)),
} | {kind.name: kind.make for kind in KINDS}


class Middle(nn.Module):
    """An activation between two affine layers, its arguments positive where they must be."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.function = ACTIVATIONS[name]
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / 2)
            if name in POSITIVE:
                self.first.weight.mul_(0.3)
                self.first.bias.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


@cache
def _network(name: str) -> ox.Network:
    """Its maxima as ReLUs, so that bounds can be given of every neuron."""
    return ox.capture(Middle(name).double().eval(), (4,)).lowered


@dataclass(frozen=True)
class Cell:
    """One of the table."""

    relaxation: str
    activation: str
    ball: str
    use: str

    def __str__(self) -> str:
        return f"{self.relaxation} x {self.activation} x {self.ball} x {self.use}"

    @property
    def network(self) -> ox.Network:
        return _network(self.activation)

    @property
    def region(self) -> Region:
        return BALLS[self.ball](inputs((4,), 2), torch.Generator().manual_seed(7))

    def made(self, region: Region) -> Any:
        """The relaxation: of a name, or LPs on bounds that are given."""
        if self.relaxation != "given":
            return self.relaxation
        return ox.layers.Triangle(preactivation=ox.preactivation_bounds(self.network, region, "box"))

    def points(self, region: Region) -> Tensor:
        """Of the region, [points, batch, 4]."""
        g = torch.Generator().manual_seed(1)
        lowest = region.lowest(torch.randn(1, 6, 4, generator=g, dtype=region.dtype)).transpose(0, 1)
        found = torch.cat([region.sample(10, g), lowest, region.center[None]])
        return torch.stack([region.project(x) for x in found])

    @property
    def norm(self) -> str | None:
        """Of the ball, where it is one."""
        return next((norm for norm in norms() if type(self.region) is ball_of(norm)), None)

    @property
    def refusal(self) -> str | None:
        """What it is to be refused with, a pattern; None where it is to run."""
        products = bool(self.network.products)
        box = isinstance(self.region, InputBox) or (self.use == "measure" and self.norm is None)
        if self.use == "verify" and not box:
            return "^Property: takes boxes .*; give the box around it$"
        if self.relaxation == "hbox" and not box:
            if self.use in ("outward", "certify", "compare"):
                return "^hbox.* rounded outward: takes boxes .*; deepz, fast-lin and crown take any region$"
            if products and self.use != "attack":
                return (
                    "^hbox.* with max-pooling or products: takes boxes .*; deepz, fast-lin and crown take any region$"
                )
        if self.relaxation == "given" and products and self.use not in ("attack", "measure"):
            return "Multiply: the product of two values wants pre-activation bounds .*; take box or crown"
        return None

    def check(self) -> str | None:
        """What it is refused with, or None.  AssertionError where it is wrong, or refused otherwise than is said."""
        said = None
        try:
            USES[self.use](self)
        except (UnsupportedOpError, UnsupportedRegionError) as error:
            said = str(error)
        if self.refusal is None or said is None:
            assert self.refusal is said, f"{said} is not {self.refusal}"
        else:
            assert re.search(self.refusal, said), f"is refused otherwise: {said}"
        return said


# --- uses ---------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Cell], None]] = {}


def _use(function: Callable[[Cell], None]) -> Callable[[Cell], None]:
    USES[function.__name__.strip("_")] = function
    return function


def _enclosed(cell: Cell, rounding: str, slack: float) -> ox.Bounds:
    region = cell.region
    with torch.no_grad():
        found = ox.bounds(cell.network, region, cell.made(region), rounding=rounding)
        points = cell.points(region)
        values = cell.network.module(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    assert bool(((found.lower - slack <= values) & (values <= found.upper + slack)).all()), "a point lies outside"
    return found


@_use
def _forward(cell: Cell) -> None:
    found = _enclosed(cell, "nearest", 1e-9)
    assert bool(found.width.isfinite().all()), "a bound is infinite"


@_use
def _outward(cell: Cell) -> None:
    _enclosed(cell, "outward", 0.0)


@_use
def _gradient(cell: Cell) -> None:
    region = cell.region
    bound = ox.lower_bounds(cell.network, region, torch.eye(3, dtype=torch.float64), cell.made(region))
    parameters = [*cell.network.module.parameters()]
    found = torch.autograd.grad(bound.sum(), parameters, allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in found), "a gradient is not finite"
    assert any(g is not None and bool(g.any()) for g in found), "no gradient"


@_use
def _batch(cell: Cell) -> None:
    region = cell.region
    with torch.no_grad():
        whole = ox.bounds(cell.network, region, cell.made(region))
        for i in range(2):
            one = region.select(slice(i, i + 1))
            alone = ox.bounds(cell.network, one, cell.made(one))
            torch.testing.assert_close(alone.lower[0], whole.lower[i], rtol=2e-3, atol=2e-3)


@_use
def _train(cell: Cell) -> None:
    net, region = cell.network, cell.region
    loss = ox.CertifiedLoss(cell.made(region))(net, region, torch.tensor([0, 2])).total
    found = torch.autograd.grad(loss, [*net.module.parameters()], allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in found), "a gradient is not finite"


def _data(cell: Cell) -> tuple[Region, tuple[Tensor, Tensor]]:
    """The region, inputs of it, and what they are classified as."""
    region = cell.region
    x = region.project(region.center)
    with torch.no_grad():
        return region, (x, cell.network.module(x).argmax(1))


@_use
def _certify(cell: Cell) -> None:
    region, data = _data(cell)
    report = ox.certify(cell.network, data, relaxation=cell.made(region), region=region, attack=ox.PGD(steps=2))
    assert report.errors == 0, "an example is an error"


@_use
def _compare(cell: Cell) -> None:
    region, data = _data(cell)
    table = ox.compare(cell.network, data, relaxations=cell.made(region), region=region, repeats=1).table
    assert table.height == 1


@_use
def _verify(cell: Cell) -> None:
    region, data = _data(cell)
    region, spec = region.select(slice(0, 1)), ox.margins(data[1][:1], classes=3)
    said = ox.verify(cell.network, spec, cell.made(region), region=region, attack=False)
    assert said.status.value in ("holds", "unknown"), said.status


@_use
def _attack(cell: Cell) -> None:
    region, data = _data(cell)
    found = ox.PGD(steps=2).search(cell.network, region, ox.margins(data[1], classes=3).double())
    assert bool(region.contains(found.points).all()), "a point of the attack lies outside"


@_use
def _measure(cell: Cell) -> None:
    """Radii of a ball's norm; of other regions in linf."""
    _, (x, labels) = _data(cell)
    norm = cell.norm or "linf"
    made = "triangle" if cell.relaxation == "given" else cell.relaxation
    how = {"limit": 0.2, "resolution": 0.1, "points": 2, "resamples": 2, "subset": 1, "attack": ox.PGD(steps=2)}
    ox.measure_tightness(cell.network, (x, labels), made, norm=norm, clip=None, **how)


def cells() -> Iterator[Cell]:
    """All of them."""
    for combination in itertools.product(RELAXATIONS, ACTIVATIONS, BALLS, USES):
        yield Cell(*combination)


def pairs() -> Iterator[Cell]:
    """So many that every relaxation meets every region and use, and every activation some of each."""
    balls, uses, activations = list(BALLS), list(USES), list(ACTIVATIONS)
    for i, relaxation in enumerate(RELAXATIONS):
        for j, ball in enumerate(balls):
            yield Cell(
                relaxation, activations[(len(balls) * i + j) % len(activations)], ball, uses[(i + j) % len(uses)]
            )


def main() -> int:
    """Print every cell that is wrong, the sentences of refusal, and how many there were of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract_table", description=__doc__, allow_abbrev=False)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every so many cells alone (1: all, an hour)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="of them (0)")
    given = parser.parse_args()
    counts = {"runs": 0, "refused": 0, "wrong": 0}
    sentences: dict[str, Cell] = {}
    for cell in itertools.islice(cells(), given.first, None, given.every):
        try:
            said = cell.check()
        except Exception as error:  # noqa: BLE001 - it is printed
            counts["wrong"] += 1
            sys.stdout.write(f"{cell}: {type(error).__name__}: {str(error)[:300]}\n")
            sys.stdout.flush()
            continue
        counts["runs" if said is None else "refused"] += 1
        if cell.refusal is not None:
            sentences.setdefault(cell.refusal, cell)
    for sentence, cell in sentences.items():
        sys.stdout.write(f"{cell}: {sentence}\n")
    sys.stdout.write(f"{counts}\n")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
