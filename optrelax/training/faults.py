"""Where training broke: the first parameter, layer or bound that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from optrelax.networks.graph import Network
from optrelax.regions import Region
from optrelax.relaxations import Relaxation, name_of
from optrelax.training.loss_terms import LossTerms

__all__ = ["gradient_fault", "loss_fault", "relaxations_of"]


def loss_fault(terms: LossTerms) -> str | None:
    """Which part of a loss is not finite; None where all is well."""
    if bool(terms.total.isfinite()):
        return None
    parts = {"natural": terms.natural, "robust": terms.robust, "penalty": terms.penalty}
    broken = [name for name, part in parts.items() if part is not None and not bool(part.isfinite())]
    return f"the loss is {terms.total.item()} (its part: {', '.join(broken) or 'total'})"


def gradient_fault(parameters: Mapping[str, Tensor]) -> str | None:
    """Which gradients are not finite; None where all are."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    # One number first: a loop over the parameters would wait for the device at each.
    if not gradients or bool(torch.stack([g.abs().amax() for g in gradients.values()]).isfinite().all()):
        return None
    names = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    return f"the gradient of {', '.join(names)} is not finite"


def origin(network: Network, region: Region, x: Tensor, loss: object) -> str:
    """The first thing that is not finite: a parameter, a layer's value at the images, or its bounds; "" for none.

    Bounds are those of the loss's relaxations, layer by layer; without a loss none are looked at.
    """
    for name, parameter in network.module.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            return f"first in parameter {name}"
    with torch.no_grad():
        values = network.values(x)
        for node in network.nodes:
            if not bool(values[node.name].isfinite().all()):
                return f"first in the value of layer {node.path}"
        for relaxation in relaxations_of(loss):
            for path, finite in _bounds(network, region, relaxation):
                if not finite:
                    return f"first in the bounds before layer {path} by {name_of(relaxation)}"
    return ""


def _bounds(network: Network, region: Region, relaxation: Relaxation) -> Iterator[tuple[str, bool]]:
    """Layer by layer whether a relaxation's pre-activation bounds are finite."""
    for name, b in relaxation.preactivation_bounds(network, region).items():
        yield network[name].path, bool(b.lower.isfinite().all() and b.upper.isfinite().all())


def relaxations_of(loss: object) -> list[Relaxation]:
    """The relaxations in a loss's fields, those of losses inside it included."""
    found = []
    for name in ("relaxation", "layer", "other"):
        value = getattr(loss, name, None)
        # Where its weight is 0, `other` takes no part.
        if isinstance(value, Relaxation) and not (name == "other" and getattr(loss, "beta", 1.0) == 1):
            found.append(value)
    inner = getattr(loss, "loss", None)
    return found + (relaxations_of(inner) if inner is not None else [])
