"""Declarations of C functions: what each argument is, how long an array must be, and where it lies for C."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | float | Sequence[Tensor] | None


class Signature:
    """What a C function takes, from a declaration such as `pull(batch, int64 n, double least, a[batch * n], bias?[n])`.

    Without a type a number is an int64 and an array of the kernel's own floating type; `a[...]` holds so many entries
    at least, by the numbers before it; `a[]` as many as its neighbours say; `a?` may be None.  Behind `function*(` the
    arguments go as one struct of these fields.
    """

    def __init__(self, declaration: str) -> None:
        found = re.fullmatch(r"\s*(\w+)(\*?)\((.*)\)\s*", declaration, re.DOTALL)
        if found is None:
            raise ValueError(f"no declaration of a kernel: {declaration!r}")
        self.name, struct, inside = found.groups()
        self.struct = bool(struct)
        self.arguments = [_Argument.read(text) for text in re.split(r",(?![^\[]*\])", inside)]
        self.names = tuple(a.name for a in self.arguments)
        self._arrays = [(i, a) for i, a in enumerate(self.arguments) if a.array]
        self._numbers = [i for i, a in enumerate(self.arguments) if not a.array]
        lengths = "".join(f"{a.length or 0}, " for _, a in self._arrays)
        # A declaration is a constant of the module beside the source, as the source is.
        self._lengths = eval(f"lambda threads, {', '.join(self.names[i] for i in self._numbers)}: ({lengths})")

    @property
    def kinds(self) -> list[type]:
        """The types that ctypes is told: of the arguments, or of the struct's address, and of the thread count."""
        given = [ctypes.POINTER(self.fields)] if self.struct else [a.kind for a in self.arguments]
        return [*given, ctypes.c_int64]

    @functools.cached_property
    def fields(self) -> type[ctypes.Structure]:
        """The struct of the arguments: of 8 bytes each, whatever the floating type."""
        return type(self.name, (ctypes.Structure,), {"_fields_": [(a.name, a.kind) for a in self.arguments]})

    def plain(self, dtype: torch.dtype, given: Sequence[Argument]) -> list[Any]:
        """Numbers and addresses for C; RuntimeError for what the function would misread or overrun."""
        found: list[Any] = list(given)
        if len(found) != len(self.arguments):
            raise RuntimeError(f"{self.name}: takes {', '.join(self.names)}; got {len(found)} arguments")
        lengths = self._lengths(torch.get_num_threads(), *[found[i] for i in self._numbers])
        for (i, argument), length in zip(self._arrays, lengths, strict=True):
            if found[i] is None and argument.optional:
                continue
            found[i] = argument.address(self.name, found[i], dtype, length)
        return found


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    dtype: torch.dtype | None
    """Of an array; None: the kernel's own."""
    array: bool
    optional: bool
    length: str
    several: bool
    """An array of arrays."""
    kind: type

    @classmethod
    def read(cls, text: str) -> _Argument:
        found = re.fullmatch(r"\s*(?:(\w+)\s+)?(\**)(\w+)(\??)(?:\[(.*)\])?\s*", text, re.DOTALL)
        if found is None:
            raise ValueError(f"no argument of a kernel: {text!r}")
        kind, star, name, optional, length = found.groups()
        array = length is not None
        number = ctypes.c_double if kind == "double" else ctypes.c_int64
        dtype = getattr(torch, kind) if array and kind else None
        return cls(name, dtype, array, bool(optional), length or "", bool(star), ctypes.c_void_p if array else number)

    def address(self, kernel: str, given: Any, dtype: torch.dtype, length: int) -> Any:
        """Where an array lies."""
        wanted = dtype if self.dtype is None else self.dtype
        if self.several:
            parts = [self._checked(kernel, t, wanted, 0) for t in given]
            if len(parts) < length:
                raise RuntimeError(f"{kernel}: {self.name} wants {length} arrays, got {len(parts)}")
            return ctypes.cast((ctypes.c_void_p * len(parts))(*parts), ctypes.c_void_p)
        return self._checked(kernel, given, wanted, length)

    def _checked(self, kernel: str, tensor: Tensor | None, wanted: torch.dtype, length: int) -> int:
        if tensor is None:
            raise RuntimeError(f"{kernel}: {self.name} must be given")
        if tensor.dtype is not wanted or not tensor.is_cpu or not tensor.is_contiguous():
            require_fit(f"{kernel}: {self.name}", tensor, wanted, "cpu")
            raise RuntimeError(f"{kernel}: {self.name} wants {wanted}, got {tensor.dtype}")
        if tensor.numel() < length:
            raise RuntimeError(f"{kernel}: {self.name} wants {length} entries, got {tuple(tensor.shape)}")
        return tensor.data_ptr()


def require_fit(name: str, tensor: Tensor, dtype: torch.dtype, device: str) -> None:
    """RuntimeError where a kernel would misread a tensor, as what autocast made in half precision."""
    fits = tensor.dtype == dtype or not tensor.dtype.is_floating_point
    if not fits or tensor.device.type != device or not tensor.is_contiguous():
        raise RuntimeError(
            f"{name}: wants contiguous {dtype} on {'the CPU' if device == 'cpu' else device}, got {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}; under autocast call backward() outside of it"
        )
