"""Certified training: losses, schedules, recipes and the loop.

Names load on first use, so that importing one part pulls in no other.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optrelax.training.callbacks import Callback, Logged
    from optrelax.training.trainer import EpochMetrics, Training, TrainingProgress, TrainingResult, train
    from optrelax.training.training_runs import TrainingError

_HOMES = {"Callback": "callbacks", "Logged": "callbacks", "TrainingError": "training_runs"}
"""Modules of what is not in `trainer`."""

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
    return getattr(importlib.import_module(f"optrelax.training.{_HOMES.get(name, 'trainer')}"), name)
