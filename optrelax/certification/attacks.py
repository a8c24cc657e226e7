"""Attacks: points of a region at which a margin is as small as a search can make it.

Written here, as the attack libraries (foolbox, torchattacks, adversarial-library) take a radius and the pixel range
[0, 1]: none projects on a general region, none descends on rows of any
specification, and none draws each example's starts by itself, so that results do not depend on batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.analysis import Net, prepare, prepare_specification
from optrelax.checks import require_range
from optrelax.joined_specifications import Spec
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.specifications import Specification

__all__ = ["PGD", "Attack", "AttackResult", "Hunt", "find_counterexamples", "require_whole"]


def require_whole(attack: Attack, **least: int) -> None:
    """ValueError where an option of an attack is less than it may be."""
    for name, number in least.items():
        require_range(type(attack).__name__, f"at least {number}", **{name: getattr(attack, name)})


@dataclass(frozen=True, slots=True, eq=False)
class AttackResult:
    """The worst point found of each example, inside its region with no tolerance, and what the network says there."""

    points: Tensor
    """[*batch, *input_shape]."""
    margins: Tensor
    """Values of every row at the point, evaluated once more from the point: [*batch, k]."""

    @property
    def worst(self) -> Tensor:
        """Smallest margin at the point, [*batch]; NaN where the network gives NaN."""
        return self.margins.amin(-1)

    @property
    def found(self) -> Tensor:
        """Where a margin is <= 0: [*batch] of bool."""
        return (self.margins <= 0).any(-1)


class Attack(ABC):
    """A search for the smallest margin over regions; what it finds is replayed, whatever it did."""

    __slots__ = ()

    @abstractmethod
    def run(self, hunt: Hunt) -> None:
        """Try points by `hunt.keep`; examples outside of `hunt.alive()` need no more."""

    def search(
        self,
        network: Network,
        region: Region,
        rows: Tensor | Specification,
        keys: Sequence[int] | None = None,
    ) -> AttackResult:
        """Attack a flat batch; an example leaves it as soon as one of its margins is <= 0.

        rows [batch or 1, k, *output_shape], or a flat specification, whose margins are its groups' greatest values.
        keys: one number an example, which with the attack's seed decides its random starts; default the position in
        the batch.
        """
        if keys is not None and len(keys) != region.shape[0]:
            name = type(self).__name__
            raise ValueError(f"{name}: keys has {len(keys)} entries for a batch of {region.shape[0]}")
        names = list(keys) if keys is not None else list(range(region.shape[0]))
        hunt = Hunt(network, region, rows, names)
        self.run(hunt)
        return hunt.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class PGD(Attack):
    """Projected steepest descent on margins: over a box by signs of gradients, over a ball in its norm.

    Args:
        restarts: starts an example; the first is the centre of the region, the others are random in it.
        steps: gradients a start.
        step: first step in radii of the region (see `Region.direction`); it falls linearly to 0.
        targets: how many margins are descended apart from each start, the smallest at the centre first (one descent
            each); 0: one descent that follows whichever margin is smallest, which finds less for the same work.
        seed: of the random starts; example i draws from a generator of its own, so results do not depend on batches.
        samples: uniform points that a random start is the best of; many help where inputs are few.

    Raises:
        ValueError: for an option out of range.

    Source: Madry et al. 2018; margins as loss: Carlini and Wagner 2017.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> report = ox.certify(net, (x, net(x).argmax(1)), eps=0.05, attack=ox.PGD(restarts=1, steps=10))
        >>> report.attacked
        1.0
    """

    restarts: int = 2
    steps: int = 20
    step: float = 1.0
    targets: int = 3
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        require_whole(self, restarts=1, steps=0, targets=0, samples=1, seed=0)
        require_range("PGD", "positive and finite, in radii of the region", step=self.step)

    def run(self, hunt: Hunt) -> None:
        """Descend from each start, once a target."""
        for restart, alive, target in hunt.starts(self.restarts, self.targets):
            # Every target of a restart begins at one point: they then differ in direction alone.
            self._descend(hunt, self._start(hunt, alive, restart), alive, target)

    def _start(self, hunt: Hunt, alive: Tensor, restart: int) -> Tensor:
        if restart == 0:
            return hunt.region.center[alive]
        starts = hunt.uniform(alive, self.samples, self.seed, restart)  # [samples, n, *input_shape]
        if self.samples == 1:
            return starts[0]
        with torch.no_grad():
            lots = [hunt.margins(x.flatten(0, 1), alive.repeat(len(x))).amin(1) for x in starts.split(100)]
        worst = torch.cat(lots).reshape(self.samples, -1)
        return starts[worst.argmin(0), torch.arange(len(alive), device=worst.device)]

    def _descend(self, hunt: Hunt, x: Tensor, alive: Tensor, target: Tensor | None) -> None:
        """One start of the examples `alive`: x [their number, *input_shape]."""
        region = hunt.region.select(alive)
        x = region.project(x)
        for i in range(self.steps + 1):
            last = i == self.steps
            with torch.set_grad_enabled(not last):
                x.requires_grad_(not last)
                margins = hunt.margins(x, alive)
                loss = (margins.amin(1) if target is None else margins.gather(1, target[:, None])).sum()
            worst = margins.detach().amin(1)
            hunt.keep(x.detach(), worst, alive)
            if last:
                return
            (gradient,) = torch.autograd.grad(loss, x)
            x = x.detach().add(region.direction(gradient), alpha=self.step * (1 - i / self.steps))
            going = ~(worst <= 0)
            if not bool(going.all()):
                x, alive, region = x[going], alive[going], region.select(going)
                target = target if target is None else target[going]
                if alive.numel() == 0:
                    return
            x = region.project(x)


def generator(*numbers: int) -> torch.Generator:
    """A generator that several numbers decide: seeded by a fixed polynomial of 63 bits, not Python's hash."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


class Hunt:
    """The best point of every example so far."""

    def __init__(
        self,
        network: Network,
        region: Region,
        rows: Tensor | Specification,
        keys: list[int],
    ) -> None:
        if isinstance(rows, Tensor):
            rows = rows.detach().reshape(*rows.shape[:2], network.outputs)
            rows = Specification(rows[0] if len(rows) == 1 else rows)
        self.network, self.spec, self.keys = network, rows, keys
        self.region = region.detach()
        self.points = self.region.project(self.region.center)
        with torch.no_grad():
            margins = self.margins(self.points, slice(None))
        self.best = margins.amin(1)
        self.order = margins.argsort(1)  # rows of each example, the smallest margin at the centre first: [batch, k]

    def alive(self) -> Tensor:
        """Indices of the examples without a counterexample; NaN counts as without."""
        return (~(self.best <= 0)).nonzero()[:, 0]

    def starts(self, restarts: int, targets: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Each restart, once a target: its number, the examples that are alive then, and which of their margins counts.

        targets: so many margins, the smallest at the centre first; 0: all together, None in place of a margin.
        """
        order = self.order[:, :targets]
        for restart in range(restarts):
            for rank in range(max(1, order.shape[1])):
                alive = self.alive()
                if alive.numel() == 0:
                    return
                yield restart, alive, order[alive, rank] if targets else None

    def uniform(self, alive: Tensor, count: int, *numbers: int) -> Tensor:
        """Random points of the examples' regions, each example's from a generator of its own, which its key and the
        numbers (a seed first) decide: [count, n, *input_shape].
        """
        seed, *others = numbers
        parts = [
            self.region.select(slice(i, i + 1)).sample(count, generator(seed, self.keys[i], *others), torch.float64)
            for i in alive.tolist()
        ]
        return torch.cat(parts, 1) if parts else self.region.like.new_zeros(count, *self.region.shape)[:, :0]

    def margins(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """Every margin at x: [n, k]."""
        output = self.network(x).reshape(len(x), self.network.outputs)
        spec = self.spec.select(index)
        return spec.worst(spec.values(output))

    def keep(self, x: Tensor, worst: Tensor, alive: Tensor) -> None:
        """Points of the regions of `alive` and their smallest margins: what is better than before stays."""
        better = worst < self.best[alive]  # never where worst is NaN, as it is where x is
        chosen = alive[better]
        self.best[chosen] = worst[better]
        self.points[chosen] = x[better]

    def result(self) -> AttackResult:
        """The points, checked and replayed."""
        outside = ~self.region.contains(self.points)
        if bool(outside.any()):
            raise RuntimeError(f"attack: {int(outside.sum())} of {outside.numel()} points left their region")
        with torch.no_grad():
            return AttackResult(self.points, self.margins(self.points, slice(None)))


def find_counterexamples(net: Net, region: Region, spec: Spec, attack: Attack = PGD()) -> AttackResult:
    """Search each region for a point at which a row, or a group's greatest row, of the specification is <= 0.

    spec [*batch, k, outputs] or [k, outputs], a `Specification` or several by name.  Every returned point lies
    in its region, with no tolerance.
    Raises UnsupportedOpError, or ValueError where shapes, types or devices do not fit.
    """
    network, flat, batch = prepare(net, region)
    found = attack.search(network, flat, prepare_specification(network, spec, flat, batch))
    return AttackResult(
        found.points.reshape(*batch, *network.input_shape), found.margins.reshape(*batch, found.margins.shape[-1])
    )
