"""Copies of modules that share their tensors, or own clones of them."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of a module, and for each of its modules the one it stands for."""

    module: nn.Module
    originals: dict[int, nn.Module]


def replicate(net: nn.Module, share: bool = True) -> Replica:
    """The module's structure and Python state anew; `share` its tensors, or hold clones of them."""
    memo: dict[int, Any] = {}
    modules = list(net.modules())
    for module in modules:
        for tensor in _tensors(vars(module)):
            memo[id(tensor)] = tensor if share else _clone(tensor)
        for value in vars(module).values():
            if isinstance(value, types.ModuleType):
                memo[id(value)] = value
        for given in module._parameters.values():  # put in by a functional call, a parameter is a plain tensor
            if share and given is not None and not isinstance(given, nn.Parameter):
                memo[id(given)] = nn.Parameter(given.detach(), given.requires_grad)
        if isinstance(inner := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            memo.setdefault(id(module), copy.deepcopy(inner, memo))  # compiled: what is compiled
    found = copy.deepcopy(net, memo)
    originals = {id(memo[id(m)]): m for m in modules if id(m) in memo}
    for module in found.modules():
        module._compiled_call_impl = None
    return Replica(found, originals)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case list() | tuple() | set() if depth < 4:
            for v in value:
                yield from _tensors(v, depth + 1)
        case dict() if depth < 4:
            yield from _tensors(list(value.values()), depth)


def _clone(tensor: Tensor) -> Tensor:
    found = tensor.detach().clone()
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
