"""Gaussian smoothing of a loss over the weights: E L(theta + sigma e), e standard normal. It removes discontinuity.

Wrappers around any loss: the same call, whose total has the smoothed value's estimate and gradient. Memory is that of
one sample: gradients are added up as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optrelax.checks import require_range
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.training.loss_terms import LossTerms
from optrelax.training.wrapped_losses import WrappedLoss

__all__ = ["GradientSmoothing", "ParameterExploration"]

Weights = dict[str, Tensor]


class _Called(nn.Module):
    """A loss's call as a module, so that `functional_call` can put other weights in its network."""

    def __init__(
        self, network: Network, loss: Any, arguments: tuple[object, ...], options: Mapping[str, object]
    ) -> None:
        super().__init__()
        self.held = network.module
        self._call = lambda: loss(network, *arguments, **options)

    def forward(self) -> LossTerms:
        """The terms at the weights that are in place."""
        terms: LossTerms = self._call()
        return terms


@dataclass(frozen=True)
class _Smoothed(WrappedLoss):
    """Shared by both estimators: noise, evaluation at moved weights, and a total with a given gradient.

    loss: any loss of this library, or with its call.  sigma: standard deviation of the noise on every trainable
    weight; 0 is the loss itself.  samples: evaluations a step.
    """

    _: KW_ONLY
    sigma: float = 1e-3
    samples: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        require_range(name, ">= 0 and finite", sigma=self.sigma)
        require_range(name, "at least 1", samples=self.samples)

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
        """The terms for one batch: means over the samples; logits and margins are those of the first sample."""
        network = capture(net, region.shape[1:])
        weights: Weights = {name: p for name, p in network.module.named_parameters() if p.requires_grad}
        arguments = (region, labels, x)
        options = {"generator": generator, **options}
        if self.sigma == 0:
            found: LossTerms = self.loss(network, *arguments, **options)
            return found
        if network.graph.in_training or network.statistics == "batch":
            raise ValueError(
                f"{type(self).__name__}: the statistics of a batch would move with the weights; train with "
                'statistics="population", or with the batch norms in eval mode'
            )
        called = _Called(network, self.loss, arguments, options)
        gradients, terms = self._estimate(called, weights, generator)
        first = terms[0]
        robust = [t.robust for t in terms if t.robust is not None]
        total = torch.stack([t.total.detach() for t in terms]).mean()
        for name, gradient in gradients.items():
            # Value 0, gradient the estimate: the step's backward pass finds it like any other.
            total = total + (gradient * (weights[name] - weights[name].detach())).sum()
        return replace(
            first,
            total=total,
            natural=torch.stack([t.natural.detach() for t in terms]).mean(),
            robust=torch.stack([t.detach() for t in robust]).mean() if robust else None,
            penalty=torch.stack([t.penalty.detach() for t in terms]).mean(),
            logits=first.logits.detach(),
            margins=None if first.margins is None else first.margins.detach(),
        )

    def _estimate(
        self, called: _Called, weights: Weights, generator: torch.Generator | None
    ) -> tuple[Weights, list[LossTerms]]:
        """The gradient's estimate, empty without gradients, and the terms of every evaluation."""
        raise NotImplementedError

    def _moved(self, weights: Weights, noise: Weights, sign: float) -> Weights:
        return {name: p.detach() + sign * self.sigma * noise[name] for name, p in weights.items()}


def _noises(weights: Weights, generator: torch.Generator | None, count: int) -> Iterator[Weights]:
    """Standard normal noise of every weight, drawn on the generator's device."""
    device = torch.device("cpu") if generator is None else generator.device
    for _ in range(count):
        yield {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype, device=device).to(p.device)
            for name, p in weights.items()
        }


@dataclass(frozen=True)
class GradientSmoothing(_Smoothed):
    """RGS: gradients of the loss averaged at randomly moved weights; `samples` forward and backward passes a step.

    Gradient: an unbiased estimate of the smoothed loss's where the loss is continuous; at jumps, whose share in it no
    gradient sees, use `ParameterExploration`.  Source: Duchi et al. 2012; arXiv 2403.07095, section 3.
    """

    def _estimate(
        self, called: _Called, weights: Weights, generator: torch.Generator | None
    ) -> tuple[Weights, list[LossTerms]]:
        differentiable = torch.is_grad_enabled()
        gradients: Weights = {name: torch.zeros_like(p) for name, p in weights.items()} if differentiable else {}
        found = []
        for noise in _noises(weights, generator, self.samples):
            moved = {name: w.requires_grad_(differentiable) for name, w in self._moved(weights, noise, 1.0).items()}
            terms = functional_call(called, {f"held.{name}": w for name, w in moved.items()}, ())
            if differentiable:
                each = torch.autograd.grad(terms.total, list(moved.values()), allow_unused=True)
                for total, gradient in zip(gradients.values(), each, strict=True):
                    if gradient is not None:
                        total.add_(gradient, alpha=1 / self.samples)
            found.append(replace(terms, total=terms.total.detach()))
        return gradients, found


@dataclass(frozen=True)
class ParameterExploration(_Smoothed):
    """PGPE: the smoothed loss's gradient from values alone, so any solver can be trained with, jumps included.

    samples: evaluations a step, an even number: antithetic pairs theta +- sigma e, of which
    e (L(theta + sigma e) - L(theta - sigma e)) / (2 sigma) is averaged.
    Gradient: an unbiased estimate for any bounded loss; its variance grows with the number of weights.
    Source: Sehnke et al. 2010; arXiv 2403.07095, section 3.
    """

    samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples % 2:
            raise ValueError(f"ParameterExploration: samples must be even, they come in pairs, got {self.samples}")

    def _estimate(
        self, called: _Called, weights: Weights, generator: torch.Generator | None
    ) -> tuple[Weights, list[LossTerms]]:
        gradients = {name: torch.zeros_like(p) for name, p in weights.items()}
        found = []
        with torch.no_grad():
            for noise in _noises(weights, generator, self.samples // 2):
                pair = []
                for sign in (1.0, -1.0):
                    moved = self._moved(weights, noise, sign)
                    pair.append(functional_call(called, {f"held.{name}": w for name, w in moved.items()}, ()))
                slope = (pair[0].total - pair[1].total) / (2 * self.sigma)
                for name, total in gradients.items():
                    total.add_(noise[name] * slope, alpha=2 / self.samples)
                found += pair
        return (gradients if torch.is_grad_enabled() else {}), found
