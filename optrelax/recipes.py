"""Recipes: the settings of a training run by name, each a row of flat, overridable numbers.

A name is data-network-method, such as `mnist-fc-small-box`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from optrelax import models
from optrelax.datasets import Dataset, normalization
from optrelax.errors import suggest
from optrelax.losses import AdversarialLoss, CertifiedLoss, Loss, NaturalLoss
from optrelax.relaxations import resolve
from optrelax.schedules import Linear, Schedule, Smooth, Steps
from optrelax.training import Training

__all__ = ["Recipe", "names", "recipe"]

_RAMPS: dict[str, Callable[[float, float, float, float], Schedule]] = {"linear": Linear, "smooth": Smooth}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run: data set, network, method and numbers.

    method: "natural", "pgd", or "certified" with `relaxation`.  eps: radius of the region in pixels of [0, 1].
    After `warmup` epochs of natural loss come `mixing` epochs in which eps rises from 0, kappa (weight of the natural
    loss) falls from 1 and beta (weight of `relaxation` against `other`) from 1 to the values given, by `ramp`.
    lr is multiplied by lr_factor at each of the epochs `milestones`.  iterations: of an LP layer's solver at each step;
    its bound holds at any number.
    """

    name: str
    data: str
    model: str
    method: str
    eps: float
    epochs: int
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
    iterations: int = 12

    def __post_init__(self) -> None:
        where = f"recipe {self.name!r}"
        if self.method not in ("natural", "pgd", "certified"):
            raise ValueError(f"{where}: {suggest(self.method, ('natural', 'pgd', 'certified'))}, got {self.method!r}")
        if (self.method == "certified") != (self.relaxation is not None):
            raise ValueError(
                f"{where}: a relaxation goes with method 'certified' and no other, got method {self.method!r} and "
                f"relaxation {self.relaxation!r}"
            )
        if not self.eps >= 0:
            raise ValueError(f"{where}: eps must be >= 0, got {self.eps}")
        if self.ramp not in _RAMPS:
            raise ValueError(f"{where}: ramp must be one of {', '.join(_RAMPS)}, got {self.ramp!r}")
        if self.iterations < 0:
            raise ValueError(f"{where}: iterations must be >= 0, got {self.iterations}")
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
        """The recipe with other numbers; with `epochs`, warm-up, mixing and milestones not given keep their shares.

        Raises ValueError for a name that is no setting.
        """
        settings = [f.name for f in fields(self) if f.name not in ("name", "data", "model", "method")]
        for key in changes:
            if key not in settings:
                raise ValueError(f"recipe {self.name!r}: no setting {key!r}; {suggest(key, settings)}")
        if "epochs" in changes:
            share = changes["epochs"] / self.epochs
            scaled: dict[str, Any] = {
                "warmup": self.warmup * share,
                "mixing": self.mixing * share,
                "milestones": tuple(epoch * share for epoch in self.milestones),
            }
            changes = scaled | changes
        return replace(self, **changes)

    def network(self, data: Dataset, seed: int = 0) -> nn.Sequential:
        """The untrained network for this data, normalisation included; the seed alone decides its weights."""
        return models.build(self.model, data.input_shape, data.classes, seed, normalize=normalization(self.data))

    def loss(self) -> Loss:
        """The loss at the end of training."""
        if self.method == "natural":
            return NaturalLoss(l1=self.l1)
        if self.method == "pgd":
            return AdversarialLoss(kappa=self.kappa, l1=self.l1)
        return CertifiedLoss(
            self._bounded_by(),
            beta=self.beta,
            other=resolve(self.other),
            elision=self.elision,
            kappa=self.kappa,
            l1=self.l1,
        )

    def _bounded_by(self) -> Any:
        """The relaxation; an LP layer with the solver that training wants: a few iterations, not an optimum."""
        assert self.relaxation is not None
        relaxation = resolve(self.relaxation)
        solver = getattr(relaxation, "solver", None)
        if solver is None:
            return relaxation
        return replace(relaxation, solver=replace(solver, max_iterations=self.iterations))

    def training(self, seed: int = 0) -> Training:
        """The settings as the objects that `train` takes."""
        lr = Steps(self.lr, self.lr_factor, self.milestones)
        if self.method == "natural":
            return Training(loss=self.loss(), epochs=self.epochs, lr=lr, batch=self.batch, seed=seed)
        ramp = _RAMPS[self.ramp]

        def moving(start: float, end: float) -> Schedule:
            return ramp(start, end, self.warmup, self.mixing)

        return Training(
            loss=self.loss(),
            epochs=self.epochs,
            eps=moving(0.0, self.eps),
            kappa=moving(1.0, self.kappa),
            beta=moving(1.0, self.beta) if self.beta < 1 else None,
            lr=lr,
            batch=self.batch,
            seed=seed,
        )


# Our own settings for small networks. Natural training leaves eps and the ramps aside.
_DIGITS: dict[str, Any] = {
    "data": "digits",
    "model": "fc-small",
    "eps": 0.1,
    "epochs": 30,
    "warmup": 1.5,
    "mixing": 15.0,
    "kappa": 0.5,
    "lr": 2e-3,
    "milestones": (24.0,),
    "batch": 50,
}
_MNIST: dict[str, Any] = {
    "data": "mnist",
    "model": "fc-small",
    "eps": 0.1,
    "epochs": 100,
    "warmup": 5.0,
    "mixing": 50.0,
    "l1": 5e-6,
    "milestones": (65.0, 95.0),
}
_METHODS: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "pgd": {"method": "pgd"},
    "box": {"method": "certified", "relaxation": "box"},
    "crown-ibp": {"method": "certified", "relaxation": "crown-ibp"},
    "crown": {"method": "certified", "relaxation": "crown"},
    "triangle": {"method": "certified", "relaxation": "triangle"},
}
_ROWS = {
    row.name: row
    for base in (_DIGITS, _MNIST)
    for method, settings in _METHODS.items()
    for row in [Recipe(name=f"{base['data']}-{base['model']}-{method}", **base, **settings)]
}


def names() -> list[str]:
    """Names of the recipes."""
    return list(_ROWS)


def recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with some of its numbers changed.  ValueError for an unknown name or setting."""
    if name not in _ROWS:
        raise ValueError(f"unknown recipe {name!r}; {suggest(name, _ROWS)}")
    return _ROWS[name].override(**changes)
