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
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c11", "-fPIC", "-fopenmp")
_SECONDS = 120  # a compiler that takes longer hangs
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@runtime_checkable
class Kernels(Protocol):
    """Functions of one source, called by name: the same names and arguments whatever they are written in."""

    def supports(self, *tensors: Tensor) -> bool: ...

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Build:
    """The outcome for one source file: a library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str
    _functions: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def supports(self, *tensors: Tensor) -> bool:
        """Whether the kernels can work on these tensors."""
        if self.library is None:
            return False
        return all(t.device.type == "cpu" and t.dtype in _SUFFIX for t in tensors)

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        """Call a kernel of one floating type: tensors are contiguous and go by address, the rest as int64 or double.

        The thread count is added as the last argument.  An argument is of one kind in every call.
        """
        function = self._functions.get((name, dtype))
        if dtype not in _SUFFIX:
            raise RuntimeError(f"{name}: wants float32 or float64, got {dtype}; call backward() outside of autocast")
        # Numbers first: `isinstance` of a tensor's class asks its metaclass, which takes longer than a small kernel.
        plain = [a if a is None or isinstance(a, (int, float)) else _address(name, a, dtype) for a in arguments]
        if function is None:  # what cannot be an argument has raised by now
            function = getattr(self.library, f"{name}_{_SUFFIX[dtype]}")
            function.argtypes = [*map(_kind, arguments), ctypes.c_int64]
            self._functions[name, dtype] = function
        function(*plain, torch.get_num_threads())


def _kind(value: Tensor | int | float | None) -> type:
    if isinstance(value, int):
        return ctypes.c_int64
    return ctypes.c_double if isinstance(value, float) else ctypes.c_void_p


def _address(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor lies."""
    require_fit(name, tensor, dtype, "cpu")
    return tensor.data_ptr()


def require_fit(name: str, tensor: Tensor, dtype: torch.dtype, device: str) -> None:
    """RuntimeError where a kernel would misread a tensor, as what autocast made in half precision."""
    fits = tensor.dtype == dtype or not tensor.dtype.is_floating_point
    if not fits or tensor.device.type != device or not tensor.is_contiguous():
        raise RuntimeError(
            f"{name}: wants contiguous {dtype} on {'the CPU' if device == 'cpu' else device}, got {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}; under autocast call backward() outside of it"
        )


def laid_out(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors contiguous, as kernels read them.

    To be called before an autograd Function, not in it: what a Function keeps of its inputs must be these inputs, or a
    second derivative takes it for a constant.
    """
    return tuple(t.contiguous() for t in tensors)


@functools.cache
def build(source: Path) -> Build:
    """Compile a C file, or load what an earlier process compiled.

    OPTRELAX_NATIVE=0 turns kernels off; CC names the compiler; OPTRELAX_CACHE or XDG_CACHE_HOME say where the result is
    kept.  Never raises: what fails is told by `reason`, and callers fall back.
    """
    if os.environ.get("OPTRELAX_NATIVE", "1") == "0":
        return Build(None, "turned off by OPTRELAX_NATIVE=0")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform == "win32":
        return _without("no C compiler found (set CC)")
    try:
        text = source.read_bytes()
        facts = (*_FLAGS, compiler, platform.machine(), _processor(), torch.__version__)
        key = hashlib.sha256(text + "\0".join(facts).encode()).hexdigest()[:20]
        path = _folder() / f"{source.stem}-{key}.so"
        if not path.is_file():
            _compile(compiler, source, path)
        return Build(ctypes.CDLL(str(path)), f"compiled by {compiler}")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        return _without(f"{source.name} could not be compiled: {str(detail).strip().splitlines()[-1]}")


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
