"""Rows of a report: a network to train or a question to ask of one, each a file that is there whole or not at all.

DIR/runs/NAME is a training run, DIR/rows/NAME.json an answer with the settings it was made with and a digest of the
network it is about. Rows that are there are not done again; a row of other settings is an error that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from optrelax.data.datasets import Dataset, load_dataset
from optrelax.output.tables import write_json
from optrelax.papers.questions import Measurement
from optrelax.training.runs import _differences, record, versions
from optrelax.training.sweeps import SweepRun, train_run

__all__ = ["Outcome", "Row", "RowProgress", "do_rows"]

_FORMAT = "optrelax report row 1"
# What data, settings and arithmetic can raise while a row works: its own failure, which must not end the others.
_FAULTS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Row:
    """Train a network, or ask a question of a trained one (`run` None: of none).

    data: the name of the data set whose test images the question is about.
    """

    data: str
    run: SweepRun | None
    question: Measurement | None = None

    @property
    def name(self) -> str:
        """Of its file: the run's name, and the question's."""
        parts = [None if self.run is None else self.run.name, None if self.question is None else self.question.name]
        return ".".join(part for part in parts if part is not None)

    @property
    def training(self) -> Row | None:
        """The row that must be there first."""
        return None if self.run is None or self.question is None else Row(self.data, self.run)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the answer, JSON-ready."""
        run = None if self.run is None else {"recipe": asdict(self.run.row), "seed": self.run.seed}
        settings = {"data": self.data, "run": run, "question": record(self.question)}
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row: its answer, or why there is none."""

    answer: Mapping[str, Any] | None
    error: str | None = None
    seconds: float = 0.0
    """Of the clock, in one process of one thread."""
    versions: Mapping[str, str] | None = None


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
    if workers < 1:
        raise ValueError(f"do_rows: workers must be at least 1, got {workers}")
    wanted = _unique(rows)
    outcomes: dict[str, Outcome] = {}

    def tell(name: str) -> None:
        if watch is not None:
            failed = sum(outcome.error is not None for outcome in outcomes.values())
            watch(RowProgress(len(outcomes) - failed, failed, len(wanted), name))

    def keep(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        tell(name)

    found = {row.name: _stored(row, folder) for row in wanted}
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
                stored = _stored(row, folder)
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


# --- work ---------------------------------------------------------------------------------------------------------


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
    content = {
        "format": _FORMAT,
        "settings": row.settings(),
        "network": _digest(row, folder),
        "seconds": seconds,
        "versions": versions(),
        "answer": answer,
    }
    try:
        write_json(content, _file(row, folder))
    except OSError as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    stored = _stored(row, folder)
    assert stored is not None
    return stored


def _train(row: Row, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    assert row.run is not None
    return train_run(row.run, str(folder / "runs" / row.run.name), None if data_dir is None else str(data_dir), 1)


def _ask(row: Row, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    from optrelax.networks.checkpoints import load

    assert row.question is not None
    network = None if row.run is None else load(_net(row, folder))
    return row.question.ask(network, _test(row.data, data_dir))


# --- files --------------------------------------------------------------------------------------------------------


def _file(row: Row, folder: Path) -> Path:
    return folder / "rows" / f"{row.name}.json"


def _net(row: Row, folder: Path) -> Path:
    assert row.run is not None
    return folder / "runs" / row.run.name / "net.safetensors"


def _digest(row: Row, folder: Path) -> str | None:
    """Of the network's file; None without one."""
    if row.run is None or not _net(row, folder).exists():
        return None
    return hashlib.sha256(_net(row, folder).read_bytes()).hexdigest()[:16]


def _stored(row: Row, folder: Path) -> Outcome | None:
    """The outcome in the folder; None where there is none, or one about another network than is there now.

    Raises ValueError for a row of other settings, or a file that is none.
    """
    file = _file(row, folder)
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        was, network, answer, seconds = (found[key] for key in ("settings", "network", "answer", "seconds"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a row of a report, got a file that fails: {error}; remove it") from error
    if changed := _differences(was, row.settings()):
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise ValueError(f"{file}: was made with other settings: {shown}; choose another --out, or remove it")
    if network != _digest(row, folder) or (row.run is not None and network is None):
        return None
    return Outcome(answer, None, float(seconds), found.get("versions"))
