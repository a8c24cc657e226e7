"""C kernels: compiled where there is a compiler, once a machine; without one, PyTorch's own operations do the same.

A kernel passes over memory once where eager operations pass five to ten times, and costs microseconds to call. Plain C
compiles in half a second and needs no headers. The threads are PyTorch's: the objects are linked against no OpenMP of
their own, so its symbols are those that `import torch` brought.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from optrelax.kernels.signatures import Argument, Signature

_log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c11", "-fPIC", "-fopenmp")
_SECONDS = 120  # a compiler that takes longer hangs
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@runtime_checkable
class Kernels(Protocol):
    """Functions of one source, called by name: the same names and arguments whatever they are written in."""

    def supports(self, *tensors: Tensor) -> bool: ...

    def call(self, name: str, dtype: torch.dtype, *arguments: Argument, **named: Argument) -> None: ...


@dataclass(frozen=True, slots=True)
class BoundCall:
    """A call of a kernel with all that it takes."""

    function: Callable[..., None]
    fields: ctypes.Structure
    threads: int
    given: tuple[Argument, ...]
    """What the addresses in `fields` point to stays alive."""

    def __call__(self) -> None:
        self.function(ctypes.byref(self.fields), self.threads)


@dataclass(frozen=True, slots=True)
class Build:
    """The outcome for one source file: a library with its functions, or why there is none."""

    library: ctypes.CDLL | None
    reason: str
    signatures: Mapping[str, Signature] = field(default_factory=dict, repr=False, compare=False)
    _functions: dict[tuple[str, torch.dtype], Callable[..., None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def supports(self, *tensors: Tensor) -> bool:
        """Whether the kernels can work on these tensors."""
        if self.library is None:
            return False
        return all(t.device.type == "cpu" and t.dtype in _SUFFIX for t in tensors)

    def call(self, name: str, dtype: torch.dtype, *arguments: Argument, **named: Argument) -> None:
        """Call a kernel of one floating type by its signature, with the thread count as a last argument.

        Tensors are contiguous and go by address.  named: the arguments of a kernel that takes a struct.
        RuntimeError for what is not as declared.
        """
        signature = self.signatures.get(name)
        if signature is not None and signature.struct:
            self.bound(name, dtype, **named)()
        else:
            function = self._function(name, dtype)
            function(*self.signatures[name].plain(dtype, arguments), torch.get_num_threads())

    def bound(self, name: str, dtype: torch.dtype, **named: Argument) -> BoundCall:
        """A call of a kernel that takes a struct, checked once: it can be made again on the same tensors."""
        function, signature = self._function(name, dtype), self.signatures[name]
        unlike = named.keys() ^ set(signature.names)
        if unlike:
            raise RuntimeError(f"{name}: {sorted(unlike)} missing or not asked for; takes {signature.names}")
        given = tuple(named[n] for n in signature.names)
        fields = signature.fields(*signature.plain(dtype, given))
        return BoundCall(function, fields, torch.get_num_threads(), given)

    def _function(self, name: str, dtype: torch.dtype) -> Callable[..., None]:
        found = self._functions.get((name, dtype))
        if found is None:
            if dtype not in _SUFFIX:
                raise RuntimeError(
                    f"{name}: wants float32 or float64, got {dtype}; call backward() outside of autocast"
                )
            function = getattr(self.library, f"{name}_{_SUFFIX[dtype]}")
            self._require_layout(name, dtype)
            function.argtypes, function.restype = self.signatures[name].kinds, None
            found = self._functions[name, dtype] = function
        return found

    def _require_layout(self, name: str, dtype: torch.dtype) -> None:
        """RuntimeError where a struct has other fields in the source."""
        signature = self.signatures[name]
        if signature.struct:
            size = self._number(f"size_of_{name}_{_SUFFIX[dtype]}")
            if size != ctypes.sizeof(signature.fields):
                raise RuntimeError(
                    f"{name}: its struct has {size} bytes, declared are {ctypes.sizeof(signature.fields)}"
                )

    def constant(self, name: str) -> int:
        """A number of the source, which exports it by `EXPORT(name)`."""
        return self._number(f"constant_{name}")

    def _number(self, symbol: str) -> int:
        assert self.library is not None, self.reason
        return ctypes.c_int64.in_dll(self.library, symbol).value


def laid_out(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors contiguous, as kernels read them.

    To be called before an autograd Function, not in it: what a Function keeps of its inputs must be these inputs, or a
    second derivative takes it for a constant.
    """
    return tuple(t.contiguous() for t in tensors)


@functools.cache
def build(source: Path, *declarations: str) -> Build:
    """Compile a C file, or load what an earlier process compiled; its functions as `Signature` reads them.

    OPTRELAX_NATIVE=0 turns kernels off; CC names the compiler; OPTRELAX_CACHE or XDG_CACHE_HOME say where the result is
    kept.  Never raises: what fails is told by `reason`, and callers fall back.
    """
    if os.environ.get("OPTRELAX_NATIVE", "1") == "0":
        return Build(None, "turned off by OPTRELAX_NATIVE=0")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform == "win32":
        return _without("no C compiler found (set CC)")
    try:
        text = _text(source)
        facts = (*_FLAGS, compiler, platform.machine(), _processor(), torch.__version__)
        key = hashlib.sha256(text + "\0".join(facts).encode()).hexdigest()[:20]
        path = _folder() / f"{source.stem}-{key}.so"
        if not path.is_file():
            _compile(compiler, source, path)
        signatures = {s.name: s for s in map(Signature, declarations)}
        return Build(ctypes.CDLL(str(path)), f"compiled by {compiler}", signatures)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        return _without(f"{source.name} could not be compiled: {str(detail).strip().splitlines()[-1]}")


def _text(source: Path) -> bytes:
    """A source with what it includes from beside it."""
    known, open_ = {}, [source]
    while open_:
        path = open_.pop()
        if path not in known:
            known[path] = path.read_bytes()
            open_ += [path.with_name(name.decode()) for name in re.findall(rb'#include "(.+)"', known[path])]
    return b"".join(known[path] for path in sorted(known))


def _without(reason: str) -> Build:
    _say_once(reason)
    return Build(None, reason)


@functools.cache
def _say_once(reason: str) -> None:
    """Once a process and reason, whatever the number of kernels."""
    _log.warning("optrelax: %s; PyTorch's operations do the same, slower (OPTRELAX_NATIVE=0 says nothing)", reason)


def _compile(compiler: str, source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, library = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in ((*_FLAGS, "-c", str(source), "-o", str(made)), ("-shared", str(made), "-o", str(library))):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=_SECONDS)
        os.replace(library, path)  # whole or not at all, whoever else compiles it now


def _folder() -> Path:
    """Where compiled kernels are kept; a folder of this process where the usual one cannot be written."""
    given = os.environ.get("OPTRELAX_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else base / "optrelax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    return folder if usable else Path(tempfile.mkdtemp(prefix="optrelax-"))


def _processor() -> str:
    """What -march=native depends on: a folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
