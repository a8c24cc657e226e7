"""Which kernels make the relaxation step on which tensors: compiled C on a CPU, Triton on a CUDA device, or none."""

from __future__ import annotations

import functools
import os
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from optrelax.kernels import native
from optrelax.kernels.signatures import Argument, require_fit

_DTYPES = (torch.float32, torch.float64)
_OLDEST = (7, 0)  # compute capability


@dataclass(frozen=True, slots=True)
class TritonBuild:
    """Triton's kernels for tensors of one device type, or why there are none."""

    library: ModuleType | None
    reason: str
    device: str = "cuda"

    def supports(self, *tensors: Tensor) -> bool:
        """Whether the kernels can work on these tensors."""
        if self.library is None:
            return False
        return all(
            t.device.type == self.device and t.device == tensors[0].device and t.dtype in _DTYPES for t in tensors
        )

    def call(self, name: str, dtype: torch.dtype, *arguments: Argument, **named: Argument) -> None:
        """Call a function of one floating type: tensors are contiguous and on one device."""
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        for tensor in tensors:
            require_fit(name, tensor, dtype, self.device)
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
            getattr(self.library, name)(*arguments, **named)


def passes(compiled: native.Build, *tensors: Tensor) -> native.Kernels | None:
    """The kernels that work on these tensors; None: PyTorch's operations do."""
    if compiled.supports(*tensors):
        return compiled
    if not tensors[0].is_cuda:
        return None
    found = kernels()
    return found if found.supports(*tensors) else None


@functools.cache
def kernels() -> TritonBuild:
    """Triton's kernels on this machine's CUDA devices.

    OPTRELAX_NATIVE=0 turns them off.  Never raises: what is missing is told by `reason`, and callers fall back.
    """
    if os.environ.get("OPTRELAX_NATIVE", "1") == "0":
        return TritonBuild(None, "turned off by OPTRELAX_NATIVE=0")
    if not torch.cuda.is_available():
        return TritonBuild(None, "no CUDA device")
    if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < _OLDEST:
        return TritonBuild(None, f"Triton wants devices of compute capability {_OLDEST[0]}.{_OLDEST[1]} or later")
    try:
        import triton

        from optrelax.kernels import triton_kernels

        # Compiles C against Python's and CUDA's headers the first time, and asserts that it finds libcuda.
        triton.runtime.driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        return TritonBuild(None, f"Triton: {(str(error) or type(error).__name__).strip().splitlines()[0]}")
    return TritonBuild(triton_kernels, f"Triton {triton.__version__}")
