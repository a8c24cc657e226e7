"""Training losses: small frozen objects, called with a network, a region and labels in anyone's loop."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.analysis import bounds, lower_bounds
from optrelax.checks import require_range
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Cauchy, Relaxation, resolve
from optrelax.training.loss_terms import Batch, WeightedLoss, require_share

__all__ = ["AdversarialLoss", "CertifiedLoss", "NaturalLoss"]


@dataclass(frozen=True, kw_only=True)
class NaturalLoss(WeightedLoss):
    """Cross-entropy of the images themselves: no robust part."""

    kappa: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa != 1:
            raise ValueError(f"NaturalLoss: has no robust part, kappa must stay 1, got {self.kappa}")


@dataclass(frozen=True)
class CertifiedLoss(WeightedLoss):
    """Cross-entropy of the worst margins that a relaxation allows, mixed with the natural loss.

    Args:
        relaxation: a name or an object.
        kappa: weight of the natural loss, the rest is that of the robust one.
        l1: weight of the sum of the weights' absolute values.
        beta: weight of the relaxation's margins, the rest is that of `other`'s (CROWN-IBP mixes "crown-ibp" with
            "box"); the mix is of the margins, before the loss.
        other: a name or an object.
        elision: whether the margins' rows are folded into the last affine layer before bounding; else margins come from
            the intervals of the logits.

    Raises:
        ValueError: for weights out of range, and for an unknown relaxation.

    Sound: `robust` is an upper bound of the cross-entropy over the region, if the relaxations are sound.
    Gradient: as the relaxations say.  Source: Gowal et al. 2018; Zhang et al. 2020; arXiv 2102.06700, section 3.

    Example:
        >>> net, x, labels = ox.models.fc(4, 8, 3, seed=0), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> terms = ox.CertifiedLoss("crown-ibp", kappa=0.5, beta=0.5)(net, ox.LinfBall(x, eps=0.1), labels)
        >>> terms.total.backward()
        >>> bool(terms.robust >= terms.natural)
        True
    """

    relaxation: Relaxation | str
    _: KW_ONLY
    beta: float = 1.0
    other: Relaxation | str = "box"
    elision: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, beta=self.beta)
        object.__setattr__(self, "relaxation", resolve(self.relaxation))
        object.__setattr__(self, "other", resolve(self.other))

    def _margins(self, batch: Batch) -> Tensor:
        parts = [(self.beta, resolve(self.relaxation)), (1 - self.beta, resolve(self.other))]
        found = [
            weight * self._worst(batch.network, batch.region, batch.rows, redrawn(relaxation, batch.generator))
            for weight, relaxation in parts
            if weight > 0
        ]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _worst(self, network: Network, region: Region, rows: Tensor, relaxation: Relaxation) -> Tensor:
        if self.elision:
            return lower_bounds(network, region, rows, relaxation)
        ends = bounds(network, region, relaxation)
        lower, upper = ends.lower.flatten(1), ends.upper.flatten(1)
        return (rows.clamp_min(0) @ lower[..., None] + rows.clamp_max(0) @ upper[..., None]).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class AdversarialLoss(WeightedLoss):
    """Cross-entropy at points found by projected steepest ascent on it: PGD training, no certificate.

    steps: gradients a batch.  step: their length in radii of the region.  The start is random in the region.
    Gradient: at the points found, held fixed.  Source: Madry et al. 2018.

    The attack of certification asks whether any counterexample exists and stops at the first; this one goes on.
    """

    steps: int = 10
    step: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("AdversarialLoss", "at least 0", steps=self.steps)
        require_range("AdversarialLoss", "positive and finite, in radii of the region", step=self.step)

    def _margins(self, batch: Batch) -> Tensor:
        points = self.points(batch.network, batch.region, batch.labels, batch.generator)
        return margins_at(batch, points)

    def points(
        self, network: Network, region: Region, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Points of the region with a high loss, [batch, *input_shape], without a gradient."""
        region = region.detach()
        points = region.project(region.sample(1, generator)[0])
        for _ in range(self.steps):
            with torch.enable_grad():
                points.requires_grad_(True)
                # A sum, so that no example's gradient underflows by the size of the batch.
                loss = F.cross_entropy(network(points).flatten(1), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, points)
            points = region.project(points.detach().add(region.direction(-gradient), alpha=self.step))
        return points


def margins_at(batch: Batch, points: Tensor) -> Tensor:
    """Values of every row at one point an example: [batch, classes - 1]."""
    return (batch.rows @ batch.network(points).flatten(1)[..., None]).squeeze(-1)


def redrawn(relaxation: Relaxation, generator: torch.Generator | None) -> Relaxation:
    """An estimate with fresh random projections: with one draw for all steps training would fit its errors."""
    if generator is None or not isinstance(relaxation, Cauchy):
        return relaxation
    return replace(relaxation, seed=int(torch.randint(2**31, (), generator=generator, device="cpu")))
