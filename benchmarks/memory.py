"""Memory: what relaxations and layers take under `max_bytes`, asked against measured."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.closed_forms import CLASSES, CLIP, EPS, Case, case
from benchmarks.measuring import Task, peak_bytes
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax import LinfBall, relaxations

TITLE = "Memory: what a pass takes under max_bytes"
MOST = 1.2
"""What is measured may be this much of what was asked for."""

_MIB = 2**20
_CLOSED = ("box", "hbox", "deepz", "cauchy", "crown-ibp", "crown")
_SETTINGS = {
    # label -> model, batch, relaxations, MiB
    "FC-SMALL": ("fc-small", 100, (*_CLOSED, "deepz:direction=forward", "triangle"), (8, 32, 128)),
    "FC-SMALL, alpha-CROWN and LP-ALL": ("fc-small", 20, ("alpha-crown:iterations=4", "layerwise"), (32, 128)),
    "FC": ("fc", 100, (*_CLOSED, "triangle"), (32, 128, 512)),
    "CONV": ("conv", 100, (*_CLOSED, "triangle"), (64, 256, 1024)),
}
_QUICK = {"FC-SMALL": ("fc-small", 10, ("box", "crown", "triangle"), (16,))}


def run(options: Options) -> Report:
    """One table a network."""
    facts = environment(options)
    tables, bars = [], []
    for label, (model, batch, names, budgets) in (_QUICK if options.quick else _SETTINGS).items():
        of = case(model, batch, options.seed, options.device)
        wanted = [name for name in names if not options.relaxations or name.partition(":")[0] in options.relaxations]
        rows = [_row(of, name, _MIB * budget, options) for name in wanted for budget in budgets]
        if rows:
            tables.append(_table(f"{label}, batch {batch}", rows))
            bars.append(_bar(tables[-1]))
    return Report("memory", TITLE, options, tables, bars, facts)


def probe(model: str, batch: int, seed: int, device: str, name: str, budget: int) -> Task:
    """One step of a relaxation in `budget` bytes, for `peak_bytes`; warmed up on a single example, in pieces.

    The first piece ever loads the machinery that makes the others again, which is no memory of the pass.
    """
    relaxation = relaxations.resolve(name)
    small, whole = (case(model, size, seed, device) for size in (1, batch))
    need = relaxation.bytes_needed(small.network, LinfBall(small.x, EPS, CLIP), CLASSES - 1)
    for most in (need, need // 2):
        small.step(replace(relaxation, max_bytes=most))
    limited = replace(relaxation, max_bytes=budget)
    return lambda: whole.step(limited)


def _row(of: Case, name: str, budget: int, options: Options) -> Row:
    relaxation = relaxations.resolve(name)
    region = LinfBall(of.x, EPS, CLIP)
    given = {"model": of.model, "batch": of.batch, "seed": options.seed, "name": name, "budget": budget}
    found = peak_bytes(probe, threads=options.threads, device=options.device, **given)
    least = relaxation.least_bytes(of.network, region, CLASSES - 1)
    return {
        "relaxation": name,
        "asked MiB": budget // _MIB,
        "whole MiB": relaxation.bytes_needed(of.network, region, CLASSES - 1) / _MIB,
        "least MiB": least / _MIB,
        "measured MiB": None if found is None else found / _MIB,
        "measured / asked": None if found is None else found / budget,
        "possible": "yes" if least <= budget else "no",
    }


def _table(title: str, rows: list[Row]) -> Table:
    return Table(
        title=title,
        keys=("relaxation", "asked MiB"),
        rows=rows,
        smaller=("measured / asked",),
        notes=(
            "Measured is the peak of one step (forward and backward) in a fresh process, beyond what was there before, "
            "with a C library that gives freed memory back at once; one that keeps it may hold twice as much. "
            "Whole is what the library counts for a pass that is not cut, least what it needs for one row of one "
            "example (for the LP layers beside the points of all that wait); a limit below that is exceeded.",
        ),
    )


def _bar(table: Table) -> Bar:
    ratios = [row["measured / asked"] for row in table.rows if row["possible"] == "yes"]
    worst = None if not ratios or None in ratios else max(ratios)
    return Bar(f"{table.title}: most measured, times what was asked", MOST, None, worst)
