"""What a module's forward may depend on, as it was at capture; whether it still is so, in some microseconds.

Seen are: the modules, their modes, types and hooks; the names, shapes, types and ties of their tensors (whose values
a network reads at each use); plain Python values among their attributes, in containers and in objects too; the
functions of the user's classes, and the globals, class attributes and closures that these read; and the values of the
tensors that a graph holds as they were: constants that decide where numbers go (indices), and those that forward makes
numbers of.
"""

from __future__ import annotations

import functools
import gc
import pathlib
import sys
import types
import weakref
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.networks.freezing import MISSING, PLAIN, Unknown, contents, freeze
from optrelax.networks.graph import kinds_of

_STANDARD = frozenset(vars(nn.Module()))
_SIMPLE = (int, float, str, list, tuple, dict, types.FunctionType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_PACKAGES = frozenset({"site-packages", "dist-packages"})
_LIBRARIES = (f"{sys.base_prefix}/lib", f"{sys.prefix}/lib", "<frozen")
# Through these a function reads what no name of it shows.
_BLIND = frozenset({"open", "globals", "eval", "exec", "__import__", "import_module", "read_text", "read_bytes"})
_NOT_CALLED = frozenset({"__init__", "__repr__", "__new__"})
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def global_hooks() -> int:
    """How many forward hooks of all modules there are, but for PyTorch's own, which only watch (as a counter of
    operations does)."""
    tables = [vars(nn.modules.module)[name] for name in _GLOBAL_HOOKS]
    if not any(tables):
        return 0
    return sum(not getattr(hook, "__module__", "").startswith("torch.") for table in tables for hook in table.values())


def _reference(value: object) -> Callable[[], object]:
    return weakref.ref(value) if value is not None else (lambda: None)


class Snapshot:
    """The state of a module at one moment; holds no reference to the module itself.

    `known` is False where forward may read something whose changes show nowhere: then nothing may be kept for it.
    """

    def __init__(self, net: nn.Module) -> None:
        self.known = True
        self._states: list[tuple[dict[str, object], dict[str, object]]] = []
        self._children: list[tuple[dict[str, object], tuple[Callable[[], object], ...]]] = []
        self._kinds: list[tuple[Callable[[], object], type]] = []
        self._keys: list[tuple[dict[object, object], tuple[object, ...]]] = []
        self._absent: list[tuple[dict[str, object], str]] = []
        self._tensors: list[tuple[dict[str, Any], str, torch.Size, torch.dtype, torch.device]] = []
        self._deep: list[tuple[Mapping[str, object], str, object]] = []
        self._cells: list[tuple[object, object]] = []
        self._fixed: list[tuple[Callable[[], Tensor], Tensor]] = []
        self._seen: set[int] = set()
        self._registered = set(map(id, net.modules()))
        self._global_hooks = global_hooks()
        self._asks_training = False
        self._waiting: list[object] = [net]
        while self._waiting:  # functions call functions, deeper than Python's stack may go
            self._look_into(self._waiting.pop())
        self.kinds = kinds_of(net)
        """Types and devices of the tensors, and the name of one of each."""
        self._ties = _ties(net)
        self._trained = _trained(net) if self._asks_training else None
        self._root = vars(net)

    def holds(self, net: nn.Module) -> bool:
        """Whether `net` is as it was; False where that cannot be known."""
        try:
            if vars(net) is not self._root:
                return False
            if not self.known:
                return False
            if any(state != wanted for state, wanted in self._states):
                return False
        except (RuntimeError, ValueError, TypeError):  # a tensor or array was put in place of another: no bool
            return False
        for table, keys in self._keys:
            if tuple(table) != keys:
                return False
        for children, refs in self._children:
            if any(r() is not c for r, c in zip(refs, children.values(), strict=True)):
                return False
        if any(type(ref()) is not kind for ref, kind in self._kinds):
            return False
        if global_hooks() != self._global_hooks:
            return False
        if any(tensors[name] is not None for tensors, name in self._absent):
            return False
        for tensors, name, shape, dtype, device in self._tensors:
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
                return False
        if self._ties and _ties(net) != self._ties:
            return False
        if self._trained is not None and self._trained != _trained(net):
            return False
        try:
            return (
                all(freeze(where.get(name, MISSING), 0) == was for where, name, was in self._deep)
                and all(freeze(contents(cell), 0) == was for cell, was in self._cells)
                and all(torch.equal(read(), was) for read, was in self._fixed)
            )
        except (Unknown, RuntimeError, AttributeError):
            return False

    def fix(self, constants: list[tuple[Callable[[], Tensor], Tensor]]) -> None:
        """Constants, as functions that read them, that must keep these values."""
        self._fixed += constants

    def _module(self, module: nn.Module) -> None:
        state = vars(module)
        self._states.append((state, dict(state)))
        self._kinds.append((weakref.ref(module), type(module)))
        if state["_modules"]:
            # An id would do for the next module made in the place of one that is gone.
            self._children.append((state["_modules"], tuple(map(_reference, state["_modules"].values()))))
            self._waiting += state["_modules"].values()
        self._keys += [(state[key], tuple(state[key])) for key in (*_HOOKS, *_TENSORS, "_modules")]
        for key in _TENSORS:
            for name, tensor in state[key].items():
                if id(module) not in self._registered:
                    self._note(state[key], name, tensor)  # the graph holds this tensor, and reads no name
                elif tensor is None:
                    self._absent.append((state[key], name))
                else:
                    self._tensors.append((state[key], name, tensor.shape, tensor.dtype, tensor.device))
        for name, value in state.items():
            if name not in _STANDARD and not isinstance(value, PLAIN):
                self._note(state, name, value)
        self._waiting.append(type(module))

    def _classes(self, kind: type) -> None:
        """What the classes of the user's among a type and its bases hold."""
        for cls in kind.__mro__:
            if id(cls) in self._seen or _is_library(cls.__module__):
                continue
            self._seen.add(id(cls))
            self._waiting.append(type(cls))  # where a class finds what it has not itself
            for name, value in vars(cls).items():
                called = isinstance(value, types.FunctionType) and name not in _NOT_CALLED
                if called or not name.startswith("__"):
                    self._note(vars(cls), name, value)

    def _note(self, where: Mapping[str, object], name: str, value: object) -> None:
        """Keep a value that must stay as it is, and what the functions in it read."""
        if self._note_frozen(where, name, value):
            self._waiting.append(value)

    def _note_frozen(self, where: Mapping[str, object], name: str, value: object) -> bool:
        """Whether its changes can be seen; where they cannot, nothing else matters."""
        try:
            self._deep.append((where, name, freeze(value, 0)))
        except Unknown:
            self.known = False
        return self.known

    def _look_into(self, value: object) -> None:
        if isinstance(value, type):
            return self._classes(value)
        if id(value) in self._seen or isinstance(value, (PLAIN, Tensor)):
            return
        self._seen.add(id(value))
        match value:
            case nn.Module():
                self._module(value)
            case types.FunctionType():
                self._function(value)
            case types.ModuleType():
                if not _is_library(value.__name__):
                    self._read_module(value, vars(value).keys())
            case _:  # containers, methods, objects of any kind
                self._waiting += [type(value), *gc.get_referents(value)]

    def _function(self, function: types.FunctionType) -> None:
        if function.__module__ is not None and function.__module__.startswith(("torch.", "optrelax.")):
            return
        names = _names(function.__code__)
        self._waiting += [function.__defaults__, function.__kwdefaults__]
        for cell in function.__closure__ or ():
            content = contents(cell)
            try:
                self._cells.append((cell, freeze(content, 0)))
            except Unknown:
                self.known = False
            if isinstance(content, types.ModuleType):
                self._read_module(content, names)
            else:
                self._waiting.append(content)
        own = not _is_installed(function.__code__.co_filename)
        self._asks_training |= "requires_grad" in names
        self.known &= not (own and names & _BLIND - function.__globals__.keys())
        for name in names:
            found = function.__globals__.get(name, sys.modules.get(name, MISSING) if own else MISSING)
            if isinstance(found, types.ModuleType):
                self._read_module(found, names)
            elif found is not MISSING:
                self._note(function.__globals__, name, found)

    def _read_module(self, module: types.ModuleType, names: Set[str], outer: tuple[types.ModuleType, ...] = ()) -> None:
        """What a function that reads these names may read of a module, and of the modules of the user's in it."""
        if module.__name__.startswith("torch") or module in outer:
            return
        library = _is_library(module.__name__)
        for name in names & vars(module).keys():
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                if not _is_library(value.__name__):
                    self._note_frozen(vars(module), name, value)
                    self._read_module(value, names, (*outer, module))
            elif not library or name == "environ" or isinstance(value, _SIMPLE):
                self._note(vars(module), name, value)


@functools.lru_cache(maxsize=1024)
def _is_library(name: str | None) -> bool:
    """Whether a module comes with Python or was installed: it does not change under way."""
    if name is None or name.partition(".")[0] in (*sys.stdlib_module_names, "torch", "optrelax"):
        return name != "__main__"
    return _is_installed(getattr(sys.modules.get(name), "__file__", None) or "")


def _is_installed(path: str) -> bool:
    """Whether a file is Python's own, or lies where packages are installed: for all, for a user, for an environment."""
    return path.startswith(_LIBRARIES) or not _PACKAGES.isdisjoint(pathlib.PurePath(path).parts)


def _names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes that a function may read, its inner functions too."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # for getattr
            found.add(constant)
    return found


def _ties(net: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters and buffers that are one tensor."""
    groups: dict[int, list[str]] = {}
    for path, module in net.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                groups.setdefault(id(tensor), []).append(f"{path}.{name}")
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _trained(net: nn.Module) -> list[bool]:
    """Which of the tensors take a gradient, for the functions that ask it."""
    return [tensor.requires_grad for tensor in (*net.parameters(), *net.buffers())]
