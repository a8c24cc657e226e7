"""Rows that alpha-CROWN bounds, and what each of them chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optrelax import memory
from optrelax.domains.passes import planning
from optrelax.domains.passes.neurons import Neurons
from optrelax.domains.passes.programs import Program
from optrelax.layers.ascent.schedule import climbed
from optrelax.layers.problems import DualPoint, Weights
from optrelax.networks.graph import Network
from optrelax.regions import Region


@dataclass(slots=True)
class Parameter:
    """One kind of number that rows choose at an activation, in [0, 1]: [rows, ...]."""

    kind: str
    """"alpha": weight between the two lower lines or planes; "beta": between the upper ones, where there are two;
    "below", "above": where the line of a curved function touches it (`Activation.supporting`)."""
    node: str
    value: Tensor
    best: Tensor = field(init=False)
    moment: Tensor = field(init=False)
    square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.value
        self.moment, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def keep(self, better: Tensor) -> None:
        """Remember the values of some rows."""
        mask = better.reshape(-1, *[1] * (self.value.dim() - 1))
        self.best = torch.where(mask, self.value, self.best)

    def climb(self, grad: Tensor, step: float, correction: float) -> None:
        """A step of Adam."""
        self.value = climbed(self.value, grad, self.moment, self.square, correction, step)

    def select(self, rows: Tensor) -> Parameter:
        """Of some rows."""
        found = Parameter(self.kind, self.node, self.value[rows])
        found.best, found.moment, found.square = self.best[rows], self.moment[rows], self.square[rows]
        return found


@dataclass(slots=True)
class BoundedRows:
    """Rows of one node, of any examples, and what each of them chooses."""

    node: str
    neurons: Neurons
    """Example and place of each row, and which it is of the rows that its node is given."""
    index: tuple[Tensor, ...]
    """Of hidden neurons, two rows each: example and entry in the activation."""
    program: Program | None
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def example(self) -> Tensor:
        """Of each row."""
        return self.neurons.place[:, 0]

    def values(self, kind: str) -> Weights:
        """Parameters of one kind, by activation."""
        return {p.node: p.value for p in self.parameters if p.kind == kind}

    def whole(self) -> DualPoint:
        """Weights of all neurons, whatever the rows see of them."""
        alpha, beta = self.values("alpha"), self.values("beta")
        if self.program is not None:
            alpha = {name: self.program.on_maps(name, t, self.neurons) for name, t in alpha.items()}
        return DualPoint(alpha, beta)

    def part(self, rows: Tensor) -> BoundedRows:
        """Some rows and their values."""
        parameters = [Parameter(p.kind, p.node, p.value[rows]) for p in self.parameters]
        return BoundedRows(self.node, self.neurons.select(rows), self.index, self.program, parameters)

    def select(self, rows: Tensor, examples: Tensor, renumbered: Tensor) -> BoundedRows:
        """Some rows: those of some examples, which get new numbers."""
        neurons = self.neurons.select(rows)
        neurons.place[:, 0] = renumbered[neurons.place[:, 0]]
        index = self.index
        if index:
            own = examples[index[0]]
            index = (renumbered[index[0][own]], *(t[own] for t in index[1:]))
        parameters = [p.select(rows) for p in self.parameters]
        return BoundedRows(self.node, neurons, index, self.program, parameters)


SWEPT = 12
"""Numbers a neuron and input that a row of a sweep takes: lines, coefficients and what a gradient keeps of them."""
SLID = 60
"""Likewise, of a curved function: its lines at a point of tangency of the row's own, on both sides."""
_LOT = 2**26
"""Bytes of the rows that are swept at once where nothing is kept of them."""


def swept_numbers(network: Network) -> int:
    """Numbers that one row of a sweep takes."""
    entries = memory.hidden_entries(network) + math.prod(network.input_shape)
    curved = sum(math.prod(node.shape) for node in network.activations if node.op.slides)
    return SWEPT * entries + SLID * curved


def lot(network: Network, region: Region) -> int:
    """Rows that are swept at once where nothing is kept of them."""
    return max(1, _LOT // (swept_numbers(network) * region.dtype.itemsize))


def windowed(network: Network, region: Region, target: str) -> Program | None:
    """Compiled steps for rows of a node that have weights of their own; None where sweeps do it."""
    if not planning.available(region):
        return None
    found = planning.program(network, target, depth=0)
    if found is None or (found.windows and target == network.output):
        return None
    ops = [network[name].op for name in found.activations]
    return found if all(op.chord_above and op.origin_below for op in ops) else None  # type: ignore[union-attr]
