"""Recipes: the settings of a training run by name, each a row of flat, overridable numbers.

A name is data-network-method, such as `mnist-fc-box`; the rows are in `optrelax.training.recipe_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from optrelax.checks import require_choice, require_range
from optrelax.data.datasets import normalization
from optrelax.data.splits import Dataset
from optrelax.errors import suggest
from optrelax.networks import models
from optrelax.regions import norms
from optrelax.relaxations import resolve
from optrelax.training.loss_terms import Loss
from optrelax.training.losses import AdversarialLoss, CertifiedLoss, NaturalLoss
from optrelax.training.optimisation import Optimisation
from optrelax.training.recipe_budgets import BUDGETS, cut
from optrelax.training.schedules import LinearRamp, Schedule, SmoothRamp, Stages, StepDecay
from optrelax.training.trainer import Training

__all__ = ["BUDGETS", "METHODS", "Recipe", "names", "recipe"]

_RAMPS: dict[str, Callable[[float, float, float, float], Schedule]] = {"linear": LinearRamp, "smooth": SmoothRamp}
METHODS = ("natural", "pgd", "certified", "fused", "landscape", "sabr", "mtl-ibp", "cc-ibp", "exp-ibp", "colt")
"""Kinds of losses; those of `_BOUNDED` take a relaxation."""
_BOUNDED = ("certified", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Optimisation):
    """One training run: data set, network, method and numbers.

    method: one of METHODS; "certified" and "fused" come with `relaxation`.  eps: radius of the region in pixels of
    [0, 1], in the `norm` "linf", "l2" or "l1"; clipped: no entry of a region leaves [0, 1].  After `warmup` epochs of
    natural loss come `mixing` epochs in which eps rises from 0, kappa (weight of the natural loss) falls from 1 and
    beta (weight of `relaxation` against `other`) from 1 to the values given, by `ramp`.
    lr is multiplied by lr_factor at each of the epochs `milestones`.
    stages: relaxations that take turns, each with the epoch at which it begins; the last one is `relaxation`.
    iterations, gap: budget and target (certified relative gap) of an LP layer's solver at each step; its bound holds
    at any, and what misses the target falls back to a closed form.
    mix: SABR's share of the radius, or the weight of the bound in MTL-, CC- and EXP-IBP.
    latent: stages of COLT, the first on the input; they begin evenly once eps is reached.
    smoothing: "rgs" or "pgpe" with `sigma` and `samples`.  initial: "interval" for the weights of Shi et al. 2021,
    regularise: weight of their regularisers.
    subset: evenly spaced training images, None for all.
    optimizer, weight_decay, clip_norm, average, augment: see `Optimisation`.
    natural_start: kappa before the ramp; 0 where the robust loss alone is trained from the first step on.
    certified_eps: the radius to certify at, where it is not that of training.
    source: whose settings these are.
    """

    name: str
    data: str
    model: str
    method: str
    eps: float
    epochs: int
    norm: str = "linf"
    clipped: bool = True
    warmup: float = 0.0
    mixing: float = 0.0
    relaxation: str | None = None
    other: str = "box"
    kappa: float = 0.0
    beta: float = 1.0
    l1: float = 0.0
    elision: bool = True
    ramp: str = "linear"
    lr: float = 5e-4
    lr_factor: float = 0.1
    milestones: tuple[float, ...] = ()
    batch: int = 100
    stages: tuple[tuple[str, float], ...] = ()
    iterations: int = 16
    gap: float = 1e-3
    mix: float = 0.4
    latent: int = 2
    smoothing: str | None = None
    sigma: float = 1e-3
    samples: int = 2
    initial: str = "default"
    regularise: float = 0.0
    subset: int | None = None
    natural_start: float = 1.0
    certified_eps: float | None = None
    source: str = "ours"

    def __post_init__(self) -> None:
        where = f"recipe {self.name!r}"
        if self.method not in METHODS:
            raise ValueError(f"{where}: no method {self.method!r}; {suggest(self.method, METHODS)}")
        if (self.method in _BOUNDED) != (self.relaxation is not None):
            raise ValueError(
                f"{where}: a relaxation goes with method {' or '.join(map(repr, _BOUNDED))} and no other, got method "
                f"{self.method!r} and relaxation {self.relaxation!r}"
            )
        if self.norm not in norms():
            raise ValueError(f"{where}: norm must be one of {', '.join(norms())}, got {self.norm!r}")
        require_range(where, ">= 0", eps=self.eps)
        for name, known in (("ramp", tuple(_RAMPS)), ("initial", ("default", "interval"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{where}: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        require_choice(where, "smoothing", self.smoothing, "rgs", "pgpe", None)
        require_range(where, ">= 0", iterations=self.iterations)
        require_range(where, "in [0, 1]", natural_start=self.natural_start)
        require_range(where, "at least 1", latent=self.latent)
        if self.stages and self.stages[-1][0] != self.relaxation:
            raise ValueError(
                f"{where}: the last of stages must be the relaxation {self.relaxation!r}, got {self.stages[-1][0]!r}"
            )
        self._check_epochs(where)

    def _check_epochs(self, where: str) -> None:
        if self.warmup < 0 or self.mixing < 0:
            raise ValueError(
                f"{where}: warmup and mixing must be >= 0 epochs, got warmup {self.warmup}, mixing {self.mixing}"
            )
        if self.method != "natural" and self.warmup + self.mixing >= self.epochs:
            raise ValueError(
                f"{where}: warmup and mixing take {self.warmup + self.mixing} of {self.epochs} epochs, so training "
                "would end before eps is reached"
            )

    def override(self, **changes: Any) -> Recipe:
        """The recipe with other numbers; with `epochs`, all other epochs that are not given keep their shares.

        Another relaxation takes the place of all stages.  Raises ValueError for a name that is no setting.
        """
        settings = [f.name for f in fields(self) if f.name not in ("name", "data", "model", "method", "source")]
        for key in changes:
            if key not in settings:
                raise ValueError(f"recipe {self.name!r}: no setting {key!r}; {suggest(key, settings)}")
        if "relaxation" in changes and changes["relaxation"] != self.relaxation:
            changes = {"stages": ()} | changes
        if "epochs" in changes:
            share = changes["epochs"] / self.epochs
            scaled: dict[str, object] = {
                "warmup": self.warmup * share,
                "mixing": self.mixing * share,
                "milestones": tuple(epoch * share for epoch in self.milestones),
                "stages": tuple((name, begin * share) for name, begin in self.stages),
            }
            changes = scaled | changes
        return replace(self, **changes)

    def within(self, budget: str) -> Recipe:
        """The recipe cut to a budget of BUDGETS: fewer epochs, and evenly spaced images where bounds cost much."""
        if budget not in BUDGETS:
            raise ValueError(f"recipe {self.name!r}: budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
        return self.override(**cut(self, budget))

    def network(self, data: Dataset, seed: int = 0) -> nn.Sequential:
        """The untrained network for this data, normalisation included; the seed alone decides its weights."""
        net = models.build(self.model, data.input_shape, data.classes, seed, normalize=normalization(self.data))
        if self.initial == "interval":
            import torch

            from optrelax.training.interval_training import initialise

            initialise(net, torch.Generator().manual_seed(seed), input_shape=data.input_shape)
        return net

    def loss(self) -> Loss | Stages[Loss]:
        """The loss at the end of training, or its `Stages`."""
        if self.method == "colt":
            return self._latent()
        if not self.stages:
            return self._wrapped(self._base(self.relaxation))
        losses = tuple(self._wrapped(self._base(name)) for name, _ in self.stages)
        return Stages(losses, tuple(begin for _, begin in self.stages))

    def _base(self, relaxation: str | None) -> Loss:
        shared: dict[str, Any] = {"kappa": self.kappa, "l1": self.l1}
        if self.method == "natural":
            return NaturalLoss(l1=self.l1)
        if self.method == "pgd":
            return AdversarialLoss(**shared)
        if self.method == "certified":
            assert relaxation is not None
            return self._certified(relaxation, shared)
        from optrelax.training.robust_losses import ExpressiveLoss, FusedLoss, LandscapeLoss, SmallBoxLoss

        if self.method == "fused":
            assert relaxation is not None
            return FusedLoss(relaxation, beta=self.beta, **shared)
        if self.method == "landscape":
            return LandscapeLoss(**shared)
        if self.method == "sabr":
            return SmallBoxLoss(share=self.mix, **shared)
        return ExpressiveLoss(form=self.method.removesuffix("-ibp"), alpha=self.mix, **shared)  # type: ignore[arg-type]

    def _latent(self) -> Stages[Loss]:
        """COLT: one stage after another, the first until eps is reached and its share of what is left."""
        from optrelax.training.latent_losses import LatentLoss

        reached = self.warmup + self.mixing
        each = (self.epochs - reached) / self.latent
        losses = [self._wrapped(LatentLoss(stage=i, kappa=self.kappa, l1=self.l1)) for i in range(self.latent)]
        return Stages(tuple(losses), (0.0, *(reached + i * each for i in range(1, self.latent))))

    def _certified(self, relaxation: str, shared: dict[str, Any]) -> Loss:
        """The loss on a relaxation's margins; an LP layer gets the solver that training wants: a budget, no optimum."""
        made: Any = resolve(relaxation)
        mixed = self.beta < 1 or not self.elision
        if not made.solves:
            return CertifiedLoss(made, beta=self.beta, other=resolve(self.other), elision=self.elision, **shared)
        from optrelax.training.lp_losses import LPLoss

        if mixed:
            raise ValueError(f"recipe {self.name!r}: beta and elision are not for LP layers, got {relaxation!r}")
        layer = replace(made, solver=replace(made.solver, max_iterations=self.iterations, tol=self.gap))
        return LPLoss(layer=layer, **shared)

    def _wrapped(self, loss: Loss) -> Loss:
        """The loss with the regularisers and the smoothing around it."""
        if self.regularise > 0:
            from optrelax.training.interval_training import IntervalRegularised

            loss = IntervalRegularised(loss, eps=self.eps, weight=self.regularise)
        if self.smoothing is not None:
            from optrelax.training.smoothing import GradientSmoothing, ParameterExploration

            kind = GradientSmoothing if self.smoothing == "rgs" else ParameterExploration
            loss = kind(loss, sigma=self.sigma, samples=self.samples)
        return loss

    def training(self, seed: int = 0, pieces: int = 1) -> Training:
        """The settings as the objects that `train` takes."""
        lr = StepDecay(self.lr, self.lr_factor, self.milestones)
        same: dict[str, Any] = {"epochs": self.epochs, "lr": lr, "batch": self.batch, "seed": seed, "pieces": pieces}
        same["clip"] = (0.0, 1.0) if self.clipped else None
        same |= self.optimisation
        if self.method == "natural":
            return Training(loss=self.loss(), **same)
        ramp = _RAMPS[self.ramp]

        def moving(start: float, end: float) -> Schedule:
            return ramp(start, end, self.warmup, self.mixing)

        return Training(
            loss=self.loss(),
            eps=moving(0.0, self.eps),
            norm=self.norm,
            kappa=moving(self.natural_start, self.kappa),
            beta=moving(1.0, self.beta) if self.beta < 1 else None,
            **same,
        )


def names() -> list[str]:
    """Names of the recipes."""
    from optrelax.training.recipe_rows import ROWS

    return list(ROWS)


def recipe(name: str, budget: str = "full", /, **changes: Any) -> Recipe:
    """A recipe by name within a budget, with some of its numbers changed.

    Raises ValueError for an unknown name, budget or setting.
    """
    from optrelax.training.recipe_rows import ROWS

    if name not in ROWS:
        raise ValueError(f"unknown recipe {name!r}; {suggest(name, ROWS)}")
    return ROWS[name].within(budget).override(**changes)
