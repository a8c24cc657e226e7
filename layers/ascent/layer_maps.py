"""The affine maps between a network's activations, as an ascent takes them: matrices of a chain, or the network's ops.

Both walk from layer to layer and leave to `step` what happens there: it is told which layer it is and given the
coefficients of the layer's values, or its pre-activations without their constant part, [R, n] each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from optrelax.layers.problems import Problems
from optrelax.networks.graph import Node
from optrelax.networks.ops import flatten_from
from optrelax.networks.walks import carried_back

Step = Callable[[int, Tensor], Tensor]


class LayerMaps(ABC):
    """Linear maps of a network's layers."""

    __slots__ = ()
    one_matrix: ClassVar[bool]
    """Whether the first layer's pre-activations are one product with the input, which an average of them saves."""

    @abstractmethod
    def back(self, rows: Tensor, step: Step) -> Tensor:
        """Objectives [R, m] pulled back, last layer first: coefficients of the input, [R, d]."""

    @abstractmethod
    def on(self, x: Tensor, step: Step, first: Tensor | None = None) -> Tensor:
        """Inputs [R, d] pushed on, first layer first: what the objectives are taken of, [R, m].

        first: the first layer's pre-activations, where they are known.
        """


@dataclass(frozen=True, slots=True)
class MatrixMaps(LayerMaps):
    """Layers in a chain; objectives are on the last one's values."""

    weights: Sequence[Tensor]
    """[n_t, n_(t-1)], n_(-1) the entries of an input."""
    one_matrix: ClassVar[bool] = True
    _buffers: dict[tuple[bool, int], Tensor] = field(default_factory=dict)

    def back(self, rows: Tensor, step: Step) -> Tensor:
        for t in range(len(self.weights) - 1, -1, -1):
            rows = self._product(step(t, rows), self.weights[t], True, t)
        return rows

    def on(self, x: Tensor, step: Step, first: Tensor | None = None) -> Tensor:
        for t, weight in enumerate(self.weights):
            x = step(t, first if first is not None and t == 0 else self._product(x, weight.mT, False, t))
        return x

    def _product(self, x: Tensor, weight: Tensor, back: bool, t: int) -> Tensor:
        """x @ weight in the room of the last one there: fresh pages cost as much as the product."""
        room = self._buffers.get((back, t))
        if room is None or len(room) != len(x):
            self._buffers[back, t] = room = x.new_empty(len(x), weight.shape[1])
        return torch.mm(x, weight, out=room)


@dataclass(frozen=True, slots=True)
class NetworkMaps(LayerMaps):
    """Any graph, by its own ops: convolutions, sums; objectives are on the target's values."""

    problems: Problems
    names: tuple[str, ...]
    """Of the layers in order."""
    one_matrix: ClassVar[bool] = False

    def constants(self) -> tuple[list[Tensor], Tensor]:
        """Every layer's pre-activations, [n] each, and the target's values [m], where all before them is 0."""
        problems, network = self.problems, self.problems.network
        zero = problems.center.new_zeros
        values, found = {network.input: zero(1, *network.input_shape)}, []
        for node in network.nodes:
            if node.name not in problems.wanted:
                continue
            inputs = [values[name] for name in node.inputs]
            if node.affine:
                values[node.name] = node.affine.apply(*inputs)
            else:
                found.append(inputs[0].flatten().contiguous())
                values[node.name] = zero(1, *node.shape)
        return found, values[problems.target].flatten()

    def back(self, rows: Tensor, step: Step) -> Tensor:
        network, place = self.problems.network, {name: t for t, name in enumerate(self.names)}

        def through(node: Node, a: Tensor) -> Iterable[tuple[str, Tensor]]:
            if node.affine:
                return zip(node.inputs, node.affine.transpose(a), strict=True)
            flat = step(place[node.name], flatten_from(a, 1).contiguous())
            return [(node.inputs[0], flat.reshape(-1, *network.shape_of(node.inputs[0])))]

        shaped = rows.reshape(-1, *network.shape_of(self.problems.target))
        found = carried_back(network, {self.problems.target: shaped}, through)
        a = found.get(network.input, rows.new_zeros(len(rows), *network.input_shape))
        return flatten_from(a, 1).contiguous()

    def on(self, x: Tensor, step: Step, first: Tensor | None = None) -> Tensor:
        problems, network = self.problems, self.problems.network
        values, t = {network.input: x.reshape(-1, *network.input_shape)}, 0
        for node in network.nodes:
            if node.name not in problems.wanted:
                continue
            inputs = [values[name] for name in node.inputs]
            if node.affine:
                values[node.name] = node.affine.linear(*inputs)
            else:
                values[node.name] = step(t, flatten_from(inputs[0], 1).contiguous()).reshape(-1, *node.shape)
                t += 1
        return flatten_from(values[problems.target], 1)
