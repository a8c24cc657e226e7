"""Whose rows are pulled back: neurons of a target, each with its example and its place in a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Neurons:
    """Rows of a program: where each stands, and which of the shared rows before the first activations it is."""

    place: Tensor
    """Example and place in the grid, [n, 3], int64."""
    which: Tensor
    """[n], int64: into the flat rows given to `lower_bounds`."""
    together: int = 1
    """So many rows after each other stand in one place, from the first on."""
    entries: Tensor | None = None
    """Entries of the target that the shared rows read, up and down; None: something else."""

    @property
    def count(self) -> int:
        """n."""
        return self.which.shape[0]

    @property
    def hidden(self) -> bool:
        """Whether these are unit rows of neurons."""
        return self.entries is not None

    def part(self, some: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Place and which of some rows."""
        return self.place[some], self.which[some]

    def select(self, rows: Tensor) -> Neurons:
        """Some of them, [k] or a mask [n]."""
        return Neurons(self.place[rows], self.which[rows], entries=self.entries)

    def of_each(self, constant: Tensor) -> Tensor:
        """A number a shared row, [*, k], as one a neuron: [n]."""
        return constant.reshape(-1)[self.which]


@dataclass(frozen=True, slots=True)
class EveryNeuron:
    """All of them: example, place, shared row; nothing is listed beforehand."""

    batch: int
    places: Tensor
    """[places, 2], int64."""
    k: int
    """Shared rows."""
    hidden: ClassVar[bool] = True

    @property
    def together(self) -> int:
        """So many rows after each other stand in one place."""
        return self.k

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.batch * self.places.shape[0] * self.k

    def part(self, some: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Place and which of some rows."""
        if isinstance(some, slice):
            some = torch.arange(some.start, some.stop, device=self.places.device)
        window, which = some // self.k, some % self.k
        example, place = window // self.places.shape[0], window % self.places.shape[0]
        return torch.cat([example[:, None], self.places[place]], 1), which

    def of_each(self, constant: Tensor) -> Tensor:
        """A number a shared row, [*, k], as one a neuron: [n]."""
        return constant.reshape(1, self.k).expand(self.batch * self.places.shape[0], -1).reshape(-1)


@dataclass(frozen=True, slots=True)
class PickedNeurons:
    """Some of others, rows [n]; they are looked up as they are asked for."""

    of: Neurons | EveryNeuron
    rows: Tensor
    together: ClassVar[int] = 1

    @property
    def count(self) -> int:
        """n."""
        return self.rows.shape[0]

    def part(self, some: slice) -> tuple[Tensor, Tensor]:
        """Place and which of some rows."""
        return self.of.part(self.rows[some])


def rows_of_examples(given: int, k: int, batch: int, device: torch.device) -> Neurons:
    """Rows [given, k, ...] in their target's own shape, for every example; given: the batch, or 1 for all."""
    place = torch.zeros(batch * k, 3, dtype=torch.int64, device=device)
    place[:, 0] = torch.arange(batch, device=device).repeat_interleave(k)
    return Neurons(place, torch.arange(given * k, device=device).repeat(batch if given == 1 else 1), k)
