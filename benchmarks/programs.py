"""General programs: linear and quadratic programs of growing size, forward and backward, against other solvers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Task, interleaved
from benchmarks.program_peers import PEERS, Data
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.layers import PDHG, Highs, InteriorPoint, LinearProgram, QuadraticProgram

TITLE = "General programs: batches of LPs and QPs against other solvers"
_LPS = ((10, 20, 1), (10, 20, 64), (10, 20, 1000), (50, 80, 1), (50, 80, 64), (50, 80, 256), (100, 200, 1))
_LPS = (*_LPS, (100, 200, 64), (200, 400, 1), (200, 400, 8))
_QPS = ((10, 20, 1), (10, 20, 64), (50, 80, 64), (50, 80, 256), (100, 200, 16))
_WANTED = {"HiGHS": 10.0, "Moreau": 10.0, "cvxpylayers": 100.0}
_ROUNDS = 5
_SPARSE = ((200, 100, 1000), (4000, 2000, 20_000), (10_000, 5000, 100_000))
_MOST = {"cvxpylayers": 64 * 200 * 100, "qpth": 64 * 80 * 50, "ProxQP": 64 * 80 * 50, "manylp": 0}
"""Entries of all matrices up to which a peer is run: beyond, its step takes a minute."""


def random_programs(batch: int, n: int, m: int, seed: int) -> dict[str, Tensor]:
    """Feasible LPs with dense rows in the unit box."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, m, n, generator=generator, dtype=torch.float64)
    inside = torch.rand(batch, n, 1, generator=generator, dtype=torch.float64)
    slack = torch.rand(batch, m, generator=generator, dtype=torch.float64)
    c = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(n, dtype=torch.float64)
    return {"c": c, "A": A, "b": (A @ inside).squeeze(-1) + slack, "lower": zeros, "upper": zeros + 1}


def sides(batch: int, n: int, m: int, seed: int) -> dict[str, Tensor]:
    """One dense A and one c, a b of its own for every problem."""
    data = random_programs(1, n, m, seed)
    generator = torch.Generator().manual_seed(seed)
    b = data["b"] + 0.2 * torch.rand(batch, m, generator=generator, dtype=torch.float64)
    return {**data, "c": data["c"][0], "A": data["A"][0], "b": b}


def transport(batch: int, size: int, _: int, seed: int) -> dict[str, Tensor]:
    """`size` sources and sinks, costs of their own: as many equalities more than independent ones as there are."""
    generator = torch.Generator().manual_seed(seed)
    eye, ones = torch.eye(size, dtype=torch.float64), torch.ones(1, size, dtype=torch.float64)
    E = torch.cat([torch.kron(eye, ones), torch.kron(ones, eye)])
    flow = torch.rand(batch, size * size, generator=generator, dtype=torch.float64)
    c = torch.rand(batch, size * size, generator=generator, dtype=torch.float64)
    return {"c": c, "E": E, "d": flow @ E.mT, "lower": torch.zeros(size * size, dtype=torch.float64)}


def assignment(batch: int, size: int, _: int, seed: int) -> dict[str, Tensor]:
    """Every vertex is degenerate: of 2 size - 1 basic variables, size are not 0."""
    data = transport(batch, size, 0, seed)
    return {**data, "d": torch.ones(2 * size, dtype=torch.float64)}


def degenerate(batch: int, n: int, m: int, seed: int) -> dict[str, Tensor]:
    """Half of the rows meet in one corner of the box, a quarter stand there twice; sparse, scales from 1e-2 to 1e2."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=generator, dtype=torch.float64)
    A = A * (torch.rand(m, n, generator=generator) < 0.2) * torch.logspace(-2, 2, m, dtype=torch.float64).unsqueeze(-1)
    A[: m // 4] = A[m // 4 : m // 2]
    corner = torch.rand(n, generator=generator, dtype=torch.float64).round()
    slack = A.abs().sum(-1) * torch.rand(m, generator=generator, dtype=torch.float64)
    slack[: m // 2] = 0
    c = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(n, dtype=torch.float64)
    return {"c": c, "A": A, "b": A @ corner + slack, "lower": zeros, "upper": zeros + 1}


def sparse_program(n: int, m: int, entries: int, seed: int) -> dict[str, Tensor]:
    """One feasible LP of a sparse A in the unit box; half of the rows hold with equality at the point it is made of."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randint(size, (entries,), generator=generator) for size in (m, n)])
    value = torch.randn(entries, generator=generator, dtype=torch.float64)
    A = torch.sparse_coo_tensor(place, value, (m, n), check_invariants=True).coalesce()
    inside = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    slack = torch.rand(m, generator=generator, dtype=torch.float64) * (torch.rand(m, generator=generator) < 0.5)
    c = torch.randn(1, n, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(n, dtype=torch.float64)
    return {"c": c, "A": A, "b": torch.sparse.mm(A, inside).squeeze(-1) + slack, "lower": zeros, "upper": zeros + 1}


FAMILIES: dict[str, tuple[Callable[..., dict[str, Tensor]], tuple[tuple[int, int], ...]]] = {
    "own sides": (sides, ((50, 80),)),
    "transport": (transport, ((6, 0), (12, 0))),
    "assignment": (assignment, ((6, 0), (12, 0))),
    "degenerate": (degenerate, ((30, 40), (100, 120))),
}


def run(options: Options) -> Report:
    """The suite."""
    quick = options.quick
    lps, qps = (((10, 20, 4),), ((10, 20, 4),)) if quick else (_LPS, _QPS)
    speed = _products_a_second()
    tables = [
        _table("LP", [_random("LP", *size, options, speed) for size in lps]),
        _table("QP", [_random("QP", *size, options, speed) for size in qps]),
        _families([_family(name, 4 if quick else 64, options) for name in (["transport"] if quick else FAMILIES)]),
        _sparse([_large(*size, options) for size in (_SPARSE[:1] if quick else _SPARSE[1:])]),
    ]
    return Report("programs", TITLE, options, tables, _bars(tables), environment(options))


def _bars(tables: list[Table]) -> list[Bar]:
    bars = []
    for table in tables[:2]:
        for row in table.rows:
            wanted = _WANTED if row["batch"] >= 64 else {"HiGHS": 0.5} if row["batch"] == 1 else {}
            bars += _times(f"{table.title[:2]}, n = {row['n']}, batch {row['batch']}", row, wanted)
    for row in tables[2].rows:
        bars += _times(f"{row['family']}, n = {row['n']}", row, {"HiGHS": _WANTED["HiGHS"]})
    bars += [
        Bar(f"certified gap of every {table.title[:2]}", 1e-8, None, max(row["gap"] for row in table.rows))
        for table in tables[:2]
    ]
    return bars


def _times(name: str, row: Row, wanted: dict[str, float]) -> list[Bar]:
    """How many times as fast as those of `wanted` that were measured."""
    measured = ((peer, least, row.get(f"times {peer}")) for peer, least in wanted.items())
    return [Bar(f"{name}: times {peer}", None, least, got) for peer, least, got in measured if got is not None]


def _table(kind: str, rows: list[Row]) -> Table:
    notes = (
        "Milliseconds a problem, forward and gradient: of the optimal value in all data here and after HiGHS, of the "
        "argmin in c, A, b elsewhere, none for ProxQP. As many threads as the run has, HiGHS as many problems at a "
        "time. Random dense rows, unit box, float64. gap: the largest certified one here, relative; off: how far a "
        "peer's value lies from the bound, relative, inf where it raised. floor: the products of the normal "
        "equations and their factor, in as many iterations, at this machine's rate of matrix products.",
    )
    keys, better = ("n", "m", "batch"), ("times HiGHS",) if kind == "LP" else ()
    return Table(title=f"{kind}s of n variables and m rows", keys=keys, rows=_alike(rows), greater=better, notes=notes)


def _alike(rows: list[Row]) -> list[Row]:
    """Rows with the same columns, those of whoever was measured first."""
    columns = list(dict.fromkeys(name for row in (max(rows, key=len), *rows) for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _sparse(rows: list[Row]) -> Table:
    notes = (
        "One problem, forward and gradient, milliseconds. Random entries, unit box, float64. gap: the certified one, "
        "relative. HiGHS: its dual simplex method, one thread.",
    )
    return Table(title="Sparse LPs", keys=("n", "m", "entries"), rows=rows, greater=("times HiGHS",), notes=notes)


def _large(n: int, m: int, entries: int, options: Options) -> Row:
    data = sparse_program(n, m, entries, options.seed)
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    row: Row = {"n": n, "m": m, "entries": entries}
    tasks: dict[str, Task] = {"HiGHS": _step(LinearProgram(Highs(workers=1)), leaves)}
    for tol in (1e-4, 1e-6):
        layer = LinearProgram(PDHG(tol=tol))
        found = layer(**data)
        row[f"gap at {tol:g}"] = float((found.gap / found.lower.abs().clamp(min=1)).max())
        row[f"iterations at {tol:g}"] = int(found.iterations.max())
        tasks[f"PDHG {tol:g}"] = _step(layer, leaves)
    samples = interleaved(tasks, runs=options.runs)
    row |= {f"{name} ms": samples.median(name) * 1e3 for name in tasks}
    return row | {"times HiGHS": samples.ratio("HiGHS", "PDHG 0.0001")}


def _families(rows: list[list[Row]]) -> Table:
    notes = (
        "64 problems over shared rows, forward alone; milliseconds a problem. own sides: dense, one c, b of its own; "
        "transport and assignment: size^2 variables, 2 size dependent equalities; degenerate: sparse, half of the rows "
        "meet in one corner, a quarter stand twice. manylp reuses bases found in earlier rounds. Medians of "
        f"{_ROUNDS} rounds a run, since a batch takes milliseconds.",
    )
    together = _alike([row for group in rows for row in group])
    return Table(title="Families", keys=("family", "n", "m"), rows=together, greater=("times HiGHS",), notes=notes)


def _random(kind: str, n: int, m: int, batch: int, options: Options, speed: float) -> Row:
    data = random_programs(batch, n, m, options.seed)
    if kind == "QP":
        root = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(options.seed), dtype=torch.float64)
        data = {"P": root @ root.mT / n, **data}
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    layer: Any = QuadraticProgram(InteriorPoint()) if kind == "QP" else LinearProgram(InteriorPoint())
    tasks: dict[str, Task] = {"ours": _step(layer, leaves)}
    if kind == "LP":
        tasks["HiGHS"] = _step(LinearProgram(Highs(workers=options.threads)), leaves)
    found = layer(**data)
    row: Row = {"n": n, "m": m, "batch": batch}
    row["gap"] = float((found.gap / found.lower.abs().clamp(min=1)).max())
    row["iterations"] = float(found.iterations.double().mean())
    row["floor ms"] = row["iterations"] * (n * n * m / 2 + n**3 / 6) / speed / options.threads * 1e3
    off = _add_peers(tasks, leaves, found.lower, n * m * batch, options)
    _timed(row, tasks, batch, options)
    return row | off


def _add_peers(
    tasks: dict[str, Task], data: Data, lower: Tensor, entries: int, options: Options
) -> dict[str, float | None]:
    """Adds the peers that are installed; how far their values are off."""
    off: dict[str, float | None] = {}
    for name, make in PEERS.items():
        if entries > _MOST.get(name, entries):
            continue
        step = make(data, options.threads)
        if step is None:
            continue
        try:
            off[f"{name} off"] = float(((step() - lower).abs() / lower.abs().clamp(min=1)).max())
        except RuntimeError:  # a singular system of one problem fails qpth's batch
            off[f"{name} off"] = math.inf
            continue
        tasks[name] = step
    return off


def _family(name: str, batch: int, options: Options) -> list[Row]:
    make, sizes = FAMILIES[name]
    rows = []
    for size, m in sizes:
        data = make(batch, size, m, options.seed)
        layer = LinearProgram()
        tasks: dict[str, Task] = {
            "ours": lambda data=data, layer=layer: layer(**data),
            "HiGHS": lambda data=data: LinearProgram(Highs(workers=options.threads))(**data),
        }
        found = layer(**data)
        count = data["c"].shape[-1]
        row: Row = {"family": name, "n": count, "m": m or 2 * size}
        row["gap"] = float((found.gap / found.lower.abs().clamp(min=1)).max())
        row["solver"] = found.solver
        off: dict[str, float | None] = {}
        step = PEERS["manylp"](data, options.threads) if name == "own sides" else None
        if step is not None:
            tasks["manylp"] = step
            off["manylp off"] = float(((step() - found.lower).abs() / found.lower.abs().clamp(min=1)).max())
        _timed(row, tasks, batch, options, _ROUNDS)
        rows.append(row | off)
    return rows


def _timed(row: Row, tasks: dict[str, Task], batch: int, options: Options, rounds: int = 1) -> None:
    samples = interleaved(tasks, runs=rounds * options.runs)
    for name in ("ours", "HiGHS", *PEERS):
        if name in tasks:
            row[f"{name} ms"] = samples.median(name) / batch * 1e3
    for name in ("HiGHS", *PEERS):
        if name in tasks:
            row[f"times {name}"] = samples.ratio(name, "ours")


def _step(layer: Any, leaves: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(**leaves).lower.sum(), list(leaves.values()))


def _products_a_second() -> float:
    """Multiply-adds of one thread in a matrix product in float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    A = torch.randn(1024, 1024, dtype=torch.float64)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        A @ A
        best = min(best, time.perf_counter() - begin)
    torch.set_num_threads(threads)
    return 1024**3 / best
