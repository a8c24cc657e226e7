"""Functions that `torch.compile` leaves alone: the graph breaks around them, and they run as written.

`torch.compiler.disable` says the same, but imports the compiler, which takes longer than `import torch`. Here that
happens on the first call under compilation, when the compiler is there already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_functions: dict[str, Callable[..., object]] = {}


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, at which a compiled graph breaks: solvers, foreign libraries and decisions on values."""
    name = f"{function.__module__}.{function.__qualname__}".replace(".", "_")
    _functions[name] = function
    here = sys.modules[__name__]

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            # The compiler evaluates a module's attributes while it traces, and finds a function marked as disabled.
            return getattr(here, name)(*args, **kwargs)
        return function(*args, **kwargs)

    return guarded


def __getattr__(name: str) -> Any:
    if name not in _functions:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch._dynamo

    value = globals()[name] = torch._dynamo.disable(_functions[name])
    return value
