"""Outward rounding refuses a machine, a setting or a thread whose products are not what its proofs assume."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optrelax as ox
from optrelax import exactness
from optrelax.exactness import require_exact_products
from optrelax.relaxations import names


def outward_box() -> None:
    ox.bounds(nn.Linear(2, 2), ox.LinfBall(torch.zeros(1, 2), 0.1), "box", rounding="outward")


def test_settings_that_make_products_inexact_are_refused(monkeypatch):
    outward_box()
    with torch.autocast("cpu"), pytest.raises(ValueError, match="rounding='outward': autocast breaks the error bound"):
        require_exact_products(torch.zeros(1))
    # Without oneDNN, NNPACK's Winograd convolutions take over.
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"float32 on this CPU needs torch\.backends\.mkldnn\.enabled; or use float64"):
        outward_box()
    require_exact_products(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(("precision", "kind"), [("medium", "bf16"), ("high", "tf32")])
def test_reduced_precision_of_float32_products_is_refused(precision, kind):
    try:
        torch.set_float32_matmul_precision(precision)
        with pytest.raises(ValueError, match=f"precision must be '(ieee|highest)', got '({kind}|{precision})'"):
            outward_box()
    finally:
        torch.set_float32_matmul_precision("highest")
    outward_box()


# --- products that round otherwise --------------------------------------------------------------------------------


def shortened(bits: int):
    """Numbers rounded to that many digits of the significand: 8 bfloat16, 11 TF32 and half."""

    def change(x: torch.Tensor) -> torch.Tensor:
        significand, exponent = torch.frexp(x)
        return torch.ldexp((significand * 2**bits).round() / 2**bits, exponent).to(x)

    return change


def in_parts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Three products of halves of the significand instead of one: the fourth is missing."""
    high = shortened(12 if x.dtype == torch.float32 else 27)
    return LINEAR(high(x), high(w)) + LINEAR(x - high(x), high(w)) + LINEAR(high(x), w - high(w))


def by_fourier(x: torch.Tensor, w: torch.Tensor, padding: int) -> torch.Tensor:
    """A convolution as a product of transforms: the error of an entry is that of the greatest."""
    size = [n + 2 * padding for n in x.shape[2:]]
    product = torch.einsum(
        "bihw,oihw->bohw",
        torch.fft.rfft2(F.pad(x, [padding] * 4)),
        torch.fft.rfft2(w, s=size).conj(),
    )
    return torch.fft.irfft2(product, s=size)[..., : size[0] - w.shape[2] + 1, : size[1] - w.shape[3] + 1]


@pytest.fixture
def _tested_anew():
    """What was found before a test belongs to other products."""
    exactness._wrong.cache_clear()
    yield
    exactness._wrong.cache_clear()


LINEAR, CONVOLUTION = F.linear, F.conv2d
UNTRUE = {
    "bfloat16 linear": ("linear", lambda x, w: LINEAR(shortened(8)(x), shortened(8)(w)), "linear layers"),
    "tf32 linear": ("linear", lambda x, w: LINEAR(shortened(11)(x), shortened(11)(w)), "linear layers"),
    "half sums": ("linear", lambda x, w: shortened(11)(LINEAR(x, w)), "linear layers"),
    "three products of parts": ("linear", in_parts, "linear layers"),
    "bfloat16 convolution": (
        "conv2d",
        lambda x, w, padding: CONVOLUTION(shortened(8)(x), shortened(8)(w), padding=padding),
        "convolutions",
    ),
    "fourier": ("conv2d", by_fourier, "convolutions"),
}


@pytest.mark.usefixtures("_tested_anew")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", UNTRUE)
def test_the_probe_tells_every_way_of_rounding_otherwise(name, dtype, monkeypatch):
    function, other, named = UNTRUE[name]
    require_exact_products(torch.zeros(1, dtype=dtype))
    exactness._wrong.cache_clear()
    monkeypatch.setattr(F, function, other)
    with pytest.raises(ValueError, match=f"rounding='outward': {named} on this machine do not round as sums"):
        require_exact_products(torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("name", [name for name in names() if name != "cauchy"])
def test_a_thread_that_flushes_is_refused(name):
    """Also where all was well before: flushing is a thread's, and may begin at any time."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    region = ox.LinfBall(torch.zeros(1, 2, dtype=torch.float64), 0.1)
    if not torch.set_flush_denormal(True):
        return  # a processor that cannot
    try:
        with pytest.raises(ValueError, match=r"flushes denormal numbers to zero; torch\.set_flush_denormal\(False\)"):
            ox.bounds(net, region, name, rounding="outward")
    finally:
        torch.set_flush_denormal(False)
    ox.bounds(net, region, name, rounding="outward")


@pytest.mark.parametrize("mode", ["BF16", "any"])
def test_onednn_s_speed_setting_is_refused(mode):
    """It is read once a process: so in another one."""
    code = (
        "import torch, optrelax as ox; from torch import nn; net = nn.Conv2d(2, 2, 3)\n"
        "for dtype in (torch.float64, torch.float32):\n"
        "    box = ox.LinfBall(torch.zeros(2, 2, 4, 4, dtype=dtype), 0.1)\n"
        "    ox.bounds(net.to(dtype), box, 'box'), ox.bounds(net, box, 'box', rounding='outward'), print('went on')"
    )
    environment = os.environ | {"ONEDNN_DEFAULT_FPMATH_MODE": mode}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "went on\n", done.stderr  # float64 has no such setting
    wanted = f"ONEDNN_DEFAULT_FPMATH_MODE must be unset or STRICT, got '{mode.upper()}'; start the process without it"
    assert wanted in done.stderr
