"""Certified-training losses of the field beside `CertifiedLoss`, on the same pieces: frozen, for anyone's loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from optrelax.analysis import lower_bounds
from optrelax.checks import require_choice, require_range
from optrelax.domains import backsubstitution, interval
from optrelax.domains.lines import Lines
from optrelax.domains.planes import product_planes, square_planes
from optrelax.domains.row_walks import Enclosure
from optrelax.networks.graph import Network
from optrelax.regions import InputBox, Region, require_box
from optrelax.relaxations import Relaxation, resolve
from optrelax.training.loss_terms import Batch, Robust, WeightedLoss, certified_cross_entropy, require_share
from optrelax.training.losses import AdversarialLoss, margins_at, redrawn

__all__ = ["ExpressiveLoss", "FusedLoss", "LandscapeLoss", "SmallBoxLoss"]


def _attack() -> AdversarialLoss:
    return AdversarialLoss(steps=8, step=0.25)


@dataclass(frozen=True)
class FusedLoss(WeightedLoss):
    """Upper bound of the cross-entropy itself: one row an example instead of one a class (CROWN-IBP loss fusion).

    With t the negated margins in [l, u] by Box, exp(t) lies below its chord a t + b, so 1 + sum exp(t) lies below a
    linear function of the logits, which `relaxation` bounds as one row. beta: weight of that bound of the sum, the
    rest is Box's own 1 + sum exp(u).
    Sound: as the relaxation; with beta 0 it is the loss by Box.  Gradient: exact.  `margins` of the terms are Box's.
    Source: Xu et al. 2020, section 3.3.
    """

    relaxation: Relaxation | str = "crown-ibp"
    _: KW_ONLY
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, beta=self.beta)
        object.__setattr__(self, "relaxation", resolve(self.relaxation))

    def _robust(self, batch: Batch) -> Robust:
        network, region, rows = batch.network, batch.region, batch.rows
        both = lower_bounds(network, region, torch.cat([rows, -rows], 1), "box")
        low, high = both.chunk(2, 1)
        u, l = -low, torch.minimum(high, -low)  # of the negated margins
        # In units of exp(top): nothing overflows, and the sum is at least exp(-top), its label's own term.
        top = u.detach().amax(1).clamp_min(0)
        e_low, e_high = (l - top[:, None]).exp(), (u - top[:, None]).exp()
        least = (-top).exp()
        total = torch.zeros_like(top)
        if self.beta > 0:
            wide = u > l
            slope = torch.where(wide, (e_high - e_low) / torch.where(wide, u - l, 1.0), e_high)
            intercept = (e_high - slope * u).sum(1)
            row = slope[:, None] @ rows  # of a . t, negated: t = -(margins)
            relaxation = redrawn(resolve(self.relaxation), batch.generator)
            bound = least + intercept - lower_bounds(network, region, row, relaxation)[:, 0]
            total = total + self.beta * torch.maximum(bound, least)
        if self.beta < 1:
            total = total + (1 - self.beta) * (least + e_high.sum(1))
        return Robust((top + total.log()).mean(), low)


@dataclass(frozen=True, kw_only=True)
class SmallBoxLoss(WeightedLoss):
    """SABR: bounds over a small box inside the region, around a point that an attack found.

    share: its radius in radii of the region, 1 the whole region, 0 the attacked point alone.  The centre is searched
    where the small box stays inside the region.  relaxation: of the small box.
    Sound: for the small box only, no certificate.  Gradient: at the box found, held fixed.  Source: Müller et al. 2023.
    """

    share: float = 0.4
    relaxation: Relaxation | str = "box"
    attack: AdversarialLoss = field(default_factory=_attack)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, share=self.share)
        object.__setattr__(self, "relaxation", resolve(self.relaxation))

    def box(self, batch: Batch) -> InputBox:
        """The small box of every example."""
        region = require_box("SmallBoxLoss", batch.region, "ExpressiveLoss and CertifiedLoss take any region")
        lower, upper = region.lower.detach(), region.upper.detach()
        if self.share == 1:
            return InputBox(lower, upper)
        small = self.share * region.radius.detach()
        # Inner ends may cross by rounding where the region has no width.
        inner = InputBox(
            torch.minimum(lower + small, region.center.detach()), torch.maximum(upper - small, region.center.detach())
        )
        points = self.attack.points(batch.network, inner, batch.labels, batch.generator)
        return InputBox(torch.maximum(points - small, lower), torch.minimum(points + small, upper))

    def _margins(self, batch: Batch) -> Tensor:
        box = self.box(batch)
        return lower_bounds(batch.network, box, batch.rows, redrawn(resolve(self.relaxation), batch.generator))


@dataclass(frozen=True, kw_only=True)
class ExpressiveLoss(WeightedLoss):
    """Between an attack's loss and a bound's: MTL-IBP, CC-IBP or EXP-IBP.

    alpha: weight of the bound.  form: "mtl" mixes the losses, (1 - alpha) adversarial + alpha certified; "cc" the
    margins before the loss; "exp" each example's losses geometrically, adversarial^(1 - alpha) certified^alpha.
    Sound: with alpha 1 only.  Gradient: exact, at the points found.  `margins` of the terms are the bounds.
    Source: De Palma et al. 2024, equations 5 to 7.
    """

    form: Literal["mtl", "cc", "exp"] = "mtl"
    alpha: float = 0.5
    relaxation: Relaxation | str = "box"
    attack: AdversarialLoss = field(default_factory=_attack)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("ExpressiveLoss", "form", self.form, "mtl", "cc", "exp")
        require_share(self, alpha=self.alpha)
        object.__setattr__(self, "relaxation", resolve(self.relaxation))

    def _robust(self, batch: Batch) -> Robust:
        points = self.attack.points(batch.network, batch.region, batch.labels, batch.generator)
        attacked = margins_at(batch, points)
        relaxation = redrawn(resolve(self.relaxation), batch.generator)
        bounds = lower_bounds(batch.network, batch.region, batch.rows, relaxation)
        a = self.alpha
        if self.form == "cc":
            return Robust(certified_cross_entropy((1 - a) * attacked + a * bounds), bounds)
        first, second = (certified_cross_entropy(m, "none") for m in (attacked, bounds))
        if self.form == "mtl":
            return Robust(((1 - a) * first + a * second).mean(), bounds)
        # A loss that underflows to 0 has no logarithm; it counts as the smallest positive number.
        least = torch.finfo(first.dtype).tiny
        logs = (1 - a) * first.clamp_min(least).log() + a * second.clamp_min(least).log()
        return Robust(logs.exp().mean(), bounds)


@dataclass(frozen=True, kw_only=True)
class LandscapeLoss(WeightedLoss):
    """CROWN-IBP with lower slopes of a favourable landscape: drawn at random, then one sign-gradient step.

    The slopes, one a crossing neuron and example, are uniform in [0, 1]; one step of size `step` against the sign of
    the loss's gradient, clamped to [0, 1], makes the bound tighter (0: the random slopes).
    Sound: yes, at any slopes.  Gradient: at the slopes found, held fixed.  Source: Lee et al. 2021.
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("LandscapeLoss", ">= 0 and finite", step=self.step)

    def _margins(self, batch: Batch) -> Tensor:
        network, region = batch.network, batch.region
        device = torch.device("cpu") if batch.generator is None else batch.generator.device
        weights = {}
        for node in network.activations:
            shape = (region.shape[0], *node.shape)
            drawn = torch.rand(shape, generator=batch.generator, dtype=region.dtype, device=device)
            weights[node.name] = drawn.to(region.device)
        if self.step > 0:
            with torch.enable_grad():
                free = {name: weight.requires_grad_(True) for name, weight in weights.items()}
                loss = certified_cross_entropy(bounds_at_slopes(network, region, batch.rows, free), "sum")
                gradients = torch.autograd.grad(loss, list(free.values()))
            weights = {
                name: (weight.detach() - self.step * gradient.sign()).clamp(0, 1)
                for (name, weight), gradient in zip(free.items(), gradients, strict=True)
            }
        return bounds_at_slopes(network, region, batch.rows, weights)


def bounds_at_slopes(network: Network, region: Region, rows: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """CROWN-IBP's bounds of rows [batch, k, outputs] at given lower slopes: [batch, k].

    weights: of the steeper of the hull's two lower lines, by activation, [batch, *shape] in [0, 1].  Above: the chord.
    Sound: yes.  Gradient: exact, through the slopes too.
    """
    found = interval.propagate(network, region)
    lines: dict[str, Enclosure] = {}
    for node in network:
        if node.maximum:
            lines[node.name] = found.balls[node.inputs[0]].bounds
        elif node.product:
            x, y = (found.balls[name].bounds for name in node.inputs)
            lines[node.name] = square_planes(x) if node.inputs[0] == node.inputs[1] else product_planes(x, y)
        elif node.activation:
            before = found.preactivation[node.name]
            hull = node.activation.hull(before.lower, before.upper)
            (s0, i0), (s1, i1) = hull.below
            w = weights[node.name]
            lines[node.name] = Lines(s0 + w * (s1 - s0), i0 + w * (i1 - i0), *hull.above[0])
    rows = rows.reshape(*rows.shape[:2], *network.output_shape)
    return backsubstitution.substitute(network, network.output, rows, region, lines)
