"""General programs: linear and quadratic programs of growing size, forward and backward, against other solvers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.layers import Highs, InteriorPoint, LinearProgram, QuadraticProgram

TITLE = "General programs: batches of LPs and QPs against HiGHS and cvxpylayers"
_SIZES = ((10, 20), (50, 80), (100, 200))
_BATCHES = (1, 64)
_PEERS_UP_TO = 64  # cvxpylayers' variables: above, its backward pass takes minutes


def random_programs(batch: int, n: int, m: int, seed: int) -> dict[str, Tensor]:
    """Feasible LPs with dense rows in the unit box."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, m, n, generator=generator, dtype=torch.float64)
    inside = torch.rand(batch, n, 1, generator=generator, dtype=torch.float64)
    slack = torch.rand(batch, m, generator=generator, dtype=torch.float64)
    c = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(n, dtype=torch.float64)
    return {"c": c, "A": A, "b": (A @ inside).squeeze(-1) + slack, "lower": zeros, "upper": zeros + 1}


def run(options: Options) -> Report:
    """The suite."""
    sizes, batches = (_SIZES[:1], (4,)) if options.quick else (_SIZES, _BATCHES)
    tables = [_table(kind, sizes, batches, options) for kind in ("LP", "QP")]
    bars = [
        Bar(f"LP, n = {row['n']}, batch {row['batch']}: times HiGHS", None, 10.0, row["times HiGHS"])
        for row in tables[0].rows
        if row["batch"] >= 64 and row["n"] <= 100
    ]
    return Report("programs", TITLE, options, tables, bars, environment(options))


def _table(kind: str, sizes: tuple[tuple[int, int], ...], batches: tuple[int, ...], options: Options) -> Table:
    rows = [_row(kind, n, m, batch, options) for n, m in sizes for batch in batches]
    notes = (
        "Milliseconds a problem, forward and gradient of the optimal value (cvxpylayers: of the argmin) in all data, "
        "the same threads for all. Random dense rows, unit box, float64; gap: the largest certified one.",
    )
    return Table(
        title=f"{kind}s of n variables and m rows",
        keys=("n", "m", "batch"),
        rows=rows,
        greater=("times HiGHS",),
        notes=notes,
    )


def _row(kind: str, n: int, m: int, batch: int, options: Options) -> Row:
    data = random_programs(batch, n, m, options.seed)
    if kind == "QP":
        root = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(options.seed), dtype=torch.float64)
        data = {"P": root @ root.mT / n, **data}
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    layers: dict[str, Any] = {
        "ours": QuadraticProgram(InteriorPoint()) if kind == "QP" else LinearProgram(InteriorPoint())
    }
    if kind == "LP":
        layers["HiGHS"] = LinearProgram(Highs(workers=options.threads))
    tasks: dict[str, Task] = {name: _step(layer, leaves) for name, layer in layers.items()}
    if n <= _PEERS_UP_TO:
        tasks["cvxpylayers"] = _cvxpylayers(kind, leaves, options.threads)
    samples = interleaved(tasks, runs=options.runs)
    found = layers["ours"](**data)
    row: Row = {"n": n, "m": m, "batch": batch}
    for name in ("ours", "HiGHS", "cvxpylayers"):
        row[f"{name} ms"] = samples.median(name) / batch * 1e3 if name in tasks else None
    row["iterations"] = float(found.iterations.double().mean())
    row["gap"] = float((found.gap / found.lower.abs().clamp(min=1)).max())
    for name in ("HiGHS", "cvxpylayers"):
        row[f"times {name}"] = samples.ratio(name, "ours") if name in tasks else None
    return row


def _step(layer: Any, leaves: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(**leaves).lower.sum(), list(leaves.values()))


def _cvxpylayers(kind: str, leaves: dict[str, Tensor], threads: int) -> Callable[[], object]:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n, m = leaves["A"].shape[-1], leaves["A"].shape[-2]
    x, c, A, b = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    parameters, objective = [c, A, b], c @ x
    values = [leaves[name] for name in ("c", "A", "b")]
    if kind == "QP":
        root = cp.Parameter((n, n))
        parameters, objective = [root, *parameters], objective + cp.sum_squares(root @ x) / 2
        values = [torch.linalg.cholesky(leaves["P"].detach()).mT.contiguous().requires_grad_(), *values]
    layer = CvxpyLayer(cp.Problem(cp.Minimize(objective), [A @ x <= b, x >= 0, x <= 1]), parameters, [x])
    arguments = {"solve_method": "CLARABEL", "n_jobs_forward": threads, "n_jobs_backward": threads}

    def step() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = layer(*values, solver_args=arguments)
            return torch.autograd.grad(found.sum(), values)

    return step
