"""Auto-PGD: steepest ascent with momentum that chooses its own steps.

Source: Croce and Hein 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.certification.attacks import Attack, Hunt, require_whole
from optrelax.checks import require_choice
from optrelax.layers.batched import Batched
from optrelax.regions import Region

__all__ = ["APGD"]


@dataclass(frozen=True, kw_only=True, slots=True)
class APGD(Attack):
    """Auto-PGD: steepest ascent (over a box by signs of gradients) with momentum that chooses its own steps.

    A step begins at the diameter of the region and is halved, and the ascent set back to the best point so far, where
    too few steps of a stage went up, or none went higher.

    Args:
        loss: "ce", cross-entropy of the margins; "dlr", the margin over the spread of the outputs, which vanishes
            nowhere that cross-entropy saturates (with fewer than three rows, no spread is left: the margin itself).
        targets: how many margins are descended apart, the smallest at the centre first; 0: all in one loss.
        restarts: random starts, each the first of all targets.
        steps: gradients a start.
        seed: of the starts; example i draws from a generator of its own.

    Raises:
        ValueError: for an option out of range.

    Source: Croce and Hein 2020, algorithm 1 and sections 4 and 5.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> report = ox.certify(net, (x, net(x).argmax(1)), eps=0.05, attack=ox.APGD(loss="dlr", steps=10))
        >>> report.attacked
        1.0
    """

    loss: str = "ce"
    targets: int = 0
    restarts: int = 1
    steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("APGD", "loss", self.loss, "ce", "dlr")
        require_whole(self, targets=0, restarts=1, steps=1, seed=0)

    def run(self, hunt: Hunt) -> None:
        """Ascend from each start, once a target."""
        for restart, alive, target in hunt.starts(self.restarts, self.targets):
            start = hunt.uniform(alive, 1, self.seed, restart, 1 + ("ce", "dlr").index(self.loss))[0]
            _Ascent(self, hunt, alive, start, target).run()


@dataclass(frozen=True, slots=True)
class _Visit(Batched):
    """Points [n, *input_shape] of examples, with the loss [n] and its gradient there."""

    x: Tensor
    value: Tensor
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class _Asked(Batched):
    """The examples of an ascent: their places in the hunt [n], their regions, and the margin of each that counts."""

    alive: Tensor
    region: Region
    target: Tensor | None


class _Ascent:
    """One start of APGD for the examples `alive`."""

    def __init__(self, attack: APGD, hunt: Hunt, alive: Tensor, x: Tensor, target: Tensor | None) -> None:
        self.attack, self.hunt = attack, hunt
        self.asked = _Asked(alive, hunt.region.select(alive), target)
        self.step = x.new_full(x.shape[:1], 2.0)  # in radii of the region
        self.halved = torch.ones_like(alive, dtype=torch.bool)
        self.now = self.best = self._look(self.asked.region.project(x))
        self.last = self.now.x
        self._begin_stage()

    def run(self) -> None:
        """All steps, in stages that grow shorter."""
        done = 0
        for length in _stages(self.attack.steps):
            for _ in range(length):
                self._move(0.75 if done else 1.0)
                done += 1
            if not self._end_stage():
                return

    def _move(self, share: float) -> None:
        """A step, of which the momentum keeps 1 - share."""
        x, project = self.now.x, self.asked.region.project
        step = self.step.reshape(-1, *[1] * (x.dim() - 1))
        ahead = project(x + step * self.asked.region.direction(-self.now.gradient))
        before, self.now = self.now, self._look(project(x + share * (ahead - x) + (1 - share) * (x - self.last)))
        self.last = x
        self.rises += self.now.value > before.value
        self.length += 1
        self.best = self.now.where(self.now.value > self.best.value, self.best)

    def _begin_stage(self) -> None:
        self.rises, self.length, self.stage_value = torch.zeros_like(self.asked.alive), 0, self.best.value

    def _end_stage(self) -> bool:
        """Halve steps that do not climb, let go of examples that are found; whether any are left."""
        stuck = self.rises <= 0.75 * self.length
        stuck |= ~self.halved & (self.best.value <= self.stage_value)
        self.now = self.best.where(stuck, self.now)
        self.step, self.halved = torch.where(stuck, self.step / 2, self.step), stuck
        going = ~(self.hunt.best[self.asked.alive] <= 0)
        if not bool(going.all()):
            self.asked = self.asked.select(going)
            self.now, self.best = self.now.select(going), self.best.select(going)
            self.last, self.step, self.halved = self.last[going], self.step[going], self.halved[going]
        self._begin_stage()
        return self.asked.alive.numel() > 0

    def _look(self, at: Tensor) -> _Visit:
        """The loss and its gradient at points; the margins there are kept."""
        with torch.enable_grad():
            x = at.detach().requires_grad_()
            margins = self.hunt.margins(x, self.asked.alive)
            value = _loss(self.attack.loss, margins, self.asked.target)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        self.hunt.keep(at, margins.detach().amin(1), self.asked.alive)
        return _Visit(at, value.detach(), gradient)


def _stages(steps: int) -> Iterator[int]:
    """Lengths of the stages: 22 % of the steps, then each 3 % shorter, none under 6 %."""
    length, least, shorter = (max(1, int(share * steps)) for share in (0.22, 0.06, 0.03))
    while steps > 0:
        yield min(length, steps)
        steps -= length
        length = max(length - shorter, least)


def _loss(loss: str, margins: Tensor, target: Tensor | None) -> Tensor:
    """What an attack makes large, of margins [n, k]: [n]."""
    worst = margins.amin(1) if target is None else margins.gather(1, target[:, None])[:, 0]
    outputs = torch.cat([torch.zeros_like(margins[:, :1]), -margins], 1)  # those of a classifier, less the label's
    if loss == "ce":
        return outputs.logsumexp(1) if target is None else -worst - outputs.logsumexp(1)
    if margins.shape[1] < 2:
        return -worst
    top = outputs.topk(min(4, outputs.shape[1]), dim=1).values
    spread = top[:, 0] - (top[:, 2] if target is None or top.shape[1] < 4 else (top[:, 2] + top[:, 3]) / 2)
    return -worst / torch.where(spread > 0, spread, 1.0)
