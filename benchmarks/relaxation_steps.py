"""The relaxation step: kernels and PyTorch's operations against the bare traffic of memory that a step needs."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.domains.lines import Lines
from optrelax.kernels import band_step, native, relax_step
from optrelax.kernels.triton_steps import passes

TITLE = "Relaxation steps: rows pulled through lines, against the bare traffic of memory"

_SIZES = ((100, 100, 3136), (100, 10, 3136), (10, 784, 784))
_QUICK = ((3, 5, 70),)
_MOST = 2.0
"""Times the floor that a step on a CUDA device may take."""


@dataclass(frozen=True)
class _Step:
    """A step of one size: the rows [batch, k, n], the lines [batch, n] and the gradients of its results."""

    rows: Tensor
    lines: Lines
    grads: list[Tensor]
    call: Callable[[Tensor, Lines], tuple[Tensor, ...]]

    def forward(self) -> None:
        with torch.no_grad():
            self.call(self.rows, self.lines)

    def both(self) -> None:
        """Forward and backward: gradients in the rows and in the lines."""
        unlike = [self.lines.lower_slope, self.lines.lower_intercept, self.lines.upper_intercept]
        unlike += [] if self.lines.parallel else [self.lines.upper_slope]
        torch.autograd.grad(self.call(self.rows, self.lines), [self.rows, *unlike], self.grads)


def run(options: Options) -> Report:
    """One table: steps with two slopes and between parallel lines, of every size."""
    sizes = _QUICK if options.quick else _SIZES
    rows = [_row(name, size, options) for size in sizes for name in ("two slopes", "parallel lines")]
    bars = []
    if torch.device(options.device).type == "cuda":
        bars = [
            Bar(f"{row['step']}, {row['size']}: {what}, times the floor", _MOST, None, row[f"{what} / floor"])
            for row in rows
            for what in ("forward", "both")
        ]
    note = (
        "Floor: a copy of the rows into memory already there; both ways: two copies and a read, for a step reads the "
        "rows and writes as many, then reads the rows and a gradient and writes another. Eager: PyTorch's operations."
    )
    smaller = ("forward / floor", "both / floor")
    table = Table(title="Steps", keys=("step", "size"), rows=rows, smaller=smaller, notes=(note,))
    return Report("relaxation_steps", TITLE, options, [table], bars, environment(options))


def _row(name: str, size: tuple[int, int, int], options: Options) -> Row:
    step = _step(name == "parallel lines", size, options)
    kept = torch.empty_like(step.rows)

    def copy() -> None:
        kept.copy_(step.rows.detach())

    def copies() -> None:
        copy()
        copy()
        kept.sum()

    def eagerly(task: Task) -> Task:
        def work() -> None:
            with _eager():
                task()

        return work

    tasks: dict[str, Task] = {"forward": step.forward, "both": step.both, "floor": copy, "both floor": copies}
    tasks |= {"eager forward": eagerly(step.forward), "eager both": eagerly(step.both)}
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    kernels = passes(relax_step.kernels(), step.rows)
    return {
        "step": name,
        "size": " x ".join(map(str, size)),
        "kernels": "none" if kernels is None else "C" if isinstance(kernels, native.Build) else "Triton",
        "forward ms": 1e3 * timed.median("forward"),
        "both ms": 1e3 * timed.median("both"),
        "forward / floor": timed.ratio("forward", "floor"),
        "both / floor": timed.ratio("both", "both floor"),
        "forward / eager": timed.ratio("forward", "eager forward"),
        "both / eager": timed.ratio("both", "eager both"),
    }


def _step(parallel: bool, size: tuple[int, int, int], options: Options) -> _Step:
    g = torch.Generator().manual_seed(options.seed)
    batch, k, n = size

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g).to(options.device)

    lines = [draw(batch, n).requires_grad_() for _ in range(4)]
    if parallel:
        lines[2] = lines[0]
    grads = [draw(batch, k, n), *(draw(batch, k) for _ in range(2 if parallel else 1))]
    call = band_step.band_step if parallel else relax_step.relax_step
    return _Step(draw(batch, k, n).requires_grad_(), Lines(*lines), grads, call)


@contextmanager
def _eager() -> Iterator[None]:
    def none(*given: object) -> None: ...

    with unittest.mock.patch.multiple(relax_step, passes=none), unittest.mock.patch.multiple(band_step, passes=none):
        yield
