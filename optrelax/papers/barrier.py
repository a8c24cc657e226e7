"""The barrier table: LP-ALL on the networks of Salman et al. (2019), all MNIST test images, on one machine.

Published figures: "A Convex Relaxation Barrier to Tight Robustness Verification of Neural Networks" (NeurIPS 2019),
percent of the 10,000 test images that are not certified (errors included), box clipped to [0, 1].
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optrelax.certification.journals import weights_digest
from optrelax.data.datasets import load_dataset
from optrelax.data.splits import Dataset, evenly_spaced
from optrelax.margin_rows import margins
from optrelax.networks.capturing import capture
from optrelax.networks.checkpoint_files import read_npz
from optrelax.output.json_lines import JsonLines
from optrelax.papers.layerwise_verdicts import Cascade, Stage
from optrelax.regions import InputBox, LinfBall

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ROWS", "BarrierRow", "barrier_frame", "barrier_lines", "run_barrier"]

_FORMAT = "optrelax barrier journal 2"


@dataclass(frozen=True, slots=True)
class BarrierRow:
    """One row of the published table; figures in percent of 10,000 images."""

    network: str
    eps: float
    lp_all: float
    lp_greedy: float

    @property
    def key(self) -> str:
        """Name of the row in files."""
        return f"{self.network}@{self.eps:g}"


ROWS = (
    BarrierRow("adv-mlp-b-0.05", 0.05, 23.29, 33.09),
    BarrierRow("adv-mlp-b-0.1", 0.1, 61.59, 71.34),
    BarrierRow("nor-mlp-b", 0.02, 26.41, 35.11),
    BarrierRow("nor-mlp-b", 0.03, 65.70, 75.85),
    BarrierRow("nor-mlp-b", 0.05, 97.95, 99.39),
    BarrierRow("lpd-mlp-b-0.1", 0.1, 17.24, 18.32),
)


@dataclass(frozen=True, slots=True)
class StageOutcomes:
    """Some images of one row and the stage that decided each."""

    row: str
    images: tuple[int, ...]
    stages: tuple[int, ...]
    seconds: float
    """Of one core."""


def run_barrier(
    weights: Path,
    data_dir: Path | None,
    *,
    rows: tuple[BarrierRow, ...] = ROWS,
    subset: int | None = None,
    batch_size: int = 100,
    workers: int = 1,
    device: str = "cpu",
    journal: Path | None = None,
    progress: Callable[[StageOutcomes, int, int], None] | None = None,
) -> list[StageOutcomes]:
    """Decide every image of every row, in processes of one thread; batches already in the journal are not done again.

    On a CUDA device one worker with large batches is fastest.

    progress(batch, images done, images in all) is called in this process.
    Raises ValueError for a journal of other weights, a damaged one, and one that another process writes; OSError where
    a file is missing.
    """
    data = load_dataset("mnist", data_dir, "test")
    size = len(data)
    images = evenly_spaced(size, subset) if subset is not None and subset < size else torch.arange(size)
    wanted = [
        (row, tuple(int(i) for i in chunk)) for row in rows for chunk in torch.as_tensor(images).split(batch_size)
    ]
    with _BarrierJournal(journal, weights, rows) as kept:
        done = kept.found
        left = [(row, chunk) for row, chunk in wanted if (row.key, chunk) not in done]
        batches = [done[row.key, chunk] for row, chunk in wanted if (row.key, chunk) in done]
        total = sum(len(chunk) for _, chunk in wanted)
        finished = sum(len(batch.images) for batch in batches)
        for batch in _decided(left, weights, data_dir, workers, device):
            batches.append(batch)
            finished += len(batch.images)
            kept.append(batch)
            if progress is not None:
                progress(batch, finished, total)
    return batches


def _decided(
    left: list[tuple[BarrierRow, tuple[int, ...]]], weights: Path, data_dir: Path | None, workers: int, device: str
) -> Iterator[StageOutcomes]:
    """Batches as they are finished."""
    if workers == 1:
        for row, chunk in left:
            yield _decide(row, chunk, weights, data_dir, device)
        return
    # spawn: a forked child would inherit torch's thread pool without its threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting: set[Future[StageOutcomes]] = {
            pool.submit(_decide, row, chunk, weights, data_dir, device) for row, chunk in left
        }
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def _cascade(path: Path, device: str) -> Cascade:
    return Cascade(capture(read_npz(path).to(device), (1, 28, 28)))


@cache
def _data(data_dir: Path | None) -> Dataset:
    return load_dataset("mnist", data_dir, "test")


def _decide(
    row: BarrierRow, chunk: tuple[int, ...], weights: Path, data_dir: Path | None, device: str
) -> StageOutcomes:
    begin = time.perf_counter()
    data = _data(data_dir)
    index = torch.tensor(chunk)
    x, labels = data.images[index].to(device, torch.float64), data.labels[index].to(device)
    ball = LinfBall(x, row.eps, clip=(0.0, 1.0))
    rows = margins(labels, data.classes).double()
    stages = _cascade(weights / f"{row.network}.npz", device).decide(x, InputBox(ball.lower, ball.upper), rows)
    return StageOutcomes(row.key, chunk, tuple(stages.tolist()), time.perf_counter() - begin)


def _fingerprint(weights: Path, rows: tuple[BarrierRow, ...]) -> dict[str, str]:
    names = sorted({row.network for row in rows})
    return {name: weights_digest(capture(read_npz(weights / f"{name}.npz"), (1, 28, 28))) for name in names}


class _BarrierJournal:
    """Batches decided so far, on disk as soon as `append` returns; without a path nothing is kept.

    One process at a time has it open (see `optrelax.output.json_lines`).
    """

    def __init__(self, path: Path | None, weights: Path, rows: tuple[BarrierRow, ...]) -> None:
        self.found: dict[tuple[str, tuple[int, ...]], StageOutcomes] = {}
        self._lines: JsonLines | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        digests = _fingerprint(weights, rows)
        self._lines = JsonLines(path, {"format": _FORMAT, "weights": digests}, "no journal of the barrier table")
        try:
            self._read(path, digests)
        except BaseException:
            self._lines.close()
            raise

    def __enter__(self) -> _BarrierJournal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    def _read(self, path: Path, digests: dict[str, str]) -> None:
        assert self._lines is not None
        header, *records = self._lines.records
        known = header.get("weights")
        if not isinstance(known, dict) or any(known.get(name) != digest for name, digest in digests.items()):
            raise ValueError(f"{path}: was written for other weights; choose another --out")
        for number, record in enumerate(records, 2):
            try:
                images, stages = tuple(map(int, record["images"])), tuple(int(Stage(s)) for s in record["stages"])
                batch = StageOutcomes(str(record["row"]), images, stages, float(record["seconds"]))
                if len(images) != len(stages):
                    raise ValueError(f"{len(images)} images and {len(stages)} stages")
            except (TypeError, KeyError, ValueError) as error:
                raise ValueError(f"resume: {path}, line {number} is no batch: {error}") from error
            self.found[batch.row, batch.images] = batch

    def append(self, batch: StageOutcomes) -> None:
        """Keep a batch.  OSError where it does not fit."""
        if self._lines is not None:
            record = {"row": batch.row, "images": batch.images, "stages": batch.stages}
            self._lines.append({**record, "seconds": round(batch.seconds, 3)})


def barrier_frame(batches: list[StageOutcomes], rows: tuple[BarrierRow, ...] = ROWS) -> pl.DataFrame:
    """`barrier_lines` as a frame."""
    import polars as pl

    return pl.DataFrame(barrier_lines(batches, rows))


def barrier_lines(batches: list[StageOutcomes], rows: tuple[BarrierRow, ...] = ROWS) -> list[dict[str, object]]:
    """One line a row: published and measured figures in percent, how many images each stage decided, and time."""
    lines = []
    for row in rows:
        mine = [batch for batch in batches if batch.row == row.key]
        counts = Counter(stage for batch in mine for stage in batch.stages)
        images = sum(counts.values())
        if not images:
            continue
        certified = sum(count for stage, count in counts.items() if Stage(stage).certified)
        line: dict[str, object] = {
            "network": row.network,
            "eps": row.eps,
            "images": images,
            "LP-ALL published": row.lp_all,
            "LP-ALL": 100 * (1 - certified / images),
            "undecided": counts[Stage.UNDECIDED],
        }
        line |= {stage.name.lower().replace("_", "-"): counts[stage] for stage in Stage if stage != Stage.UNDECIDED}
        line["core-ms an image"] = 1e3 * sum(batch.seconds for batch in mine) / images
        lines.append(line)
    return lines
