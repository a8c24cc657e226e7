"""Backward passes that have no derivative of their own: asking for one is an error, never a silent zero."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from optrelax.autograd_contexts import Context

Backward = Callable[..., object]


def first_order(backward: Backward) -> Backward:
    """For the `backward` of an autograd function: RuntimeError under create_graph=True.

    PyTorch's own decorator marks the results instead, and the mark is lost where the incoming gradient is a constant
    (a sum) or the second derivative is taken for named inputs only: then a part of it would quietly be missing.
    """

    @functools.wraps(backward)
    def guarded(ctx: Context, *grads: Tensor) -> object:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the gradient of a linear program's value cannot be differentiated again; "
                "take the second derivative of a closed form, or leave the LP's loss out of this backward pass"
            )
        return backward(ctx, *grads)

    return guarded
