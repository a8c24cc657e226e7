"""The LPs that every solver is measured on: margins of some images of a network over CROWN's pre-activation bounds."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import optrelax as ox
from benchmarks.networks import Trained
from benchmarks.reports import Options
from optrelax.analysis import prepare
from optrelax.certification.journals import tensor_digest
from optrelax.data.datasets import load_dataset
from optrelax.data.splits import evenly_spaced
from optrelax.enclosures import Bounds
from optrelax.layers import Layerwise, Solution, Triangle
from optrelax.layers.lots import solve_rows
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import InputBox
from optrelax.relaxations import Preactivation


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured, in images unless it says otherwise."""

    images: int
    highs: int
    """HiGHS's timed runs, warm."""
    cold: int
    exact: int
    """The exact solver."""
    generic: int
    """LPs of cvxpylayers, all of one image."""
    layerwise: int
    """HiGHS's layerwise runs, warm; from scratch, one."""
    natural_epochs: int
    box_epochs: int
    conv_epochs: int


FULL = Sizes(
    images=100, highs=10, cold=3, exact=10, generic=4, layerwise=2, natural_epochs=3, box_epochs=10, conv_epochs=1
)
QUICK = Sizes(images=6, highs=2, cold=1, exact=2, generic=2, layerwise=1, natural_epochs=1, box_epochs=2, conv_epochs=1)


@dataclass(frozen=True, slots=True)
class Setting:
    """A network and a radius."""

    name: str
    trained: Trained
    eps: float

    def case(self, images: int, options: Options) -> Case:
        """Evenly spaced test images, in float64 on the CPU."""
        net = self.trained.network(options).double()
        test = load_dataset(options.data, options.data_dir, split="test").subset(images)
        return Case(self.name, capture(net, test.input_shape), test.images.double(), test.labels, self.eps)


def settings(sizes: Sizes, seed: int) -> list[Setting]:
    """FC-SMALL, trained naturally and by Box."""
    natural = Trained("fc-small", "natural", sizes.natural_epochs, seed)
    box = Trained("fc-small", "box", sizes.box_epochs, seed)
    return [
        Setting("natural, eps 0.02", natural, 0.02),
        Setting("natural, eps 0.05", natural, 0.05),
        Setting("Box, eps 0.1", box, 0.1),
    ]


@dataclass(frozen=True)
class Case:
    """Images of one setting and their LPs."""

    name: str
    network: Network
    x: Tensor
    labels: Tensor
    eps: float

    @cached_property
    def region(self) -> InputBox:
        """Boxes of the images."""
        return prepare(self.network, self.ball)[1]

    @property
    def ball(self) -> ox.LinfBall:
        """The region as a user makes it."""
        return ox.LinfBall(self.x, self.eps, (0.0, 1.0))

    @cached_property
    def rows(self) -> Tensor:
        """Margins, [images, k, classes]."""
        return ox.margins(self.labels, self.network.outputs).to(self.x)

    @cached_property
    def preactivation(self) -> Preactivation:
        """CROWN's bounds."""
        with torch.no_grad():
            return ox.Crown().preactivation_bounds(self.network, self.region)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def lps(self) -> int:
        """Number of LPs."""
        return self.rows.shape[0] * self.rows.shape[1]

    def subset(self, n: int) -> Case:
        """`n` evenly spaced images, or all where there are fewer."""
        index = self.index(n)
        return Case(self.name, self.network, self.x[index], self.labels[index], self.eps)

    def index(self, n: int) -> Tensor:
        """Which images `subset` takes."""
        return evenly_spaced(len(self), min(n, len(self)))

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """The same case elsewhere or in another type, with weights of its own."""
        net = copy.deepcopy(self.network.module).to(device, dtype)
        network = capture(net, self.network.input_shape)
        return Case(self.name, network, self.x.to(device, dtype), self.labels.to(device), self.eps)

    def crossing(self) -> float:
        """Mean number of crossing neurons of an image."""
        cross = [((b.lower < 0) & (b.upper > 0)).flatten(1).sum(1) for b in self.preactivation.values()]
        return float(torch.stack(cross).sum(0).double().mean())

    def digest(self) -> str:
        """Of all that decides the LPs; the bounds to six digits, so that their rounding does not count."""
        ends = [(end * 1e6).round() for b in self.preactivation.values() for end in (b.lower, b.upper)]
        weights = [p.detach() for p in self.network.module.parameters()]
        parts = tensor_digest(*weights, self.region.lower, self.region.upper, self.rows, *ends)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Layer:
    """A layer at work on all LPs of a case."""

    layer: Triangle | Layerwise
    case: Case

    def solve(self) -> Solution:
        """Bounds of all margins, pre-activation bounds included, without gradients."""
        with torch.no_grad():
            return self._solve()

    def step(self) -> None:
        """The sum of all bounds, forward and backward to the weights, through the pre-activation bounds too."""
        self._descend(self._solve())

    def _solve(self) -> Solution:
        return self.layer.solve(self.case.network, self.case.ball, self.case.rows)

    def solve_given(self) -> Solution:
        """The LPs alone, on given pre-activation bounds, as other solvers get them."""
        with torch.no_grad():
            return self._solve_given(gradient=False)

    def step_given(self) -> None:
        """The LPs alone, forward and backward to weights and pre-activation bounds."""
        self._descend(self._solve_given(gradient=True))

    def _solve_given(self, gradient: bool) -> Solution:
        case = self.case
        bounds = {
            name: Bounds(b.lower.detach().requires_grad_(gradient), b.upper.detach().requires_grad_(gradient))
            for name, b in case.preactivation.items()
        }
        return solve_rows(self.layer, case.network, case.region, case.rows, bounds)

    def _descend(self, found: Solution) -> None:
        for p in self.case.network.module.parameters():
            p.grad = None
        found.lower.sum().backward()


def relative(difference: Tensor, of: Tensor) -> Tensor:
    """In units of max(1, |value|)."""
    return difference.double() / of.double().abs().clamp_min(1)


def quantiles(name: str, values: Tensor) -> dict[str, float]:
    """Median, 90 % and 99 % as columns."""
    marks = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    # Interpolation would make the neighbours of an infinite gap NaN.
    found = values.flatten().double().cpu().quantile(marks, interpolation="higher")
    return dict(zip((f"{name} median", f"{name} 90 %", f"{name} 99 %"), found.tolist(), strict=True))
