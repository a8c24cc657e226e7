"""What a step does with its gradient: optimisers by name, and the running average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from optrelax.checks import require_range
from optrelax.errors import suggest
from optrelax.training.augmentation import AUGMENTATIONS

__all__ = ["OPTIMIZERS", "Optimisation", "WeightAverage", "optimizer"]

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, **options: torch.optim.Adam(parameters, **options),
    "adamw": lambda parameters, **options: torch.optim.AdamW(parameters, **options),
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
}
"""By name; momentum of "sgd" is 0.9. Weight decay is part of the gradient, but apart from it in "adamw"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """What is done with images before a step and with its gradient, of a recipe and of `Training`.

    optimizer: "adam", "adamw" or "sgd" (momentum 0.9).  weight_decay: its own option, not part of the loss reported.
    clip_norm: a gradient whose l2 norm over all parameters is greater is scaled down to it; None: none is.
    average: decay of a running average of the weights, in (0, 1), which takes the place of the weights in all that is
    stored and, at the end, in the network; 0: the weights as they are.
    augment: "crop" (by up to four pixels), "flip" or "crop-flip": random changes of every image at every step.
    """

    optimizer: str = "adam"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    average: float = 0.0
    augment: str | None = None

    def require_known(self) -> None:
        """ValueError for a name that is none, or a number out of range."""
        owner = type(self).__name__
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"{owner}: no optimizer {self.optimizer!r}; {suggest(self.optimizer, OPTIMIZERS)}")
        if self.augment is not None and self.augment not in AUGMENTATIONS:
            raise ValueError(f"{owner}: no augment {self.augment!r}; {suggest(self.augment, AUGMENTATIONS)}")
        require_range(owner, ">= 0 and finite", weight_decay=self.weight_decay)
        require_range(owner, "> 0 and finite", optional=True, clip_norm=self.clip_norm)
        require_range(owner, "in [0, 1)", average=self.average)

    @property
    def optimisation(self) -> dict[str, object]:
        """These options by name."""
        return {f.name: getattr(self, f.name) for f in fields(Optimisation)}


def optimizer(name: str, parameters: object, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS for parameters."""
    # Without decay the call is the plain one, so that a step is the same to the bit.
    return OPTIMIZERS[name](parameters, lr=lr, **({"weight_decay": weight_decay} if weight_decay else {}))


class WeightAverage:
    """Exponential moving average of a module's parameters and of its buffers of floating point.

    decay: share of the past, in (0, 1).  At step n it is at most (1 + n) / (10 + n), so that the first weights are
    soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.clone() for name, value in _floating(module).items()}

    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in _floating(module).items():
            self.values[name].lerp_(value, share)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take up a stored average.  ValueError where it is of other weights."""
        if {name: value.shape for name, value in values.items()} != {n: v.shape for n, v in self.values.items()}:
            raise ValueError("the average of the weights has other names or shapes than the weights")
        self.put(self.values, values)

    def install(self, module: nn.Module) -> None:
        """Give the module the average, for good."""
        self.put(_floating(module), self.values)

    @contextlib.contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """The module has the average inside, and its own weights again after it."""
        own = {name: value.clone() for name, value in _floating(module).items()}
        self.install(module)
        try:
            yield
        finally:
            self.put(_floating(module), own)

    @staticmethod
    def put(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy tensors in place, by name."""
        for name, value in values.items():
            into[name].copy_(value)


def _floating(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged, apart from any graph; a count of batches is none."""
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
