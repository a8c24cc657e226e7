"""Rules of ONNX ops that resize images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optrelax.networks.onnx_nodes import Function, OnnxNode, require_small, rule, text_of


@rule("Resize", "Upsample")
def resize(node: OnnxNode) -> Function:
    old = node.value(0).shape
    new = _new_size(node, old)
    require_small(new)
    mode = text_of(node.get("mode", "nearest"))
    default = "half_pixel" if node.op == "Resize" and node.opset >= 11 else "asymmetric"
    placed = text_of(node.get("coordinate_transformation_mode", default))
    # The two kinds of half pixels differ where one pixel is left.
    smooth = placed == "half_pixel" or (
        placed in ("pytorch_half_pixel", "align_corners") and min(new[2:], default=0) > 1
    )
    if mode == "linear" and len(old) in (3, 4, 5) and smooth:
        named = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(old)]
        corners = placed == "align_corners"
        return lambda x, *_: F.interpolate(x, new[2:], mode=named, align_corners=corners)
    if mode != "nearest":
        raise ValueError(f"mode {mode!r} with coordinates {placed!r} has no rule; nearest has")
    rounded = text_of(node.get("nearest_mode", "round_prefer_floor" if default == "half_pixel" else "floor"))
    picks = [_nearest(n, m, placed, rounded) for n, m in zip(old, new, strict=True)]
    same = [[i * n // m for i in range(m)] for n, m in zip(old, new, strict=True)]
    if len(old) in (3, 4, 5) and picks == same and new[:2] == list(old[:2]):
        return lambda x, *_: F.interpolate(x, new[2:], mode="nearest")

    def function(x: Tensor, *_: object) -> Tensor:
        for dim, chosen in enumerate(picks):
            if chosen != list(range(old[dim])):
                x = x.index_select(dim, torch.tensor(chosen, device=x.device))
        return x

    return function


def _new_size(node: OnnxNode, old: Sequence[int]) -> list[int]:
    scales: list[float] | None = None
    if "scales" in node.attributes:
        scales = [float(s) for s in node.attributes["scales"]]
    elif node.op == "Upsample" or node.opset < 11:
        scales = node.numbers(1)
    else:
        if node.has(1):
            node.numbers(1)
        if node.has(2):
            scales = node.numbers(2) or None
    if scales is None:
        sizes = node.integers(3)
        if "axes" in node.attributes or len(sizes) != len(old):
            raise ValueError("sizes must name every dimension")
        new = sizes
    else:
        if len(scales) != len(old) or not all(math.isfinite(s) and s > 0 for s in scales):
            raise ValueError(f"scales {scales} must be one positive number a dimension of {list(old)}")
        if any(s != round(s) and round(1 / s) * s != 1 for s in scales):
            raise ValueError(f"scales {scales} have no rule; whole numbers have")
        new = [math.floor(n * s) for n, s in zip(old, scales, strict=True)]
    if new[0] != 1 or min(new) < 1:
        raise ValueError(f"resizes {list(old)} to {new}")
    return new


def _nearest(old: int, new: int, placed: str, rounded: str) -> list[int]:
    """Which entry each new one copies."""
    if placed not in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"):
        raise ValueError(f"coordinates {placed!r} have no rule")
    found = []
    for i in range(new):
        if placed == "asymmetric":
            top, bottom = i * old, new
        elif placed == "align_corners":
            top, bottom = i * (old - 1), max(1, new - 1)
        else:  # (i + 1/2) old / new - 1/2
            top, bottom = (2 * i + 1) * old - new, 2 * new
            top = 0 if placed == "pytorch_half_pixel" and new == 1 else top
        whole = {
            "floor": top // bottom,
            "ceil": -(-top // bottom),
            "round_prefer_floor": -((bottom - 2 * top) // (2 * bottom)),
            "round_prefer_ceil": (2 * top + bottom) // (2 * bottom),
        }
        if rounded not in whole:
            raise ValueError(f"nearest_mode {rounded!r} is unknown")
        found.append(min(max(whole[rounded], 0), old - 1))
    return found
