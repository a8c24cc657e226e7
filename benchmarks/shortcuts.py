"""Shortcuts: a step with each kernel and each way of doing less, and the same step without it."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.closed_forms import case
from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax import relaxations
from optrelax.domains import entrances, frames, interval, row_rules
from optrelax.kernels import convolutions, native

TITLE = "Shortcuts: steps with and without each of them"

_SHORT, _TURNS = 0.1, 3  # steps of fewer seconds are noisier: so many rounds for one of the others
_EQUAL = 1e-4
"""Bounds with and without differ by at most this, relative to the greatest."""


def _patched(*places: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[object]]:
    def switch() -> ExitStack:
        stack = ExitStack()
        for owner, name, value in places:
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        return stack

    return switch


def _never(*given: object) -> bool:
    return False


def _none(*given: object) -> None: ...


_WITHOUT: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "compiled passes, all": _patched((native.Build, "supports", _never)),
    "compiled products of balls": _patched((interval, "compiles", _never)),
    "products with signs by tables": _patched((row_rules, "pays", _never), (entrances, "pays", _never)),
    "windows instead of whole rows": _patched((frames, "plan", _none), (frames, "plan_rows", _none)),
    "rows through few channels": _patched((convolutions, "_FEW", 0)),
    "DeepZ by rows": _patched(),  # the other direction is an option of its own
}


@dataclass(frozen=True, slots=True)
class _Row:
    shortcut: str
    relaxation: str
    network: str
    batch: int = 100


_ROWS = (
    _Row("compiled passes, all", "box", "fc"),
    _Row("compiled passes, all", "crown-ibp", "fc"),
    _Row("compiled passes, all", "crown", "fc"),
    _Row("compiled passes, all", "crown", "conv"),
    _Row("compiled passes, all", "triangle", "fc-small"),
    _Row("compiled products of balls", "box", "fc"),
    _Row("compiled products of balls", "box", "conv"),
    _Row("compiled products of balls", "crown-ibp", "fc"),
    _Row("products with signs by tables", "crown", "fc"),
    _Row("products with signs by tables", "deepz", "fc"),
    _Row("products with signs by tables", "crown", "fc-small"),
    _Row("windows instead of whole rows", "crown", "convplus", 4),
    _Row("windows instead of whole rows", "deepz", "convplus", 4),
    _Row("rows through few channels", "crown", "conv"),
    _Row("DeepZ by rows", "deepz", "fc"),
    _Row("DeepZ by rows", "deepz", "conv", 10),
)
_QUICK = tuple(replace(row, network="fc-small", batch=2) for row in (_ROWS[0], _ROWS[5], _ROWS[8], _ROWS[14]))


def run(options: Options) -> Report:
    """One table, a row a shortcut, relaxation and network."""
    facts = environment(options)
    rows = [_measured(row, options) for row in (_QUICK if options.quick else _ROWS)]
    bars = [
        Bar(f"{row['shortcut']}, {row['relaxation']} on {row['network']}: difference", _EQUAL, None, row["difference"])
        for row in rows
    ]
    notes = (
        "A step: the margins' bounds, the certified cross-entropy and its backward pass; random weights and images. "
        "Without: PyTorch's operations, or the longer way. `difference`: of bounds, relative to the greatest.",
    )
    keys = ("shortcut", "relaxation", "network", "batch")
    table = Table(title="Steps", keys=keys, rows=rows, smaller=("with ms",), greater=("times faster",), notes=notes)
    return Report("shortcuts", TITLE, options, [table], bars, facts)


def _measured(row: _Row, options: Options) -> Row:
    of = case(row.network, row.batch, options.seed, options.device)
    tasks: dict[str, Task] = {"with": _call(of.step, row, False), "without": _call(of.step, row, True)}
    about = interleaved(tasks, runs=1, device=options.device, least=0.0).median("without")
    turns = _TURNS if about < _SHORT and not options.quick else 1
    timed = interleaved(tasks, runs=options.runs * turns, device=options.device)
    with torch.no_grad():
        one, other = (_call(of.margins, row, without)() for without in (False, True))
    difference = (one - other).abs().max() / other.abs().max()
    return {
        "shortcut": row.shortcut,
        "relaxation": row.relaxation,
        "network": row.network,
        "batch": row.batch,
        "with ms": 1e3 * timed.median("with"),
        "without ms": 1e3 * timed.median("without"),
        "times faster": timed.ratio("without", "with"),
        "difference": float(difference),
        "spread": timed.spread("with"),
    }


def _call(method: Callable[[relaxations.Relaxation], Any], row: _Row, without: bool) -> Callable[[], Any]:
    """One of the case's steps by the relaxation, with the shortcut or without it."""
    relaxation = relaxations.resolve(row.relaxation)
    if not without:
        return lambda: method(relaxation)
    if row.shortcut == "DeepZ by rows":
        relaxation = replace(relaxation, direction="forward")

    def work() -> Any:
        with _WITHOUT[row.shortcut]():
            return method(relaxation)

    return work
