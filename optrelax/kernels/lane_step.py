"""Rows that see the same windows, side by side: pulled back without the neurons whose lines are 0 (`lane_views.h`).

Blocks are [blocks, high, wide, channels, lanes]: one or two vectors of rows. Only compiled; `window_step` takes rows
one by one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from optrelax.kernels import native


def _view(name: str) -> str:
    return ", ".join(f"{name}_{what}" for what in ("high", "wide", "step_y", "step_x", "offset_y", "offset_x"))


_CONVOLUTION = (
    "blocks, lanes, high, wide, out, rows, columns, into, kh, kw, step_y, step_x, apart, top, left, "
    f"{_view('from')}, {_view('to')}, int32 kept_from?[], int32 kept_to?[], int64 place[blocks * 3], "
)
_BEFORE, _BEHIND = "[blocks * rows * columns * into * lanes]", "[blocks * high * wide * out * lanes]"
_MAP, _BLOCKS = "[map_high * map_wide * channels]", "[blocks * rows * columns * channels * lanes]"
_RELAXATION = (
    f"blocks, lanes, rows, columns, channels, clear, {_view('map')}, int32 kept?[], int64 place[blocks * 3], "
    f"a{_BLOCKS}, ls?{_MAP}, li{_MAP}, us?{_MAP}, ui{_MAP}, grad?{_BLOCKS}, column[blocks * lanes], found?{_BLOCKS}, "
    f"to_ls?{_MAP}, to_li?{_MAP}, to_us?{_MAP}, to_ui?{_MAP}"
)
_LINES = (
    "keep(pixels, c, ls[pixels * c], li[pixels * c], us[pixels * c], ui[pixels * c], int32 list[pixels * (c + 1)])",
    f"relax*({_RELAXATION})",
    f"relax_back*({_RELAXATION})",
)
_PRODUCTS = (
    f"push*({_CONVOLUTION}a{_BEHIND}, given?[], weight[kh * kw * out * into], found{_BEFORE})",
    f"pull*({_CONVOLUTION}a?[], given{_BEFORE}, weight[kh * kw * out * into], found{_BEHIND})",
    f"outer*({_CONVOLUTION}a{_BEHIND}, given{_BEFORE}, weight?[], found[threads * kh * kw * out * into])",
)


@functools.cache
def lines() -> native.Build:
    """Passes through activations, or why there are none."""
    return native.build(Path(__file__).with_name("lane_lines.c"), *_LINES)


@functools.cache
def products() -> native.Build:
    """Passes through convolutions, or why there are none."""
    return native.build(Path(__file__).with_name("lane_products.c"), *_PRODUCTS)


def vector(dtype: torch.dtype) -> int:
    """Lanes of one vector; 0 without a compiler."""
    compiled = lines().library is not None and products().library is not None
    return lines().constant("BYTES") // dtype.itemsize if compiled else 0
