"""Attacks of AutoAttack's strength, over any region and any rows.

Source: Croce and Hein 2020 (APGD, the DLR loss, the ensemble); Andriushchenko et al. 2020 (Square). Of the ensemble,
FAB is left out: it seeks the smallest perturbation, where a region is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.certification.attacks import PGD, Attack, Hunt, generator, require_whole
from optrelax.certification.auto_pgd import APGD
from optrelax.checks import require_range
from optrelax.regions import Region

__all__ = ["Square", "StrongAttack", "attack_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Square(Attack):
    """Random search without gradients: squares of pixels set to an end of the box, kept where the margin falls.

    Finds what gradients hide. Over a region that is no box, points of the box around it are projected into it. Inputs
    without height and width are searched by runs of neighbouring entries.

    Args:
        queries: points tried.
        share: of the pixels, in the first squares; they shrink on a fixed schedule.
        seed: example i draws from a generator of its own.

    Raises:
        ValueError: for an option out of range.

    Source: Andriushchenko et al. 2020, the attack in the maximum norm.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> report = ox.certify(net, (x, net(x).argmax(1)), eps=0.05, attack=ox.Square(queries=50))
        >>> report.attacked
        1.0
    """

    queries: int = 5000
    share: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self, queries=1, seed=0)
        require_range("Square", "in (0, 1]", share=self.share)

    def run(self, hunt: Hunt) -> None:
        """All queries; examples that are found leave."""
        alive = hunt.alive()
        if alive.numel() == 0:
            return
        shape = hunt.region.shape[1:]
        c, h, w = shape if len(shape) == 3 else (1, 1, shape.numel())
        # Stripes, one number a column and channel; then a corner and a sign a channel for each query.
        drawn = [generator(self.seed, hunt.keys[i], 3) for i in alive.tolist()]
        stripes = torch.stack([torch.rand(c, 1, w, generator=g, device="cpu") for g in drawn]).to(hunt.points.device)
        numbers = torch.stack([torch.rand(self.queries, 2 + c, generator=g, device="cpu") for g in drawn]).to(
            hunt.points.device
        )
        region = hunt.region.select(alive)
        box = region.box()
        lower, upper = (end.reshape(-1, c, h, w) for end in (box.lower, box.upper))
        x = torch.where(stripes < 0.5, lower, upper)
        worst = self._margin(hunt, region, x, alive)
        for query in range(1, self.queries):
            if bool((worst <= 0).any()):
                going = ~(worst <= 0)
                if not bool(going.any()):
                    return
                alive, x, worst, numbers = alive[going], x[going], worst[going], numbers[going]
                lower, upper, region = lower[going], upper[going], region.select(going)
            square = _squares(numbers[:, query, :2], self._share(query), h, w)
            signs = numbers[:, query, 2:, None, None] < 0.5
            new = torch.where(square, torch.where(signs, lower, upper), x)
            margin = self._margin(hunt, region, new, alive)
            better = margin < worst
            worst, x = torch.where(better, margin, worst), torch.where(better[:, None, None, None], new, x)

    def _share(self, query: int) -> float:
        """The share of pixels at a query; the schedule is that of 10,000."""
        at = query * 10_000 // self.queries
        return self.share / 2 ** sum(at > limit for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))

    def _margin(self, hunt: Hunt, region: Region, x: Tensor, alive: Tensor) -> Tensor:
        x = region.project(x.reshape(region.shape))
        with torch.no_grad():
            worst = hunt.margins(x, alive).amin(1)
        hunt.keep(x, worst, alive)
        return worst


def _squares(corners: Tensor, share: float, h: int, w: int) -> Tensor:
    """Squares of so many of h x w pixels, at corners [n, 2] in [0, 1): [n, 1, h, w] of bool."""
    height = min(h, max(1, round((share * h * w) ** 0.5)))
    width = min(w, max(1, round(share * h * w / height)))
    top = (corners[:, 0] * (h - height + 1)).floor()[:, None]
    left = (corners[:, 1] * (w - width + 1)).floor()[:, None]
    i, j = torch.arange(h, device=corners.device), torch.arange(w, device=corners.device)
    rows, columns = (i >= top) & (i < top + height), (j >= left) & (j < left + width)
    return rows[:, None, :, None] & columns[:, None, None, :]


@dataclass(frozen=True, kw_only=True, slots=True)
class StrongAttack(Attack):
    """PGD, APGD on cross-entropy, APGD on the DLR loss once a target, and Square: each on what those before left.

    The ensemble of AutoAttack without FAB, with `PGD()` first, which finds most for little: what it finds, this finds.

    Args:
        steps: gradients a start of APGD.
        targets: of the DLR loss.
        queries: of Square.
        seed: of all.

    Raises:
        ValueError: for an option out of range.

    Source: Croce and Hein 2020, section 6.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((2, 4), 0.5)
        >>> data = x, net(x).argmax(1)
        >>> report = ox.certify(net, data, eps=0.5, attack=ox.StrongAttack(steps=20, queries=50))
        >>> report.pgd_accuracy <= ox.certify(net, data, eps=0.5).pgd_accuracy
        True
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self, steps=1, targets=1, queries=1, seed=0)

    def run(self, hunt: Hunt) -> None:
        """One after the other."""
        parts = (
            PGD(seed=self.seed),
            APGD(steps=self.steps, seed=self.seed),
            APGD(loss="dlr", targets=self.targets, steps=self.steps, seed=self.seed),
            Square(queries=self.queries, seed=self.seed),
        )
        for part in parts:
            part.run(hunt)


def attack_of(owner: str, attack: Attack | str | None, seed: int = 0) -> Attack | None:
    """An attack by its name: "pgd", "strong" or "none"; others as they are."""
    if not isinstance(attack, str):
        return attack
    named: dict[str, Attack | None] = {"pgd": PGD(seed=seed), "strong": StrongAttack(seed=seed), "none": None}
    if attack not in named:
        raise ValueError(f"{owner}: attack must be {', '.join(map(repr, named))} or an attack, got {attack!r}")
    return named[attack]
