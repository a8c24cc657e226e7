"""Presolve of network LPs: the neurons that matter kept, everything between them composed into matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optrelax.layers.prices import affine_line
from optrelax.layers.problems import Problems, Weights
from optrelax.ops import Affine, flatten_from
from optrelax.relaxations import identity_rows


@dataclass(frozen=True, slots=True)
class Place:
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
        """The place itself."""
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


@dataclass(frozen=True)
class Composition:
    """The affine maps between input, kept neurons and a target.

    problems: one an example, E of them; with everything kept, any one of them: the maps are the network's own.
    everything: keep every neuron, in one copy for all examples (E = 1); else the crossing ones of each example, padded
    to the greatest number with neurons that read and feed nothing.
    """

    problems: Problems
    everything: bool = False

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Kept neurons in topological order of their activations."""
        found, first = [], 0
        for node in self.problems.network.activations:
            if node.name not in self.problems.hulls:
                continue
            free = flatten_from(self.problems.hulls[node.name].free, 1)
            if self.everything:
                index = torch.arange(free.shape[1], device=free.device)[None]
                real = torch.ones_like(index, dtype=torch.bool)
            else:
                count = int(free.sum(1).max()) if free.numel() else 0
                index = free.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
                real = free.gather(1, index)
            found.append(Place(node.name, index, real, first, first + index.shape[1]))
            first += index.shape[1]
        return tuple(found)

    @cached_property
    def width(self) -> int:
        """K, the number of kept neurons, padding included."""
        return self.places[-1].last if self.places else 0

    @cached_property
    def rest(self) -> Weights:
        """Slope and intercept of the neurons that are composed away, 0 for those that are kept, by activation."""
        if self.everything:
            return {}
        return {
            name: torch.stack([torch.where(h.free, 0.0, t) for t in affine_line(h)])
            for name, h in self.problems.hulls.items()
        }

    def neurons(self, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """The kept pre-activations of a place as `pull` gives rows."""
        network = self.problems.network
        source = network[network[place.name].inputs[0]] if self._is_node(place.name) else None
        like, examples = self.problems.rows, len(place.index)
        if source is None or not isinstance(source.op, Affine):
            name = network[place.name].inputs[0]
            rows = like.new_zeros(examples, place.last - place.first, *network.shape_of(name))
            flatten_from(rows, 2).scatter_(2, place.index[..., None], place.real.to(rows)[..., None])
            return self._walk({name: rows}, like.new_zeros(rows.shape[:2]))
        # The rows of the op's own matrix, picked: a product with unit rows would cost as much as a sweep.
        eye = identity_rows(source.shape, like)[0]
        keep = place.real.to(like)
        pending: Weights = {}
        for name, pulled in zip(source.inputs, source.op.transpose(eye), strict=True):
            picked = pulled[place.index] * keep.reshape(*keep.shape, *[1] * (pulled.dim() - 1))
            pending[name] = pending[name] + picked if name in pending else picked
        b = source.op.bias(like)
        constant = torch.zeros_like(keep)
        if b is not None:
            constant = b.expand(source.shape).reshape(-1)[place.index] * keep
        return self._walk(pending, constant)

    def _is_node(self, activation: str) -> bool:
        network = self.problems.network
        return network[activation].inputs[0] != network.input

    def pull(self, target: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [E, k, *shape] of a node as coefficients of the input [E, k, d] and of kept values, and constants."""
        return self._walk({target: rows}, rows.new_zeros(rows.shape[:2]))

    def _walk(self, pending: Weights, constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network = self.problems.network
        lead = constant.shape
        on_values = constant.new_zeros(*lead, self.width)
        places = {place.name: place for place in self.places}
        for node in reversed(network.nodes):
            if node.name not in pending:
                continue
            a = pending.pop(node.name)
            if isinstance(node.op, Affine):
                b = node.op.bias(a)
                if b is not None:
                    constant = constant + flatten_from(a, 2) @ b.expand(node.shape).reshape(-1)
                pulls = zip(node.inputs, node.op.transpose(a), strict=True)
            else:
                place, flat = places[node.name], flatten_from(a, 2)
                picked = flat if self.everything else flat.gather(2, place.index[:, None].expand(-1, lead[1], -1))
                on_values[:, :, place.span] += picked * place.real[:, None]
                if self.everything:
                    continue
                slope, intercept = self.rest[node.name]
                constant = constant + (flat @ flatten_from(intercept, 1)[..., None])[..., 0]
                pulls = zip(node.inputs, (a * slope[:, None],), strict=True)
            for name, pulled in pulls:
                pending[name] = pending[name] + pulled if name in pending else pulled
        on_input = pending.get(network.input)
        if on_input is None:
            on_input = constant.new_zeros(*lead, *network.input_shape)
        return flatten_from(on_input, 2), on_values, constant
