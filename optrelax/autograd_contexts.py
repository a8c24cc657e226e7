"""What PyTorch hands to both halves of an autograd Function, with the types of what it keeps between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from torch import Tensor

    class Context(FunctionCtx):
        saved_tensors: tuple[Tensor, ...]
        needs_input_grad: tuple[bool, ...]

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...

        # Whatever else a Function notes for its backward pass lies here as well, under names of its own.
        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: object) -> None: ...
else:
    Context = FunctionCtx
