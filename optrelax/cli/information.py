"""`optrelax info`: versions, devices, threads, and which kernels run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING

from optrelax.cli.application import command, print_json, show_table
from optrelax.cli.options import Json
from optrelax.cores import usable_cores

if TYPE_CHECKING:
    from optrelax.kernels.native import Build
    from optrelax.kernels.triton_steps import TritonBuild

__all__ = ["info"]

_PACKAGES = ("torch", "numpy", "scipy", "highspy", "cvxpy", "cvxpylayers", "scs", "polars", "matplotlib", "safetensors")


@command("info")
def info(json: Json = False) -> None:
    """Versions, devices, threads, and which kernels run: what a report of a problem should hold."""
    found = facts()
    if json:
        print_json(found)
        return
    import polars as pl

    rows = [{"what": name, "here": _shown(value)} for name, value in found.items()]
    show_table(pl.DataFrame(rows))


def facts() -> dict[str, object]:
    """Everything `info` says, JSON-ready."""
    import torch

    import optrelax
    from optrelax.domains import interval_chains
    from optrelax.kernels import (
        ball_products,
        band_step,
        convolutions,
        relax_step,
        relu_lines,
        sign_products,
        triton_steps,
    )
    from optrelax.layers.ascent import example_matrices, vector_passes

    kernels = [f"CPU {torch.backends.cpu.get_cpu_capability()}"]
    kernels += ["MKL"] if torch.backends.mkl.is_available() else []
    kernels += ["oneDNN"] if torch.backends.mkldnn.is_available() else []
    kernels += [f"cuDNN {torch.backends.cudnn.version()}"] if torch.backends.cudnn.is_available() else []
    passes = {
        "intervals": interval_chains,
        "products of balls": ball_products,
        "lines": relu_lines,
        "relaxation step": relax_step,
        "parallel lines": band_step,
        "products with signs": sign_products,
        "convolutions": convolutions,
        "dual ascent": vector_passes,
        "dual ascent on crossing neurons": example_matrices,
    }
    for what, build in ((what, module.kernels()) for what, module in passes.items()):
        kernels.append(f"{what}: {_by(build)}")
    kernels.append(f"relaxation step and parallel lines on CUDA: {_by(triton_steps.kernels())}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "optrelax": optrelax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "CUDA devices": devices,
        "data folder": os.environ.get("OPTRELAX_DATA"),
    }


def _by(build: Build | TritonBuild) -> str:
    return build.reason if build.library is not None else f"PyTorch ({build.reason})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shown(value: object) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
