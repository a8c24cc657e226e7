"""A batch of triangle LPs of one network, one row each, and their dual and primal points.

Problem r: minimise rows[r] . value(target) over the input region and all hidden values, subject to the hull of every
activation. Dual point: weights alpha, beta in [0, 1] that mix the two hull lines below and above; the backward sweep
with coefficients A > 0 on the mixed lower line and A < 0 on the mixed upper line is a lower bound for every choice
(Wong and Kolter 2018; Salman et al. 2019). Primal point: an input x and, for every activation, the fraction tau of
the way from the hull's floor to its ceiling; the forward sweep through them is feasible for every x in the region and
tau in [0, 1], provided the pre-activation bounds are implied by the LP on the layers before. Bounds that the LP does
not imply are constraints of their own: they get multipliers in the dual point (`ends`), and a primal point counts
only where it keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from optrelax.layers.batched import Batched, Change
from optrelax.layers.hulls import HullLines
from optrelax.networks.graph import Network
from optrelax.regions import InputBox, Region

Weights = dict[str, Tensor]  # activation or product -> [R, *shape]


@dataclass(frozen=True)
class Problems(Batched):
    """R linear programs of one network that share nothing but its weights."""

    network: Network
    target: str
    rows: Tensor
    """Objective on the target's value, [R, *target shape]."""
    region: Region
    """Of every problem's inputs, [R, *input shape]."""
    hulls: Mapping[str, HullLines]
    example: Tensor | None = None
    """Which problems share box and hulls, [R]; None: nobody says."""

    @property
    def count(self) -> int:
        """R."""
        return self.rows.shape[0]

    @property
    def boxed(self) -> bool:
        """Whether the region is a box, which is what compiled ascents take."""
        return self.region.as_box is not None

    @cached_property
    def box(self) -> InputBox:
        """The box around the region."""
        return self.region.box()

    @cached_property
    def center(self) -> Tensor:
        """Midpoint of the box."""
        return self.box.center

    @cached_property
    def radius(self) -> Tensor:
        """Half width of the box."""
        return self.box.radius

    @cached_property
    def wanted(self) -> frozenset[str]:
        """Nodes that the target depends on."""
        return self.network.ancestors(self.target)

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Nodes that some activation or product behind the target depends on, these included."""
        found: set[str] = set()
        for node in self.network.relaxed:
            if node.name in self.wanted:
                found |= self.network.ancestors(node.name)
        return frozenset(found)


@dataclass(frozen=True, slots=True)
class DualPoint(Batched):
    """Mixing weights of every activation: alpha below, beta above (only where the hull has two lines above)."""

    alpha: Weights
    beta: Weights
    ends: Weights = field(default_factory=dict)
    """Signed multipliers of the pre-activation bounds: positive of z <= u, negative of z >= l; missing: 0."""

    def combine(self, change: Change, *others: DualPoint) -> DualPoint:
        """As `Batched.combine`; multipliers that some of the points lack are 0 there."""
        names = {name for point in (self, *others) for name in point.ends}
        mine, *theirs = (point._with_ends(names) for point in (self, *others))
        return Batched.combine(mine, change, *theirs)

    def _with_ends(self, names: Set[str]) -> DualPoint:
        if names == self.ends.keys():
            return self
        return replace(self, ends={n: self.ends.get(n, torch.zeros_like(self.alpha[n])) for n in sorted(names)})


@dataclass(frozen=True, slots=True)
class PrimalPoint(Batched):
    """An input of the region [R, *input shape] and the fraction tau [R, *shape] of every activation."""

    x: Tensor
    tau: Weights
