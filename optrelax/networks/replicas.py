"""Copies of modules that share their tensors, or own clones of them."""

from __future__ import annotations

import contextlib
import copy
import gc
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of a module, and for each of its modules the one it stands for."""

    module: nn.Module
    originals: dict[int, nn.Module]


def replicate(net: nn.Module, share: bool = True) -> Replica:
    """The module's structure and Python state anew; `share` its tensors, or hold clones of them."""
    memo: dict[int, object] = {}
    modules = list(net.modules())
    for value in _atoms(net):
        memo[id(value)] = value if share or not isinstance(value, Tensor) else _clone(value)
    for module in modules:
        for given in module._parameters.values():  # put in by a functional call, a parameter is a plain tensor
            if share and given is not None and not isinstance(given, nn.Parameter):
                memo[id(given)] = nn.Parameter(given.detach(), given.requires_grad)
        for held in (*module._parameters.values(), *module._buffers.values()):
            if share and held is not None and held.is_inference():  # cannot be exported; what reads it goes by its name
                memo[id(held)] = _clone(held)
        if isinstance(inner := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            memo.setdefault(id(module), copy.deepcopy(inner, memo))  # compiled: what is compiled
    found = copy.deepcopy(net, memo)
    originals = {id(memo[id(m)]): m for m in modules if id(m) in memo}
    for module in found.modules():
        module._compiled_call_impl = None
    return Replica(found, originals)


def _atoms(net: nn.Module) -> Iterator[Tensor | types.ModuleType]:
    """Tensors, and modules of Python, that a deep copy would meet: in containers, objects, modules kept in a list too.

    The garbage collector's way from object to object runs no code of theirs.
    """
    seen, stack = set(), [net]
    while stack:
        value: object = stack.pop()
        if id(value) in seen or isinstance(value, (type, types.FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, types.ModuleType)):
            yield value
        elif isinstance(value, nn.Module) or not hasattr(type(value), "__deepcopy__"):
            stack += gc.get_referents(value)


def _clone(tensor: Tensor) -> Tensor:
    found = tensor.detach().clone()
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


class _Forgetful(dict[Any, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: object, value: object) -> None:
        return None


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Parametrisations are computed at each use: `parametrize.cached` takes a copy for the module it is a copy of."""
    kept, nothing = parametrize._cache, _Forgetful()
    parametrize._cache = nothing
    try:
        yield
    finally:
        if parametrize._cache is nothing:  # else another thread has left its block of cached ones
            parametrize._cache = kept
