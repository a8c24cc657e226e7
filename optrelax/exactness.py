"""Whether this process rounds as the allowances of outward rounding assume; what does not is refused by name.

The allowances (`optrelax.rounding`) hold for standard sums of products: each product rounded once, or fused into its
sum, and no number lost below the normal range. Speed settings break that (TF32, bfloat16 and half products, Winograd
and FFT convolutions, flushed denormals), and there are more of them than a list can hold: oneDNN, MKL, cuBLAS and
PyTorch each have their own, some in the environment, some a thread's. So the products themselves are put to the test.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.kernels.convolutions import ConvGeometry, pull_rows
from optrelax.rounding import gamma

Settings = tuple[tuple[str, str], ...]
_STRICT = ("", "0", "STRICT")
_ENVIRONMENT = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
_EXACT = ("ieee", "none", "highest")
# Variables, or the compiler of bytecode would halve the number itself.
_TINY, _HALF = sys.float_info.min, 0.5
_GRAIN = 32768  # entries from which PyTorch gives an elementwise pass another thread


def require_exact_products(x: Tensor) -> None:
    """ValueError where this process, or a setting of it, makes products on x's device less exact than assumed.

    The products are tested once for every device, type, thread and setting that is cheap to read; flushing, which a
    thread may begin at any time, at every call.
    """
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("rounding='outward': autocast breaks the error bound; leave the autocast region")
    if _TINY * _HALF == 0.0:
        raise ValueError(
            "rounding='outward': this thread flushes denormal numbers to zero; torch.set_flush_denormal(False)"
        )
    if x.dtype == torch.float32 and x.is_cuda:
        # cuDNN may pick Winograd or FFT convolutions in float32, by their sizes: a probe cannot rule them out.
        raise ValueError("rounding='outward': on a GPU use float64 (cuDNN's float32 convolutions are not exact sums)")
    settings = _settings()
    if x.dtype == torch.float32:
        _require_settings(settings)
    thread = (threading.get_ident(), torch.get_num_threads())
    wrong = _wrong(x.device, x.dtype, settings, thread)
    if wrong:
        raise ValueError(
            f"rounding='outward': {wrong} on this machine do not round as sums of products in {x.dtype}; look for "
            "settings of oneDNN, MKL or cuBLAS that trade precision for speed (environment variables too), "
            "or use float64"
        )


def _settings() -> Settings:
    """What is known to lower precision and is read in no time: name and value."""
    found = [(name, os.environ.get(name, "").upper()) for name in _ENVIRONMENT]
    for op in ("matmul", "conv"):
        owner = getattr(torch.backends.mkldnn, op, None)
        if owner is not None:  # torch 2.9 and later; the older function fails once these have been used
            found.append((f"torch.backends.mkldnn.{op}.fp32_precision", str(owner.fp32_precision)))
    if len(found) == len(_ENVIRONMENT):
        found.append(("torch.set_float32_matmul_precision", torch.get_float32_matmul_precision()))
    return tuple(found)


def _require_settings(settings: Settings) -> None:
    """ValueError for a setting that lets float32 products be less, whatever the probe's sizes make of it."""
    for name, value in settings:
        if name in _ENVIRONMENT:
            if value not in _STRICT:
                raise ValueError(
                    f"rounding='outward': the environment variable {name} must be unset or STRICT, got {value!r}; "
                    "start the process without it, or use float64"
                )
        elif value not in _EXACT:
            exact = "highest" if name.startswith("torch.set") else "ieee"
            raise ValueError(f"rounding='outward': {name} must be {exact!r}, got {value!r}")
    mkldnn = torch.backends.mkldnn
    if torch.backends.nnpack.is_available() and not (mkldnn.is_available() and mkldnn.enabled):
        # Without oneDNN, NNPACK takes over float32 convolutions and may pick Winograd or FFT ones.
        raise ValueError("rounding='outward': float32 on this CPU needs torch.backends.mkldnn.enabled; or use float64")


@functools.lru_cache(maxsize=64)
def _wrong(device: torch.device, dtype: torch.dtype, settings: Settings, thread: tuple[int, int]) -> str:
    """The products that fail, named for an error; "" where all are well. Settings and thread: what it is good for."""
    with torch.no_grad():
        wrong = [name for name, good in _probes(device, dtype).items() if not good()]
    return ", ".join(wrong)


def _probes(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], bool]]:
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        """Every digit of the significand in use, sizes over seven decades, so that one that leaks elsewhere shows."""
        significand = torch.rand(*shape, generator=g, dtype=torch.float64, device="cpu") + 1
        exponent = torch.randint(-12, 13, shape, generator=g, device="cpu")
        sign = torch.randint(0, 2, shape, generator=g, device="cpu") * 2 - 1
        return (torch.ldexp(significand, exponent) * sign).to(device, dtype)

    def product(multiply: Callable[[Tensor, Tensor], Tensor]) -> bool:
        a, b = drawn(64, 96), drawn(64, 96)
        return _is_sum_of_products(multiply, a, b, lambda x, w: (x, w))

    def convolution(convolve: Callable[[Tensor, Tensor], Tensor]) -> bool:
        x, w = drawn(2, 16, 8, 8), drawn(32, 16, 3, 3)

        def unrolled(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return F.unfold(x, 3, padding=1).mT.flatten(0, 1), w.flatten(1)

        def flat(x: Tensor, w: Tensor) -> Tensor:
            return convolve(x, w).flatten(2).mT.flatten(0, 1)

        return _is_sum_of_products(flat, x, w, unrolled)

    def turned(w: Tensor) -> Tensor:
        """The weight whose transposed convolution is w's convolution."""
        return w.transpose(0, 1).flip(2, 3)

    geometry = ConvGeometry(padding=(1, 1))
    return {
        "linear layers": lambda: product(F.linear),
        "matrix products": lambda: product(lambda a, b: a @ b.mT),
        "batched matrix products": lambda: product(lambda a, b: (a.expand(2, -1, -1) @ b.mT.expand(2, -1, -1))[1]),
        "products with a vector": lambda: product(lambda a, b: torch.stack([a @ row for row in b], 1)),
        "convolutions": lambda: convolution(lambda x, w: F.conv2d(x, w, padding=1)),
        "transposed convolutions": lambda: convolution(lambda x, w: F.conv_transpose2d(x, turned(w), padding=1)),
        "rows pulled through a convolution": lambda: convolution(
            lambda x, w: torch.cat([pull_rows(x, turned(part), geometry, (8, 8)) for part in w.split(4)], 1)
        ),
        "elementwise products": lambda: _keeps_small_numbers(device, dtype),
    }


def _is_sum_of_products(
    multiply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    unrolled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> bool:
    """Whether multiply(x, w) [m, n] errs as x W^T by rows [m, k] and [n, k] of both, unrolled, may.

    Single products must be the nearest floats, bit for bit: the shortest digits, a product in parts, a transformed
    convolution all show. Sums of k must stay within gamma(k) of their absolute terms, by integers without rounding.
    """
    rows, columns = unrolled(x, w)
    k = rows.shape[1]
    single = torch.zeros_like(columns)
    index = torch.arange(len(single), device=single.device)
    single[index, index * 7 % k] = columns[index, index * 7 % k]
    alone = multiply(x, single.reshape(w.shape))
    if not torch.equal(alone, rows[:, index * 7 % k] * columns[index, index * 7 % k]):
        return False
    found = multiply(x, w)
    whole = [[[int(math.ldexp(v, 80)) for v in row] for row in part.tolist()] for part in (rows[::5], columns[::9])]
    allowed = gamma(k, x.dtype)
    for i, row in enumerate(whole[0]):
        for j, column in enumerate(whole[1]):
            terms = [a * b for a, b in zip(row, column, strict=True)]
            error = abs(int(math.ldexp(float(found[5 * i, 9 * j]), 160)) - sum(terms))
            if error > allowed * float(sum(map(abs, terms))):
                return False
    return True


def _keeps_small_numbers(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether no thread of a pass flushes denormals: some may have been started where that was set."""
    x = torch.ones(_GRAIN * max(1, torch.get_num_threads()), dtype=dtype, device=device)
    x[::256] = torch.finfo(dtype).tiny
    least = (x * _HALF)[::256].cpu()
    return bool((least * 2 == torch.finfo(dtype).tiny).all())
