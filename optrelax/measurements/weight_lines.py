"""Lines in weight space: a network whose weights move, in float64, and are put back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from optrelax.analysis import Net
from optrelax.networks.graph import Network
from optrelax.training.loss_terms import certified_cross_entropy

__all__ = [
    "Direction",
    "Weights",
    "filter_normalised",
    "given_direction",
    "gradient_of",
    "length_of",
    "random_direction",
]

Direction = Literal["gradient", "random"]
Weights = tuple[Tensor, ...]  # one tensor a parameter of the network, float64


@dataclass(frozen=True, slots=True, eq=False)
class MovingWeights:
    """The parameters of a network while they move."""

    parameters: tuple[nn.Parameter, ...]
    origin: Weights

    def move(self, direction: Weights, t: float) -> None:
        """Put origin + t * direction into the network."""
        with torch.no_grad():
            for p, start, d in zip(self.parameters, self.origin, direction, strict=True):
                p.copy_(start + t * d)

    def shift(self, steps: Weights) -> None:
        """Put origin + steps into the network."""
        self.move(steps, 1.0)


@contextlib.contextmanager
def moving(network: Network) -> Iterator[MovingWeights]:
    """The network's parameters in float64 and free to move; afterwards they are what they were, bit for bit."""
    parameters = tuple(network.module.parameters())
    if not parameters:
        raise ValueError("the network has no parameters, so there is no line in weight space")
    kept = [(p.data, p.requires_grad, p.grad) for p in parameters]
    try:
        for p in parameters:
            p.data = p.data.double().clone()
            p.grad = None
            p.requires_grad_(True)
        yield MovingWeights(parameters, tuple(p.data.clone() for p in parameters))
    finally:
        for p, (data, wanted, grad) in zip(parameters, kept, strict=True):
            p.data = data
            p.requires_grad_(wanted)
            p.grad = grad


def length_of(weights: Weights) -> float:
    """Euclidean norm of all entries."""
    return math.sqrt(sum(float(w.square().sum()) for w in weights))


def scaled(direction: Weights, origin: Weights, owner: str) -> Weights:
    """The direction with the norm of the weights, so that a step of 1 is as long as they are."""
    length, size = length_of(direction), length_of(origin)
    if not 0 < length < math.inf:
        raise ValueError(f"{owner}: the direction has norm {length}, so there is no line along it")
    if size == 0:
        raise ValueError(f"{owner}: all weights are 0, so no step is relative to them")
    return tuple(d * (size / length) for d in direction)


def random_direction(origin: Weights, generator: torch.Generator, owner: str) -> Weights:
    """Normal entries, each tensor as long as the weights it moves, all together as long as all weights."""
    parts = []
    for w in origin:
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64, device="cpu").to(w.device)
        parts.append(noise * (w.norm() / noise.norm().clamp_min(1e-300)))
    return scaled(tuple(parts), origin, owner)


def filter_normalised(origin: Weights, generator: torch.Generator) -> Weights:
    """Normal entries, each filter (row of the first dimension) as long as the filter it moves; biases stay.

    Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", section 4.
    """
    parts = []
    for w in origin:
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64, device="cpu").to(w.device)
        if w.dim() < 2:
            parts.append(torch.zeros_like(w))
            continue
        rows, sizes = noise.flatten(1), w.flatten(1).norm(dim=1, keepdim=True)
        parts.append((rows * (sizes / rows.norm(dim=1, keepdim=True).clamp_min(1e-300))).reshape(w.shape))
    return tuple(parts)


def gradient_of(margins: Tensor, parameters: tuple[nn.Parameter, ...]) -> tuple[float, Weights]:
    """Certified cross-entropy of margins' bounds [n, k] and its gradient in the parameters."""
    loss = certified_cross_entropy(margins)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradient = tuple(torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, found, strict=True))
    return float(loss.detach()), gradient


def given_direction(network: Network, direction: Mapping[str, Tensor] | Net, origin: Weights, owner: str) -> Weights:
    """A direction by the parameters' names (those left out stay), or to another network's weights.

    Raises ValueError for names or shapes that do not fit.
    """
    names = [name for name, _ in network.module.named_parameters()]
    if isinstance(direction, Mapping):
        unknown = sorted(set(direction) - set(names))
        if unknown:
            raise ValueError(f"{owner}: the network has no parameter {unknown[0]!r}; it has {', '.join(names)}")
        found = [direction.get(name) for name in names]
        parts = [torch.zeros_like(w) if d is None else d.to(w) for d, w in zip(found, origin, strict=True)]
    else:
        module = direction.module if isinstance(direction, Network) else direction
        other = dict(module.named_parameters())
        if sorted(other) != sorted(names):
            raise ValueError(f"{owner}: the other network has parameters {sorted(other)}, this one {sorted(names)}")
        parts = [other[name].detach().to(w) - w for name, w in zip(names, origin, strict=True) if _fits(other[name], w)]
    for name, part, w in zip(names, parts, origin, strict=len(parts) == len(names)):
        if part.shape != w.shape:
            raise ValueError(f"{owner}: {name} is {tuple(w.shape)}, the direction has {tuple(part.shape)}")
    if len(parts) != len(names):
        raise ValueError(f"{owner}: the other network's weights have other shapes")
    return tuple(parts)


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape
