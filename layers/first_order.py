"""Backward passes that have no derivative of their own: differentiating them is an error, never a silent zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """For the `backward` of an autograd function: a double backward through its results raises RuntimeError.

    PyTorch's own decorator raises only where the incoming gradient itself depends on something, so that the second
    derivative of a sum would quietly be 0.
    """
    once: Backward = once_differentiable(backward)

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            grads = tuple(grad if grad.requires_grad else grad.detach().requires_grad_() for grad in grads)
        return once(ctx, *grads)

    return guarded
