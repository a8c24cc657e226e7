"""Certified training: losses, schedules, recipes and the loop.

Names load on first use, so that importing one part pulls in no other.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optrelax.training.callbacks import Callback, Logged
    from optrelax.training.trainer import EpochMetrics, Training, TrainingError, TrainingProgress, TrainingResult, train

_TRAINER, _CALLBACKS = "optrelax.training.trainer", "optrelax.training.callbacks"

__all__ = [
    "Callback",
    "EpochMetrics",
    "Logged",
    "Training",
    "TrainingError",
    "TrainingProgress",
    "TrainingResult",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'optrelax.training' has no attribute {name!r}")
    home = _CALLBACKS if name in ("Callback", "Logged") else _TRAINER
    return getattr(importlib.import_module(home), name)
