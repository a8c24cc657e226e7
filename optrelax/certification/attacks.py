"""Attacks: points of a region at which a margin is as small as gradient descent can make it.

Written here, as the attack libraries take one radius and one pixel range a call: none projects on a general box
with its own ends in every coordinate, which is what a region is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.analysis import Net, prepare, prepare_rows
from optrelax.networks.graph import Network
from optrelax.regions import InputBox

__all__ = ["PGD", "AttackResult", "find_counterexamples"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PGD:
    """Projected sign-gradient descent on margins, over any box.

    restarts: starts an example; the first is the centre of the box, the others are uniform in it.
    steps: gradients a start.  step: first step in radii of the box, coordinate by coordinate; it falls linearly to 0.
    targets: how many margins are descended apart from each start, the smallest at the centre first (one descent
    each); 0: one descent that follows whichever margin is smallest, which finds less for the same work.
    samples: uniform points that a random start is the best of; many help where inputs are few.
    seed: of the random starts; example i draws from a generator of its own, so results do not depend on batches.
    Source: Madry et al. 2018; margins as loss: Carlini and Wagner 2017.
    """

    restarts: int = 2
    steps: int = 20
    step: float = 1.0
    targets: int = 3
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise ValueError(f"PGD: restarts must be at least 1, got {self.restarts}")
        if self.steps < 0:
            raise ValueError(f"PGD: steps must be at least 0, got {self.steps}")
        if not 0 < self.step < float("inf"):
            raise ValueError(f"PGD: step must be positive, in radii of the box, got {self.step}")
        if self.targets < 0:
            raise ValueError(f"PGD: targets must be at least 0, got {self.targets}")
        if self.samples < 1:
            raise ValueError(f"PGD: samples must be at least 1, got {self.samples}")
        if self.seed < 0:
            raise ValueError(f"PGD: seed must be at least 0, got {self.seed}")

    def search(
        self,
        network: Network,
        region: InputBox,
        rows: Tensor,
        keys: Sequence[int] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> AttackResult:
        """Attack a flat batch; an example leaves it as soon as one of its margins is <= 0.

        rows [batch or 1, k, *output_shape].  keys: one number an example, which with `seed` decides its random
        starts; default the position in the batch.
        combine: what the margins are of the rows' values, [n, k] -> [n, any]; default those values.
        """
        if keys is not None and len(keys) != region.shape[0]:
            raise ValueError(f"PGD: keys has {len(keys)} entries for a batch of {region.shape[0]}")
        names = list(keys) if keys is not None else list(range(region.shape[0]))
        descent = _Descent(network, region, rows, names, combine)
        order = descent.order[:, : self.targets]
        for restart in range(self.restarts):
            for rank in range(max(1, order.shape[1])):
                alive = descent.alive()
                if alive.numel() == 0:
                    return descent.result()
                # Every target of a restart begins at one point: they then differ in direction alone.
                start = self._start(descent, alive, restart)
                target = order[alive, rank] if self.targets else None
                descent.run(start, alive, target, self.steps, self.step)
        return descent.result()

    def _start(self, descent: _Descent, alive: Tensor, restart: int) -> Tensor:
        box = descent.region.select(alive)
        if restart == 0:
            return box.center
        parts = []
        for i in alive.tolist():
            generator = torch.Generator().manual_seed(_mixed(self.seed, descent.keys[i], restart))
            parts.append(torch.rand((self.samples, *box.shape[1:]), generator=generator, dtype=torch.float64))
        uniform = torch.stack(parts, 1).to(box.lower)
        starts = box.lower + uniform * (box.upper - box.lower)  # [samples, n, *input_shape]
        if self.samples == 1:
            return starts[0]
        with torch.no_grad():
            lots = [descent.margins(x.flatten(0, 1), alive.repeat(len(x))).amin(1) for x in starts.split(100)]
        worst = torch.cat(lots).reshape(self.samples, -1)
        return starts[worst.argmin(0), torch.arange(len(alive), device=worst.device)]


def _mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers: a fixed polynomial, not Python's hash."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return mixed


class _Descent:
    """The best point of every example so far."""

    def __init__(
        self,
        network: Network,
        region: InputBox,
        rows: Tensor,
        keys: list[int],
        combine: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.network, self.rows, self.keys, self.combine = network, rows.detach(), keys, combine
        self.region = InputBox(region.lower.detach(), region.upper.detach())
        self.points = self._clamped(self.region.center, self.region)
        with torch.no_grad():
            margins = self.margins(self.points, slice(None))
        self.best = margins.amin(1)
        self.order = margins.argsort(1)  # rows of each example, the smallest margin at the centre first: [batch, k]

    def alive(self) -> Tensor:
        """Indices of the examples without a counterexample; NaN counts as without."""
        return (~(self.best <= 0)).nonzero()[:, 0]

    def run(self, x: Tensor, alive: Tensor, target: Tensor | None, steps: int, step: float) -> None:
        """One start of the examples `alive`: x [their number, *input_shape]."""
        box = self.region.select(alive)
        radius = box.radius
        x = self._clamped(x, box)
        for i in range(steps + 1):
            last = i == steps
            with torch.set_grad_enabled(not last):
                x.requires_grad_(not last)
                margins = self.margins(x, alive)
                loss = (margins.amin(1) if target is None else margins.gather(1, target[:, None])).sum()
            worst = margins.detach().amin(1)
            self._keep(x.detach(), worst, alive)
            if last:
                return
            (gradient,) = torch.autograd.grad(loss, x)
            x = torch.addcmul(x.detach(), radius, gradient.sign_(), value=-step * (1 - i / steps))
            going = ~(worst <= 0)
            if not bool(going.all()):
                x, alive, box, radius = x[going], alive[going], box.select(going), radius[going]
                target = target if target is None else target[going]
                if alive.numel() == 0:
                    return
            x = self._clamped(x, box)

    def margins(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """Every margin at x: [n, k]."""
        values = self._values(x, index)
        return values if self.combine is None else self.combine(values)

    def _values(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """Value of every row at x: [n, k]."""
        output = self.network(x).reshape(len(x), self.network.outputs)
        rows = self.rows.reshape(*self.rows.shape[:2], self.network.outputs)
        if rows.shape[0] == 1:
            return output @ rows[0].mT
        return (rows[index] @ output[..., None])[..., 0]

    def _clamped(self, x: Tensor, box: InputBox) -> Tensor:
        return x.clamp(box.lower, box.upper)

    def _keep(self, x: Tensor, worst: Tensor, alive: Tensor) -> None:
        better = worst < self.best[alive]  # never where worst is NaN, as it is where x is
        chosen = alive[better]
        self.best[chosen] = worst[better]
        self.points[chosen] = x[better]

    def result(self) -> AttackResult:
        """The points, checked and replayed."""
        outside = ~self.region.contains(self.points)
        if bool(outside.any()):
            raise RuntimeError(f"PGD: {int(outside.sum())} of {outside.numel()} points left their region")
        with torch.no_grad():
            return AttackResult(self.points, self.margins(self.points, slice(None)))


def find_counterexamples(net: Net, region: InputBox, spec: Tensor, attack: PGD = PGD()) -> AttackResult:
    """Search each region for a point at which a row of the specification is <= 0.

    spec [*batch, k, outputs] or [k, outputs].  Every returned point lies in its region, with no tolerance.
    Raises UnsupportedOpError, or ValueError where shapes, types or devices do not fit.
    """
    network, flat, batch = prepare(net, region)
    found = attack.search(network, flat, prepare_rows(network, spec, flat, batch))
    return AttackResult(
        found.points.reshape(*batch, *network.input_shape), found.margins.reshape(*batch, found.margins.shape[-1])
    )
