"""COLT: adversarial training layer by layer, on points that an attack finds in the zonotope of a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.checks import require_range
from optrelax.domains import zonotope
from optrelax.domains.noise_terms import Zonotope
from optrelax.networks.graph import Network
from optrelax.regions import require_box
from optrelax.relaxations import DeepZ
from optrelax.training.loss_terms import Batch, Robust, WeightedLoss, certified_cross_entropy
from optrelax.training.losses import AdversarialLoss

__all__ = ["LatentLoss"]


@dataclass(frozen=True, kw_only=True)
class LatentLoss(WeightedLoss):
    """Cross-entropy at the worst point found in the zonotope of a hidden layer: one stage of COLT.

    stage: how many activations lie behind; 0 attacks the input, as `AdversarialLoss`. The region is carried by DeepZ
    through the layers before, and the attack moves the zonotope's noise terms in [-1, 1]; what it finds need not come
    from any input, so the loss is above that of any attack, and with every activation behind it is nearly DeepZ's.
    Training stage by stage (`Stages`) meets every layer's own relaxation error with the layers after it.
    steps, step: sign-gradient steps a batch and their length; the start is uniform.
    Sound: no, that of one attack.  Gradient: at the points found, to the layers after them alone: with kappa and l1 0
    the others stand still.  The paper's annealing from one stage to the next is left out.
    Source: Balunović and Vechev 2020.
    """

    stage: int = 1
    steps: int = 8
    step: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("LatentLoss", ">= 0", stage=self.stage)
        AdversarialLoss(steps=self.steps, step=self.step)  # checks both

    def _robust(self, batch: Batch) -> Robust:
        network = batch.network
        if self.stage == 0:
            attack = AdversarialLoss(steps=self.steps, step=self.step)
            values = network(attack.points(network, batch.region, batch.labels, batch.generator))
        else:
            cut = cut_after(network, self.stage)
            region = require_box("LatentLoss", batch.region, "AdversarialLoss and CertifiedLoss take any region")
            with torch.no_grad():
                walk = zonotope.Walk(DeepZ().lines)
                latent = zonotope.propagate(network, region, walk, frozenset({cut})).kept[cut]
            values = values_after(network, cut, self._worst(batch, cut, latent))
        found = (batch.rows @ values.flatten(1)[..., None]).squeeze(-1)
        return Robust(certified_cross_entropy(found), found)

    def _worst(self, batch: Batch, cut: str, latent: Zonotope) -> Tensor:
        """A point of the zonotope with a high loss, without a gradient."""
        device = torch.device("cpu") if batch.generator is None else batch.generator.device
        noise = {}
        for name, block in latent.blocks.items():
            uniform = torch.rand(block.scale.shape, generator=batch.generator, dtype=latent.center.dtype, device=device)
            noise[name] = 2 * uniform.to(latent.center.device) - 1
        for _ in range(self.steps if noise else 0):
            with torch.enable_grad():
                free = {name: e.requires_grad_(True) for name, e in noise.items()}
                values = values_after(batch.network, cut, point_of(latent, free)).flatten(1)
                # A sum, so that no example's gradient underflows by the size of the batch.
                loss = F.cross_entropy(values, batch.labels, reduction="sum")
                gradients = torch.autograd.grad(loss, list(free.values()))
            noise = {
                name: (e.detach() + self.step * gradient.sign()).clamp(-1, 1)
                for (name, e), gradient in zip(free.items(), gradients, strict=True)
            }
        with torch.no_grad():
            return point_of(latent, noise)


def point_of(latent: Zonotope, noise: dict[str, Tensor]) -> Tensor:
    """The point of a zonotope at noise terms [batch, e] of each block: [batch, *shape]."""
    value = latent.center
    for name, block in latent.blocks.items():
        weights = noise[name] * block.scale
        g = block.generators.flatten(2)
        part = weights @ g[0] if g.shape[0] == 1 else (weights[:, None] @ g)[:, 0]
        value = value + part.reshape(value.shape)
    return value


def cut_after(network: Network, stage: int) -> str:
    """The activation with `stage` activations up to it; ValueError unless all that follows depends on it alone."""
    if stage > len(network.activations):
        raise ValueError(f"LatentLoss: stage {stage}, but the network has {len(network.activations)} activations")
    cut = network.activations[stage - 1].name
    before = network.ancestors(cut)
    for node in network.nodes:
        if node.name not in before and any(name == network.input or name in before - {cut} for name in node.inputs):
            raise ValueError(
                f"LatentLoss: stage {stage} ends at {network[cut].path}, but {node.path} reads what lies before it; "
                "choose a stage at the end of the residual block"
            )
    return cut


def values_after(network: Network, cut: str, value: Tensor) -> Tensor:
    """The network's output from the value of a node: [batch, *output_shape]."""
    before = network.ancestors(cut)
    values = {cut: value}
    for node in network.nodes:
        if node.name not in before:
            inputs = [values[name] for name in node.inputs]
            values[node.name] = node.op(*inputs)
    return values[network.output]
