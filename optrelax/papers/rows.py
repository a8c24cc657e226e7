"""The work of a report's rows: networks are trained, questions asked of them, several at once where workers are.

Rows that are there are not done again; a row of other settings is an error that names it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from optrelax.checks import require_range
from optrelax.data.datasets import load_dataset
from optrelax.data.splits import Dataset
from optrelax.papers.row_files import Outcome, Row
from optrelax.training.sweeps import train_run

__all__ = ["RowProgress", "do_rows"]

# What data, settings and arithmetic can raise while a row works: its own failure, which must not end the others.
_FAULTS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


_LOST = Outcome(None, "its process was lost, or that of a row beside it; the same command goes on")


@dataclass(frozen=True, slots=True)
class RowProgress:
    """Where a report stands."""

    done: int
    failed: int
    total: int
    name: str
    """Of the row that ended last."""


def do_rows(
    rows: Sequence[Row],
    folder: Path,
    *,
    data_dir: Path | None = None,
    workers: int = 1,
    watch: Callable[[RowProgress], None] | None = None,
) -> dict[str, Outcome]:
    """Do what is not in `folder` yet, at most `workers` rows at once, one thread each; every row's outcome by name.

    A row that fails is an `Outcome` with an error, and the others go on.
    Raises ValueError where `folder` holds a row of other settings or a damaged one, FileNotFoundError for missing data.
    """
    require_range("do_rows", "at least 1", workers=workers)
    wanted = _unique(rows)
    outcomes: dict[str, Outcome] = {}

    def tell(name: str) -> None:
        if watch is not None:
            failed = sum(outcome.error is not None for outcome in outcomes.values())
            watch(RowProgress(len(outcomes) - failed, failed, len(wanted), name))

    def keep(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        tell(name)

    found = {row.name: row.stored(folder) for row in wanted}
    left = [row for row in wanted if found[row.name] is None]
    for data in sorted({row.data for row in left}):
        _require_data(data, data_dir)
    stages = [row for row in wanted if row.question is None], [row for row in wanted if row.question is not None]
    with _workers(workers) as pool:
        for stage in stages:
            todo = []
            for row in stage:
                before = None if row.training is None else outcomes[row.training.name]
                # Asked again, now that networks may have been trained anew.
                stored = row.stored(folder)
                if stored is not None:
                    keep(row.name, stored)
                elif before is not None and before.error is not None:
                    keep(row.name, Outcome(None, f"its network was not trained: {before.error}"))
                else:
                    todo.append(row)
            for name, outcome in _done(sorted(todo, key=_cost, reverse=True), folder, data_dir, pool):
                keep(name, outcome)
    return outcomes


def _unique(rows: Sequence[Row]) -> list[Row]:
    """Every row once, and every training that one of them needs; ValueError where two of one name differ."""
    every: dict[str, Row] = {}
    for row in rows:
        for one in (row.training, row):
            if one is not None and every.setdefault(one.name, one).settings() != one.settings():
                raise ValueError(f"do_rows: two rows {one.name!r} differ")
    return list(every.values())


def _require_data(name: str, data_dir: Path | None) -> None:
    for split in ("train", "test"):
        load_dataset(name, data_dir, split)


def _cost(row: Row) -> float:
    """Roughly in what order: the dearest training first, so that no core waits long for the last one."""
    from optrelax.training.recipe_budgets import milliseconds

    if row.run is None:
        return 0.0
    recipe = row.run.row
    return milliseconds(recipe) * recipe.epochs * (60_000 if recipe.subset is None else recipe.subset)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes of one thread each, or this one, with as many while it works: they decide the last bits."""
    if count > 1:
        # spawn: a forked child would inherit torch's thread pool without its threads.
        with ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin) as pool:
            yield pool
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield None
    finally:
        torch.set_num_threads(before)


def _done(
    rows: Sequence[Row], folder: Path, data_dir: Path | None, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[str, Outcome]]:
    """Outcomes as rows end."""
    if pool is None:
        for row in rows:
            yield row.name, _do(row, folder, data_dir)
        return
    waiting: dict[Future[Outcome], Row] = {}
    try:
        for row in rows:
            try:
                waiting[pool.submit(_do, row, folder, data_dir)] = row
            except BrokenProcessPool:
                yield row.name, _LOST
        for future in as_completed(waiting):
            lost = isinstance(future.exception(), BrokenProcessPool)
            yield waiting[future].name, _LOST if lost else future.result()
    finally:
        for future in waiting:
            future.cancel()


def _begin() -> None:
    """A worker: one thread, pages kept, and an end when the main process ends, however that ends."""
    from optrelax.kernels.pages import keep_pages

    torch.set_num_threads(1)
    keep_pages()
    main = parent_process()
    assert main is not None

    def leave() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


@cache
def _test(name: str, data_dir: Path | None) -> Dataset:
    return load_dataset(name, data_dir, "test")


def _do(row: Row, folder: Path, data_dir: Path | None) -> Outcome:
    """Do one row and store it."""
    begin = time.perf_counter()
    try:
        answer = _train(row, folder, data_dir) if row.question is None else _ask(row, folder, data_dir)
    except _FAULTS as error:
        return Outcome(None, f"{type(error).__name__}: {error}".splitlines()[0])
    seconds = time.perf_counter() - begin
    # A run that was interrupted has earlier epochs behind it.
    seconds = max(seconds, answer["seconds"]) if row.question is None else seconds
    try:
        row.store(folder, answer, seconds)
    except OSError as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    stored = row.stored(folder)
    assert stored is not None
    return stored


def _train(row: Row, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    assert row.run is not None
    return train_run(row.run, str(folder / "runs" / row.run.name), None if data_dir is None else str(data_dir), 1)


def _ask(row: Row, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    from optrelax.networks.checkpoints import load

    assert row.question is not None
    network = None if row.run is None else load(row.network(folder))
    return row.question.ask(network, _test(row.data, data_dir))
