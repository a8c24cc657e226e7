"""Fast certified training with intervals: an initialisation and regularisers that keep them from exploding.

Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor, nn

from optrelax.checks import require_range
from optrelax.domains import interval
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.training.loss_terms import LossTerms, clean_images, weights_of
from optrelax.training.wrapped_losses import WrappedLoss

__all__ = ["IntervalRegularised", "initialise"]


def initialise(
    net: nn.Module | Network, generator: torch.Generator | None = None, *, input_shape: Sequence[int] | None = None
) -> None:
    """Draw the weights of all but the last affine layers anew, normal with standard deviation sqrt(2 pi) / fan-in.

    An interval then keeps its mean width from layer to layer: |w| has mean sqrt(2 / pi) times its deviation, and a
    ReLU halves a width on average.  Biases stay.  In place.  Source: Shi et al. 2021, section 3.1.
    """
    # A batch norm's weight scales what the products have made.
    *hidden, _ = weights_of(node for node in capture(net, input_shape) if node.affine and not node.affine.diagonal)
    with torch.no_grad():
        for weight in hidden:
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device="cpu")
            weight.copy_(drawn * (math.sqrt(2 * math.pi) / weight[0].numel()))


@dataclass(frozen=True)
class IntervalRegularised(WrappedLoss):
    """A loss plus the interval regularisers of Shi et al.: tightness, and balance of active and inactive neurons.

    With r the mean half width of the pre-activation intervals (by Box) of a layer, r0 that of the region:
    tightness is the mean over layers of max(0, tolerance - r0 / r) / tolerance.  With c the intervals' centres:
    balance adds max(0, tolerance - ratio) / tolerance for the ratio (in [0, 1]) of active to inactive neurons in
    mean |c| and in the variance of c.
    weight: of both at radius 0; it falls linearly to 0 at `eps`, the radius that training ends with.
    Gradient: exact.  Source: Shi et al. 2021, equations 5 to 8.
    """

    _: KW_ONLY
    eps: float
    weight: float = 0.5
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("IntervalRegularised", "> 0 and finite", eps=self.eps)
        require_range("IntervalRegularised", ">= 0 and finite", weight=self.weight)
        require_range("IntervalRegularised", "in (0, 1]", tolerance=self.tolerance)

    def __call__(
        self,
        net: nn.Module | Network,
        region: Region,
        labels: Tensor,
        x: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: object,
    ) -> LossTerms:
        """The terms of the loss inside, the regularisers in `total` and `penalty`."""
        network = capture(net, region.shape[1:])
        if network.graph.in_training:
            network, _ = network.on_batch(clean_images(region, x))
        terms: LossTerms = self.loss(network, region, labels, x, generator=generator, **options)
        weight = self.weight * (1 - self.share(region))
        if weight <= 0:
            return terms
        tightness, balance = self.penalties(network, region)
        extra = weight * (tightness + balance)
        return replace(terms, total=terms.total + extra, penalty=terms.penalty + extra)

    def share(self, region: Region) -> float:
        """The region's greatest radius as a share of `eps`, at most 1."""
        return min(1.0, float(region.box().radius.detach().amax()) / self.eps)

    def penalties(self, network: Network, region: Region) -> tuple[Tensor, Tensor]:
        """Tightness and balance, [] each; 0 where the region has no width, or a layer no neuron of one kind."""
        width = region.box().radius.mean()
        zero = torch.zeros_like(width)
        before = interval.propagate(network, region).preactivation.values()
        tightness, balance = [zero], [zero]
        for bounds in before:
            radius = ((bounds.upper - bounds.lower) / 2).mean()
            if float(radius.detach()) > 0 and float(width.detach()) > 0:
                tightness.append(self._short(width / radius))
            balance.append(self._balance(bounds.lower, bounds.upper))
        return torch.stack(tightness).sum() / len(before), torch.stack(balance).sum() / len(before)

    def _balance(self, lower: Tensor, upper: Tensor) -> Tensor:
        center = (lower + upper) / 2
        active, inactive = lower.detach() > 0, upper.detach() < 0
        if not (bool(active.any()) and bool(inactive.any())):
            return torch.zeros_like(center.mean())
        spread = (center - center.mean()) ** 2
        means = (center * active).sum(), -(center * inactive).sum()
        spreads = (spread * active).sum(), (spread * inactive).sum()
        return self._short(_ratio(*means)) + self._short(_ratio(*spreads))

    def _short(self, ratio: Tensor) -> Tensor:
        """By how much a ratio falls short of the tolerance, in units of it."""
        return (self.tolerance - ratio).clamp_min(0) / self.tolerance


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The lesser over the greater of two non-negative numbers; 1 where both are 0."""
    high = torch.maximum(a, b)
    return torch.where(high > 0, torch.minimum(a, b) / torch.where(high > 0, high, 1.0), torch.ones_like(high))
