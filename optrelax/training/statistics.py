"""The statistics of a batch that is worked on in pieces: one clean pass of all of it, and one way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.networks.graph import Network, Statistics

__all__ = ["BatchStatistics", "clean_pass"]


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Means and variances as the clean pass made them, and the leaves that stand for them in every piece's graph."""

    made: tuple[Tensor, ...] = ()
    leaves: tuple[Tensor, ...] = ()

    def backward(self) -> None:
        """Give the weights the gradient that the pieces left in the statistics: to be called once, after all."""
        reached = [(t, leaf.grad) for t, leaf in zip(self.made, self.leaves, strict=True) if leaf.grad is not None]
        if reached:
            made, gradients = zip(*reached, strict=True)
            torch.autograd.backward(made, gradients)


def clean_pass(network: Network, images: Tensor, statistics: Statistics) -> tuple[Network, BatchStatistics]:
    """The network for one step, with the statistics of all its images: `images`.

    Every process makes the pass of the whole batch; the gradients of its own pieces, pulled back through it, add up.
    """
    if not network.graph.in_training:
        return network, BatchStatistics()
    like = next(network.module.parameters())
    batch = images.to(like)
    if statistics == "population":
        with torch.no_grad():
            return network.on_batch(batch, statistics)[0], BatchStatistics()
    made: list[Tensor] = []
    leaves: list[Tensor] = []
    measured = {}
    for name, both in network.measured(batch).items():
        apart = tuple(t.detach().requires_grad_(t.requires_grad) for t in both)
        measured[name] = apart[0], apart[1]
        made += [t for t in both if t.requires_grad]
        leaves += [t for t in apart if t.requires_grad]
    return network.at_statistics(measured), BatchStatistics(tuple(made), tuple(leaves))
