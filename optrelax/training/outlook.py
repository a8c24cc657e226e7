"""How long a run will take, before its first step."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.certification.estimates import expected_seconds
from optrelax.training.meters import Meter, TrainingProgress

if TYPE_CHECKING:
    from optrelax.training.runs import State
    from optrelax.training.training_runs import TrainingRun

__all__ = ["outlook"]


def outlook(run: TrainingRun, state: State) -> TrainingProgress:
    """Where a run stands before its first step, and the seconds that its steps will take by a few examples.

    The loss and its gradient are timed as at the run's end. Neither weights nor their gradients, running statistics,
    memories of losses or anything drawn are touched. None for the seconds where the loss raises: its step will say so.
    """
    training, epochs = run.training, run.training.epochs
    here = Meter().progress(state.epochs, epochs, state.steps - 1, run.steps, training.eps(state.epochs))
    left = epochs - state.epochs - state.steps / run.steps
    last = (epochs * run.steps - 1) / run.steps
    network, loss, eps = run.evaluated(), training.loss_at(last), training.eps(last)
    like = next(iter(run.parameters.values()))

    def work(index: Tensor) -> None:
        x, labels = run.images[index].to(like), run.labels[index].to(like.device)
        terms = loss(network, training.region(x, eps), labels, x, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(terms.total, list(run.parameters.values()), allow_unused=True)
        _ = [t.flatten()[:1].tolist() for t in found if t is not None]  # an accelerator has worked until it answers

    expected: float | None = None
    drawing = [like.device.index or 0] if like.device.type == "cuda" else []
    with contextlib.suppress(Exception), torch.random.fork_rng(drawing), torch.enable_grad():
        size = -(-training.batch // training.pieces)
        expected = expected_seconds(work, torch.arange(len(run.images), device="cpu"), size, left) / run.processes.count
    return replace(here, expected=expected)
