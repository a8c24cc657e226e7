"""LP-LAST on CONV (3,236 hidden units): all images at once, time and peak memory."""

from __future__ import annotations

from typing import Any

import torch

import optrelax as ox
from benchmarks.lp_cases import Layer, Setting, Sizes, quantiles, relative
from benchmarks.measuring import Task, interleaved, peak_bytes
from benchmarks.networks import Trained
from benchmarks.reports import Bar, Options, Row, Table
from optrelax.layers import DualAscent, Status, Triangle

_EPS = 0.02
_TYPES = {"float32": torch.float32, "float64": torch.float64}


def setting(epochs: int, seed: int) -> Setting:
    """CONV, trained naturally."""
    return Setting(f"CONV natural, eps {_EPS}", Trained("conv", "natural", epochs, seed), _EPS)


def _layer(
    images: int, epochs: int, seed: int, device: str, data: str, data_dir: str | None, cache: str, dtype: str
) -> Layer:
    options = Options(threads=1, data=data, data_dir=data_dir, cache=cache)
    case = setting(epochs, seed).case(images, options)
    return Layer(Triangle(preactivation=ox.Crown(), solver=DualAscent()), case.to(device, _TYPES[dtype]))


def probe(images: int, **given: Any) -> Task:
    """One step, for `peak_bytes`; warmed up on a single image."""
    _layer(1, **given).step()
    return _layer(images, **given).step


def measure(sizes: Sizes, options: Options) -> Table:
    """Both types."""
    rows = []
    for dtype in _TYPES:
        given = {"images": sizes.images, "epochs": sizes.conv_epochs, "seed": options.seed, "dtype": dtype}
        given |= {"data": options.data, "data_dir": options.data_dir, "cache": options.cache}
        layer = _layer(device=options.device, **given)  # type: ignore[arg-type]
        peak = peak_bytes(probe, threads=options.threads, device=options.device, **given)
        row: Row = {"type": dtype, "eps": _EPS, "LPs": layer.case.lps, "crossing neurons": layer.case.crossing()}
        # What does not fit is not timed either.
        timed = _timed(layer, options) if peak is not None else {}
        rows.append(row | timed | {"peak MiB": None if peak is None else peak / 2**20})
    notes = (
        "Crossing neurons: the mean of an image. Peak memory of a step (forward and backward) in a fresh process, "
        "beyond what was there before it. Seconds are those of all LPs.",
    )
    return Table(
        title="CONV: LP-LAST", keys=("type",), rows=rows, smaller=("peak MiB",), greater=("closed %",), notes=notes
    )


def _timed(layer: Layer, options: Options) -> Row:
    timed = interleaved({"forward": layer.solve, "step": layer.step}, runs=options.runs, device=options.device)
    found = layer.solve()
    return {
        "forward s": timed.median("forward"),
        "forward + gradient s": timed.median("step"),
        "iterations": float(found.iterations.double().mean()),
        "closed %": 100 * float((found.status == Status.OPTIMAL).double().mean()),
        **quantiles("gap", relative(found.gap, found.lower)),
    }


def bars(table: Table, images: int) -> list[Bar]:
    """Peak memory of both types."""
    found = []
    for row in table.rows:
        peak = None if row["peak MiB"] is None else row["peak MiB"] / 1024
        found.append(Bar(f"CONV, {row['type']}: LP-LAST of {images} images, peak memory in GiB", 4.0, None, peak))
    return found
