"""Values as something that compares equal as long as they are the same to whoever reads them."""

from __future__ import annotations

import enum
import functools
import inspect
import logging
import pathlib
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

PLAIN: tuple[type, ...] = (int, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
PLAIN += (enum.Enum, type, range, torch.memory_format, torch.layout, pathlib.PurePath, logging.Logger, slice)
PLAIN += (types.BuiltinFunctionType, type(Ellipsis), types.MethodDescriptorType, types.WrapperDescriptorType)
PLAIN += (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
DEEPEST = 6
MISSING = object()


class _Plain:
    """Holds nothing beside its attributes."""


_HEAP, _IMMUTABLE, _WORD = 1 << 9, 1 << 8, object.__basicsize__ // 2
_ROOM = _Plain.__basicsize__ - object.__basicsize__  # of a class's own, for attributes and weak references


def _in_python(cls: type) -> bool:
    """Whether a class statement made this class: a slot a word, and no room for what shows in no attribute."""
    if not cls.__flags__ & _HEAP or cls.__flags__ & _IMMUTABLE:
        return False
    base, slots = cls.__base__ or object, sum(inspect.ismemberdescriptor(s) for s in vars(cls).values())
    same = cls.__itemsize__ == base.__itemsize__
    return same and cls.__basicsize__ - base.__basicsize__ <= _WORD * slots + _ROOM


class _Same:
    """Equal to another of the same object, as long as that lives."""

    def __init__(self, value: object) -> None:
        self.ref = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.ref() is other.ref() and self.ref() is not None

    __hash__ = None  # type: ignore[assignment]


class Unknown(Exception):
    """An object whose changes cannot be seen."""


def contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return MISSING


def freeze(value: Any, depth: int) -> object:
    """Something that compares equal as long as the value is the same to whoever reads it."""
    if value is MISSING or isinstance(value, PLAIN):
        return type(value), value
    match value:
        case Tensor() | nn.Module() | types.CodeType() | types.ModuleType():
            return _Same(value)
        case types.FunctionType(__code__=code):
            return _Same(value), _Same(code), freeze(value.__defaults__, depth), freeze(value.__kwdefaults__, depth)
    if depth > DEEPEST:
        raise Unknown
    match value:
        case list() | tuple():
            return type(value), tuple(freeze(v, depth + 1) for v in value)
        case set() | frozenset():
            if not all(isinstance(v, PLAIN) for v in value):
                raise Unknown
            return type(value), frozenset(value)
        case dict() | types.MappingProxyType():
            return type(value), tuple((k, freeze(v, depth + 1)) for k, v in value.items())
        case types.MethodType():
            return freeze(value.__func__, depth + 1), freeze(value.__self__, depth + 1)
        case staticmethod() | classmethod():
            return type(value), freeze(value.__func__, depth + 1)
        case property():
            return type(value), freeze(value.fget, depth + 1)
        case functools.partial():
            return freeze((value.func, value.args, value.keywords), depth + 1)
    # The class is asked: an object's own __getattr__ may do anything.
    if hasattr(type(value), "cache_info"):  # what it remembers shows nowhere
        raise Unknown
    if hasattr(type(value), "tobytes") and hasattr(type(value), "nbytes"):  # an array
        try:
            return type(value), value.tobytes()
        except AttributeError as error:  # numpy.ma.masked, which makes its filling value and cannot be written
            raise Unknown from error
    ours = type(value).__module__.startswith("optrelax.")
    if type(value).__weakrefoffset__ and (ours or isinstance(value, torch._C._FunctionBase)):
        return _Same(value)
    if type(value) is types.SimpleNamespace:
        return type(value), freeze(vars(value), depth + 1)
    # A class written in C may hold what no attribute shows, and so may what is derived from it.
    if any(cls is not object and not _in_python(cls) for cls in type(value).__mro__):
        raise Unknown
    slots = [slot for cls in type(value).__mro__ for slot in vars(cls).values() if inspect.ismemberdescriptor(slot)]
    inner = [_slot(slot, value) for slot in slots]
    return type(value), freeze([*inner, getattr(value, "__dict__", {})], depth + 1)


def _slot(slot: Any, value: object) -> object:
    try:
        return slot.__get__(value)
    except AttributeError:  # not filled yet
        return MISSING
