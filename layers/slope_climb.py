"""The climb of alpha-CROWN: Adam on every parameter at once, of each example until it stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.layers.ascent.schedule import FIRST, SECOND
from optrelax.layers.slope_search import SlopeSearch
from optrelax.networks.ops import flatten_from
from optrelax.relaxations import Preactivation

if TYPE_CHECKING:
    from optrelax.layers.alpha_crown import AlphaCrown


def ascend(search: SlopeSearch, options: AlphaCrown) -> None:
    """Climb; of each example the best parameters met are kept."""
    if options.iterations and any(t.parameters for t in search.targets.values()):
        Climb(search, options).run()
    for target in search.targets.values():
        for p in target.parameters:
            p.value = p.best


class Climb:
    """The examples that are still moving, and what they reached."""

    def __init__(self, search: SlopeSearch, options: AlphaCrown) -> None:
        self.whole, self.options = search, options
        self.search, _ = search.select(
            torch.ones(search.region.shape[0], dtype=torch.bool, device=search.region.device)
        )
        self.search.searching = True
        self.rows = {name: torch.arange(len(t.example), device=t.example.device) for name, t in search.targets.items()}
        self.start = self.top = search.region.like.new_full((search.region.shape[0],), -torch.inf)
        self.waited = torch.zeros_like(self.top)

    def run(self) -> None:
        """All iterations, or until no example gains from them."""
        for n in range(self.options.iterations + 1):
            done = self._step(n)
            if bool(done.all()):
                break
            if int(done.sum()) * 5 >= len(done):  # copies cost as much as an iteration of a few
                self._leave(done)
        self._store()

    def _step(self, n: int) -> Tensor:
        """Bounds at the parameters of now, and a step; which examples are done."""
        options, search = self.options, self.search
        moving = [(t, p) for t in search.targets.values() for p in t.parameters]
        last = n == options.iterations
        with torch.set_grad_enabled(not last):
            leaves = [p.value.requires_grad_(not last) for _, p in moving]
            found, lower = search.evaluate(search.region, search.given, search.rows, False)
            score = self._score(found, lower)
            total = score.sum()
        grads: Sequence[Tensor | None] = ()
        if total.requires_grad:
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        better, done = self._judge(score.detach(), None if lower is None else lower.detach(), n)
        for (target, p), leaf in zip(moving, leaves, strict=True):
            p.value = leaf.detach()
            p.keep(better[target.example])
        if not grads:
            return torch.ones_like(done)
        step = options.step * options.decay**n / (1 - FIRST ** (n + 1))
        for (_, p), grad in zip(moving, grads, strict=True):
            if grad is not None:
                p.climb(grad, step, 1 / (1 - SECOND ** (n + 1)))
        return done

    def _judge(self, score: Tensor, lower: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """Which examples are better than ever, and which need no more."""
        options = self.options
        if n == 0:
            self.start = self.top = score
            return torch.ones_like(score, dtype=torch.bool), self._decided(lower, score)
        better = score > self.top
        gain = torch.where(better, score - self.top, 0.0)
        self.top = torch.where(better, score, self.top)
        # A bound that was infinite and is not has gained.
        idle = gain <= options.tol * (self.top - self.start)
        self.waited = torch.where(idle, self.waited + 1, 0.0)
        return better, self._decided(lower, score) | (self.waited >= options.patience)

    def _decided(self, lower: Tensor | None, score: Tensor) -> Tensor:
        if lower is None or self.options.threshold is None:
            return torch.zeros_like(score, dtype=torch.bool)
        return (lower > self.options.threshold).all(1)

    def _leave(self, done: Tensor) -> None:
        """Only the others go on."""
        self._store()
        self.search, rows = self.search.select(~done)
        self.rows = {name: own[rows[name]] for name, own in self.rows.items()}
        self.start, self.top, self.waited = (t[~done] for t in (self.start, self.top, self.waited))

    def _store(self) -> None:
        """What was reached, in the whole search."""
        for name, target in self.search.targets.items():
            for mine, p in zip(self.whole.targets[name].parameters, target.parameters, strict=True):
                mine.best = mine.best.index_copy(0, self.rows[name], p.best)

    def _score(self, found: Preactivation, lower: Tensor | None) -> Tensor:
        """What is maximised, an example: its lower bounds, or without rows its tightness everywhere."""
        if lower is not None:
            return lower.sum(1)
        widths = [flatten_from(found[name].width, 1).sum(1) for name in self.search.targets]
        return -torch.stack(widths).sum(0)
