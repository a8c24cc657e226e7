"""Batch norms: elementwise maps by statistics, of the population or of a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from optrelax.networks.ops import Scale, Shape, Source, wide
from optrelax.networks.storage import Settings, Tensors, stored
from optrelax.rounding import tiny


@stored("batch_norm")
class BatchNorm(Scale):
    """Batch norm with running statistics: x * scale + bias - mean * scale, scale = weight / sqrt(variance + eps).

    The statistics are read at each use; [channels] each, weight and bias may be missing.
    """

    # variance + eps, its root, the quotient, mean * scale and the sum; doubled for those of the cast.
    roundings = 12

    def __init__(
        self,
        shape: Shape,
        eps: float,
        mean: Source,
        variance: Source,
        weight: Source | None = None,
        bias: Source | None = None,
    ) -> None:
        view = (-1, *[1] * (len(shape) - 1))
        self.eps = eps
        self._terms = mean, bias
        named = {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias}
        self._primary = {name: source for name, source in named.items() if source is not None}

        def scale() -> Tensor:
            root = (wide(variance()) + eps).sqrt()
            return ((1 if weight is None else wide(weight())) / root).reshape(view)

        def shift() -> Tensor:
            moved = -wide(mean()).reshape(view) * scale()
            return moved if bias is None else moved + wide(bias()).reshape(view)

        super().__init__(shape, scale, shift)

    def bias_size(self, like: Tensor) -> Tensor | None:
        mean, bias = self._terms
        assert self._scale is not None
        scale = self._scale()
        # Below the normal range the scale's error is a unit of the least normal number, not of its own.
        size = wide(mean()).reshape(scale.shape).abs() * scale.abs().clamp_min(tiny(scale.dtype))
        if bias is not None:
            size = size + wide(bias()).reshape(scale.shape).abs()
        return size.to(like).expand(self.shape)

    def describe(self) -> dict[str, object]:
        return {"eps": self.eps}

    def tensors(self) -> dict[str, Source]:
        return dict(self._primary)

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> BatchNorm:
        channels = shapes[0][:1]
        mean, variance = (tensors.source(name, shape=channels) for name in ("running_mean", "running_var"))
        weight, bias = (tensors.optional(name, shape=channels) for name in ("weight", "bias"))
        return cls(shapes[0], settings.number("eps"), mean, variance, weight, bias)


class BatchNormInTraining(BatchNorm):
    """Batch norm in training mode: affine once the statistics of a batch are known, see `optrelax.on_batch`.

    layer: the module, by a weak proxy.  Until then it has no coefficients, and whoever asks for them is told so.
    """

    def __init__(self, shape: Shape, layer: Any) -> None:
        Scale.__init__(self, shape, None, None)
        self.eps, self.layer = float(layer.eps), layer
        self._scale = self._shift = self._unknown
        self._terms, self._primary = (self._unknown, None), {}

    def _unknown(self) -> Tensor:
        raise ValueError("a batch norm in training mode is no affine map until on_batch(net, x) gives its statistics")

    def measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance of the values [batch, *shape] of one batch: [channels] each, differentiable."""
        if x.numel() == x.shape[1]:
            raise ValueError(f"on_batch: a batch norm wants more than one value a channel, got {tuple(x.shape)}")
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return mean, variance

    def at(self, mean: Source, variance: Source) -> BatchNorm:
        """The affine map of these statistics, with the layer's own weight and bias."""
        layer = self.layer
        weight, bias = (
            None if getattr(layer, name) is None else partial(getattr, layer, name) for name in ("weight", "bias")
        )
        return BatchNorm(self.shape, self.eps, mean, variance, weight, bias)

    def at_population(self) -> BatchNorm:
        """The map of the running statistics, which evaluation takes.  ValueError where the layer keeps none."""
        if self.layer.running_mean is None:
            raise ValueError("a batch norm without running statistics has none of the population")
        return self.at(partial(getattr, self.layer, "running_mean"), partial(getattr, self.layer, "running_var"))

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the layer's running statistics towards those of a batch of so many values a channel, as torch does."""
        layer = self.layer
        if layer.running_mean is None:
            return
        layer.num_batches_tracked.add_(1)
        share = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.mul_(1 - share).add_(mean, alpha=share)
        layer.running_var.mul_(1 - share).add_(variance, alpha=share * count / (count - 1))
