"""What relaxations and an attack say of a batch of examples: of all, or, in a cascade, of those that are still open."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.disjunctions import group_bounds
from optrelax.regions import Region
from optrelax.relaxations import Relaxation
from optrelax.specifications import Specification

if TYPE_CHECKING:
    from optrelax.certification.certifiers import Certifier

__all__ = ["Answers"]


@dataclass(slots=True)
class Answers:
    """The numbers of one batch; entries of an example that was not asked mean nothing."""

    run: Certifier
    positions: Tensor
    ball: Region
    spec: Specification
    natural: Tensor
    """Smallest margin at the input: [batch]."""
    lower: list[Tensor] = field(default_factory=list)
    """Bounds of the groups, one a relaxation: float64 [batch, groups]."""
    asked: list[Tensor] = field(default_factory=list)
    """Who was asked for them: bool [batch]."""
    seconds: list[float] = field(default_factory=list)
    """Time an example that was asked."""
    margins: Tensor | None = None
    """Smallest margin found by the attack, the input's among them: [batch]; None with the attack off."""
    attacked: Tensor | None = None
    """Who was attacked: bool [batch]."""

    def ask(self) -> Answers:
        """Attack and bound every example; in a cascade each relaxation only what is right and open when it is reached.

        The attack of a cascade comes after its first relaxation: often the cheapest question of all.
        """
        cascade, attack = self.run.cascade, self.run.attack is not None
        still = self.natural > 0 if cascade else torch.ones_like(self.natural, dtype=torch.bool)
        if attack and not cascade:
            self._attack(still)
        for relaxation in self.run.relaxations.values():
            self._bound(relaxation, still)
            if cascade:
                still = still & ~(self.lower[-1].amin(1) > 0)  # a NaN proves nothing
                if attack and self.margins is None:
                    still = still & (self._attack(still) > 0)
        return self

    def of(self, i: int) -> dict[str, Any]:
        """What is said of one example of the batch, as fields of an `Example`."""
        asked = [bool(one[i]) for one in self.asked]
        pairs = list(zip(self.lower, asked, strict=True))
        attacked = self.margins is not None and self.attacked is not None and bool(self.attacked[i])
        return {
            "attack_margin": float(self.margins[i]) if self.margins is not None and attacked else None,
            "lower": tuple(float(bound[i].amin()) if told else None for bound, told in pairs),
            "rows": tuple(tuple(bound[i].tolist()) if told else () for bound, told in pairs) if self.spec.names else (),
            "bound_seconds": tuple(s if told else 0.0 for s, told in zip(self.seconds, asked, strict=True)),
        }

    def _part(self, chosen: Tensor) -> tuple[Region, Specification]:
        """Regions and specification of some of the examples, in float64."""
        if bool(chosen.all()):
            return self.ball, self.spec
        return self.ball.select(chosen), self.spec.select(chosen)

    def _attack(self, chosen: Tensor) -> Tensor:
        """Smallest margin found, the input's among them, replayed in float64 at points of the region: [batch]."""
        run, (ball, spec) = self.run, self._part(chosen)
        assert run.attack is not None
        self.attacked, self.margins = chosen, self.natural.clone()
        if not bool(chosen.any()):
            return self.margins
        keys = run.samples.index[self.positions[chosen.cpu()]].tolist()
        found = run.attack.search(run.network, ball.to(run.dtype), spec.to(dtype=run.dtype), keys)
        points = ball.project(found.points.double())
        if not bool(ball.contains(points).all()):
            raise RuntimeError("the attack left the region")
        replayed = spec.worst(spec.values(run.network(points).reshape(len(points), -1))).amin(1)
        self.margins[chosen] = torch.minimum(self.natural[chosen], replayed)  # a NaN stays one
        return self.margins

    def _bound(self, relaxation: Relaxation, chosen: Tensor) -> None:
        """Lower bounds of some of the examples by one relaxation, and its time."""
        lower = self.natural.new_full((len(chosen), len(self.spec.groups)), torch.nan)
        begin = time.perf_counter()
        if count := int(chosen.sum()):
            ball, spec = self._part(chosen)
            region, spec = self.run.rounded(ball), spec.to(dtype=self.run.dtype)
            lower[chosen] = group_bounds(relaxation, self.run.network, region, spec, sign=True).detach().double()
            if lower.is_cuda:
                torch.cuda.synchronize(lower.device)
        self.lower.append(lower)
        self.asked.append(chosen)
        self.seconds.append((time.perf_counter() - begin) / max(1, count))
