"""Presolve of network LPs: the neurons that matter kept, everything between them composed into matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from optrelax.layers.hulls import HullLines
from optrelax.layers.prices import affine_line
from optrelax.layers.problems import Problems, Weights
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import flatten_from
from optrelax.networks.walks import carried_back, carried_on, through_affine

KeptNeurons = Literal["crossing", "alive", "all"]
_UNITS = 2**21  # entries of the unit rows that a matrix is made of, at a time


@dataclass(frozen=True, slots=True)
class NeuronSlots:
    """Where the kept neurons of one activation stand in the vector of all kept neurons."""

    name: str
    index: Tensor
    """Flat index of each neuron in its activation, [E, count]."""
    real: Tensor
    """Which of them are neurons and not padding, [E, count]."""
    first: int
    last: int

    @property
    def span(self) -> slice:
        """Its entries in that vector."""
        return slice(self.first, self.last)

    def gather(self, values: Tensor, default: float = 0.0) -> Tensor:
        """Values [E, *shape] at the neurons, `default` at padding: [E, count]."""
        return torch.where(self.real, flatten_from(values, 1).gather(1, self.index), default)

    def scatter(self, values: Tensor, rest: Tensor) -> Tensor:
        """Values [E, ..., count] at their neurons, `rest` [E, ..., *shape] elsewhere."""
        lead = values.shape[:-1]
        flat = rest.reshape(*lead, -1)
        # Padding is written to a spare last column.
        flat = torch.cat([flat, flat.new_zeros(*lead, 1)], -1)
        at = torch.where(self.real, self.index, flat.shape[-1] - 1)
        at = at.reshape(len(at), *[1] * (len(lead) - 1), -1).expand_as(values)
        return flat.scatter(-1, at, values)[..., :-1].reshape(rest.shape)


class AffineBlocks:
    """What lies between activations as matrices on the values behind it: shared by examples, made once a solve."""

    def __init__(self, network: Network, like: Tensor) -> None:
        self.network, self.like = network, like
        self._found: dict[str, Weights] = {}

    def matrices(self, activation: str) -> Weights:
        """The pre-activation's matrix [n, *shape of the source] on each activation or input that it reads."""
        if activation not in self._found:
            name = self.network[activation].inputs[0]
            shape = self.network.shape_of(name)
            n = math.prod(shape)
            parts = []
            for rows in torch.arange(n, device=self.like.device).split(max(1, _UNITS // max(1, n))):
                unit = self.like.new_zeros(len(rows), n).scatter_(1, rows[:, None], 1.0)
                parts.append(carried_back(self.network, {name: unit.reshape(len(rows), *shape)}, through_affine))
            self._found[activation] = {source: torch.cat([part[source] for part in parts]) for source in parts[0]}
        return self._found[activation]

    @cached_property
    def sources(self) -> dict[str, frozenset[str]]:
        """Activations and input that each pre-activation reads."""
        found = {self.network.input: frozenset({self.network.input})}
        for node in self.network.nodes:
            affine = node.affine
            found[node.name] = frozenset().union(*(found[n] for n in node.inputs)) if affine else frozenset({node.name})
        return {node.name: found[node.inputs[0]] for node in self.network.activations}

    def entries(self, activation: str) -> int:
        """Of all matrices of an activation."""
        behind = sum(math.prod(self.network.shape_of(name)) for name in self.sources[activation])
        return math.prod(self.network.shape_of(activation)) * behind

    @cached_property
    def dense(self) -> frozenset[str]:
        """Activations whose matrices cost no more to multiply with than the ops that they stand for."""
        found = set()
        for node in self.network.activations:
            if self.entries(node.name) <= self._cost_of_ops(node):
                found.add(node.name)
        return frozenset(found)

    def _cost_of_ops(self, node: Node) -> int:
        """Of the ops between an activation's pre-activation and what lies behind, each counted once."""
        cost = 0

        def step(node: Node, _: None) -> Iterable[tuple[str, None]] | None:
            nonlocal cost
            if not node.affine:
                return None
            cost += node.affine.cost()
            return ((name, None) for name in node.inputs)

        carried_back(self.network, {node.inputs[0]: None}, step, add=lambda first, _: first)
        return cost


def kept_neurons(h: HullLines, keep: KeptNeurons) -> Tensor:
    """Which neurons of an activation a composition keeps, [R, *shape]."""
    if keep == "alive":
        slope, intercept = affine_line(h)
        return h.free | (slope != 0) | (intercept != 0)
    return h.free if keep == "crossing" else torch.ones_like(h.free)


@dataclass(frozen=True)
class Composition:
    """The affine maps between input, kept neurons and a target.

    problems: one an example, E of them; with all kept, any one of them: the maps are the network's own.
    keep: the crossing neurons of each example, the stable ones composed away; those that are not dead ("alive"), so
    that nothing is composed; or all of them, in one copy for all examples (E = 1).  Examples are padded to the
    greatest number with neurons that read and feed nothing.
    given: matrices of the network that another composition made already.
    """

    problems: Problems
    keep: KeptNeurons = "crossing"
    given: AffineBlocks | None = None

    @cached_property
    def blocks(self) -> AffineBlocks:
        """The network's matrices between activations."""
        return self.given or AffineBlocks(self.problems.network, self.problems.rows)

    @cached_property
    def slots(self) -> tuple[NeuronSlots, ...]:
        """Kept neurons in topological order of their activations."""
        found, first = [], 0
        for node in self.problems.network.activations:
            if node.name not in self.problems.hulls:
                continue
            kept = flatten_from(kept_neurons(self.problems.hulls[node.name], self.keep), 1)
            if self.keep == "all":
                index = torch.arange(kept.shape[1], device=kept.device)[None]
                real = torch.ones_like(index, dtype=torch.bool)
            else:
                count = int(kept.sum(1).max()) if kept.numel() else 0
                index = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
                real = kept.gather(1, index)
            found.append(NeuronSlots(node.name, index, real, first, first + index.shape[1]))
            first += index.shape[1]
        return tuple(found)

    @cached_property
    def width(self) -> int:
        """K, the number of kept neurons, padding included."""
        return self.slots[-1].last if self.slots else 0

    @cached_property
    def rest(self) -> Weights:
        """Slope and intercept of the neurons that are composed away, 0 for those that are kept, by activation."""
        if self.keep != "crossing":
            return {}
        return {
            name: torch.stack([torch.where(h.free, 0.0, t) for t in affine_line(h)])
            for name, h in self.problems.hulls.items()
        }

    def neurons(self, slot: NeuronSlots) -> tuple[Tensor, Tensor]:
        """The kept pre-activations of an activation as `pull` gives rows."""
        # The rows of the matrices, picked: a product with unit rows would cost as much as a sweep.
        keep = slot.real.to(self.problems.rows)
        pending = {}
        for name, matrix in self.blocks.matrices(slot.name).items():
            pending[name] = matrix[slot.index] * keep.reshape(*keep.shape, *[1] * (matrix.dim() - 1))
        return self._walk(pending, keep.shape)

    def pull(self, target: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [E, k, *shape] of a node as coefficients of the input [E, k, d] and of kept values [E, k, K]."""
        return self._walk({target: rows}, rows.shape[:2])

    def values(self, x: Tensor) -> tuple[Weights, Tensor]:
        """Every pre-activation, by activation, and the target, at x [E, *input shape] and 0 in place of kept values."""
        found: Weights = {}

        def activate(node: Node, z: Tensor) -> Tensor:
            found[node.name] = z
            slope, intercept = self.rest.get(node.name, (torch.zeros_like(z),) * 2)
            return torch.addcmul(intercept, slope, z)

        values = carried_on(self.problems.network, x, self.problems.wanted, activate)
        return found, values[self.problems.target]

    def _walk(self, pending: Weights, lead: torch.Size) -> tuple[Tensor, Tensor]:
        network, like = self.problems.network, self.problems.rows
        on_values = like.new_zeros(*lead, self.width)
        slots = {slot.name: slot for slot in self.slots}

        def step(node: Node, a: Tensor) -> Iterable[tuple[str, Tensor]]:
            if node.affine:
                return zip(node.inputs, node.affine.transpose(a), strict=True)
            slot, flat = slots[node.name], flatten_from(a, 2)
            picked = flat if self.keep == "all" else flat.gather(2, slot.index[:, None].expand(-1, lead[1], -1))
            on_values[:, :, slot.span].add_(picked * slot.real[:, None])
            if self.keep != "crossing":
                return ()
            return self._before(node, a * self.rest[node.name][0][:, None])

        on_input = carried_back(network, pending, step).get(network.input)
        if on_input is None:
            on_input = like.new_zeros(1).expand(*lead, *network.input_shape)
        return flatten_from(on_input, 2), on_values

    def _before(self, node: Node, a: Tensor) -> list[tuple[str, Tensor]]:
        """Rows of an activation's pre-activation as rows of what lies behind it, one op or a whole stretch back."""
        if node.name not in self.blocks.dense:
            return [(node.inputs[0], a)]
        flat = flatten_from(a, 2)
        return [
            (name, (flat @ flatten_from(matrix, 1)).reshape(*a.shape[:2], *matrix.shape[1:]))
            for name, matrix in self.blocks.matrices(node.name).items()
        ]
