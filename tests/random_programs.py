"""Random small programs of every kind, against rationals: no status, bound, gap or value that is not so.

`python -m tests.random_programs --count 20000` draws as many as one likes, a quarter of each kind.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from exact_programs import exact_optimum
from lp_cases import Data

from optrelax.layers import DualSimplex, Highs, LinearProgram, MixedIntegerProgram, QuadraticProgram, Status

BATCH = 6
NEAREST = 1e-9  # what "nearest" may be above an optimum, relative
OPEN = (Status.NUMERICAL, Status.ITERATION_LIMIT)
_ROUNDINGS = ("nearest", "outward")
_SIZES = {"whole": 0, "sparse": 0, "real": 0, "thirds": 0, "scaled": 3, "badly scaled": 8}


def _entry(draw: random.Random, kind: str) -> float:
    if kind == "whole":
        return float(draw.randint(-3, 3))
    if kind == "sparse":
        return draw.choice([0.0, 0.0, 0.0, 1.0, -1.0, 2.0])
    if kind == "thirds":
        return draw.randint(-5, 5) / 3
    return draw.gauss(0, 1) * 10.0 ** draw.randint(-_SIZES[kind], _SIZES[kind])


def _ends(draw: random.Random) -> tuple[float, float]:
    share = draw.random()
    if share < 0.45:
        return 0.0, draw.choice([1.0, 2.0, 5.0])
    if share < 0.6:
        return 0.0, math.inf
    if share < 0.75:
        return -math.inf, math.inf
    if share < 0.85:
        return -math.inf, float(draw.randint(-1, 2))
    if share < 0.95:
        held = float(draw.randint(-1, 1))
        return held, held
    return -1e6, 1e6


def _side(draw: random.Random, kind: str, at: float) -> float:
    """Of an inequality that a point meets at `at`: tight, with room, anything, or no limit."""
    share = draw.random()
    if share < 0.3:
        return at
    if share < 0.75:
        return at + abs(_entry(draw, kind))
    return _entry(draw, kind) if share < 0.93 else draw.choice([math.inf, 1e20, 1e8])


def _one(draw: random.Random, n: int, m: int, p: int, kind: str, like: list[Any] | None = None) -> list[Any]:
    """c, A, b, E, d, lower, upper as lists, with rows of zeros, equal rows and columns that almost cancel.

    like: a program whose matrices this one has.
    """
    c = [_entry(draw, kind) if draw.random() < 0.85 else 0.0 for _ in range(n)]
    A, E = ([[_entry(draw, kind) for _ in range(n)] for _ in range(rows)] for rows in (m, p))
    if like is not None:
        A, E = like[1], like[3]
    lower, upper = (list(ends) for ends in zip(*(_ends(draw) for _ in range(n)), strict=True))
    plain = kind if kind in ("whole", "sparse") else "real"
    inside = [min(max(_entry(draw, plain), low), high) for low, high in zip(lower, upper, strict=True)]
    reached = [[sum(x * y for x, y in zip(row, inside, strict=True)) for row in rows] for rows in (A, E)]
    b = [_side(draw, kind, at) for at in reached[0]]
    d = [at if draw.random() < 0.85 else _entry(draw, kind) for at in reached[1]]
    if like is not None:
        return [c, A, b, E, d, lower, upper]
    if m > 1 and draw.random() < 0.3:
        A[1] = list(A[0])
    if m and draw.random() < 0.15:
        A[0] = [0.0] * n
    if p > 1 and draw.random() < 0.3:
        E[1], d[1] = [2 * x for x in E[0]], 2 * d[0]
    if n > 1 and draw.random() < 0.3:
        for row in A + E:
            row[1] = row[0]
        c[1] = c[0] * (1 + draw.choice([0.0, 1e-15, 1e-12, 1e-9, 1e-6, -1e-9, -1e-13]))
        lower[0] = lower[1] = draw.choice([-math.inf, 0.0])
        upper[0] = upper[1] = math.inf
    return [c, A, b, E, d, lower, upper]


def _stacked(programs: list[list[Any]], n: int, m: int, p: int) -> Data:
    shapes = ((n,), (m, n), (m,), (p, n), (p,), (n,), (n,))
    return Data(
        *(
            torch.tensor([one[k] for one in programs], dtype=torch.float64).reshape(len(programs), *shape)
            for k, shape in enumerate(shapes)
        )
    )


def drawn(seed: int, *, integers: bool = False, shared: bool = False) -> tuple[Data, str, random.Random]:
    """A batch of programs of one shape, what their entries are, and the generator for what else is drawn.

    shared: all but c and the sides and ends are the first one's.
    """
    draw = random.Random(seed)
    n, m, p = draw.randint(1, 4), draw.randint(0, 4), draw.choice([0, 0, 1] if integers else [0, 0, 1, 2])
    kind = draw.choice([name for name in _SIZES if not integers or name != "badly scaled"])
    programs = [_one(draw, n, m, p, kind)]
    programs += [_one(draw, n, m, p, kind, programs[0] if shared else None) for _ in range(BATCH - 1)]
    if integers:
        for one in programs:
            one[5] = [draw.randint(-2, 0) + draw.choice([0.0, 0.0, 0.5, -0.3]) for _ in range(n)]
            one[6] = [low + draw.choice([0.0, 1.0, 1.0, 2.0, 3.5]) for low in one[5]]
    return _stacked(programs, n, m, p), kind, draw


def linear_faults(seed: int, counts: Counter[str]) -> Iterator[str]:
    """What `LinearProgram` says that is not so, of one batch of LPs; `counts` what it says."""
    data, kind, _ = drawn(seed)
    yield from _linear_faults(seed, counts, data, data, kind, ("auto", Highs(workers=1)))
    alone = [LinearProgram(rounding="outward")(*(part[i : i + 1] for part in data)).status.item() for i in (0, 1)]
    together = LinearProgram(rounding="outward")(*data).status[:2].tolist()
    if alone != together:
        yield f"LP seed {seed}: statuses {together} in a batch, {alone} alone"


def shared_faults(seed: int, counts: Counter[str]) -> Iterator[str]:
    """The same of LPs over one matrix."""
    data, kind, _ = drawn(seed, shared=True)
    assert data.A is not None
    assert data.E is not None
    given = data._replace(A=data.A[0], E=data.E[0])
    yield from _linear_faults(seed, counts, data, given, kind, (DualSimplex(),))


def _linear_faults(
    seed: int, counts: Counter[str], data: Data, given: Data, kind: str, solvers: tuple[object, ...]
) -> Iterator[str]:
    exact = [exact_optimum(_known(data.one(i))) for i in range(BATCH)]
    for solver, rounding in itertools.product(solvers, _ROUNDINGS):
        found = LinearProgram(solver, rounding=rounding)(*given)
        for i, value in enumerate(exact):
            fault = _fault(data.one(i), found, i, value, rounding, close=kind != "badly scaled")
            counts[_name("LP", value, found.status[i])] += 1
            if fault is not None:
                yield f"LP seed {seed}, problem {i}, {solver}, {rounding}: {fault}; {value}"


def _known(one: Data) -> Data:
    """A side of 1e20 is no limit."""
    assert one.b is not None
    return one._replace(b=torch.where(one.b >= 1e20, torch.inf, one.b))


def _name(what: str, value: float | Fraction | None, status: Tensor) -> str:
    kind = (
        "unknown"
        if value is None
        else "no point"
        if value == math.inf
        else "no end"
        if value == -math.inf
        else "has one"
    )
    return f"{what}, optimum {kind}: {Status(int(status)).name}"


def _fault(one: Data, found: Any, i: int, value: float | Fraction, rounding: str, *, close: bool) -> str | None:
    status, lower, gap = Status(int(found.status[i])), float(found.lower[i]), float(found.gap[i])
    if status == Status.INFEASIBLE and value != math.inf:
        return "INFEASIBLE"
    if status == Status.UNBOUNDED and value != -math.inf and not (value == math.inf and _nearly_feasible(one)):
        return "UNBOUNDED"
    if value == math.inf or lower == -math.inf:
        return None  # what rounding makes infeasible may have a point within tol
    if value == -math.inf:
        if rounding == "nearest" and _vanishes(one, found, i):
            return None
        return f"a bound, {lower}, of what has none"
    allowed = Fraction(NEAREST) * max(1, abs(value)) + Fraction(_size(one, found, i)) / 10**14
    if Fraction(lower) > value + (0 if rounding == "outward" else allowed):
        return f"lower {lower} above the optimum"
    missed = value - Fraction(lower) - (Fraction(gap) if math.isfinite(gap) else 0)
    if status == Status.OPTIMAL and close and missed > Fraction(1e-5) * max(1, abs(value)):
        return f"gap {gap}, but {float(missed)} more"
    return None


def _size(one: Data, found: Any, i: int) -> float:
    """Of the terms of a bound that may cancel."""
    sides = torch.cat([torch.where(one.b.isinf(), 0.0, one.b), one.d])
    return float((torch.cat([found.inequality[i], found.equality[i]]) * sides).abs().sum())


def _nearly_feasible(one: Data) -> bool:
    """Whether moving every side by 1e-5 gives a program points."""
    return exact_optimum(_moved(one._replace(c=torch.zeros_like(one.c)), 1e-5)) != math.inf


def _moved(one: Data, room: float) -> Data:
    """All sides moved by `room` of max(1, their size)."""
    assert one.A is not None
    assert one.E is not None
    b, d = ((side, room * side.abs().clamp(min=1)) for side in (one.b, one.d))
    A = torch.cat([one.A, one.E, -one.E])
    return _known(one._replace(A=A, b=torch.cat([sum(b), sum(d), d[1] - d[0]]), E=one.E[:0], d=one.d[:0]))


def _vanishes(one: Data, found: Any, i: int) -> bool:
    """Whether the reduced costs that are wrong at infinite ends are within what rounding makes of 0."""
    y, v = ([Fraction(x) for x in part[i].tolist()] for part in (found.inequality, found.equality))
    rows = [*zip(y, one.A.tolist(), strict=True), *zip(v, one.E.tolist(), strict=True)]
    for j, c in enumerate(one.c.tolist()):
        terms = [Fraction(c), *(price * Fraction(row[j]) for price, row in rows)]
        reduced, size = sum(terms), sum(abs(term) for term in terms)
        wrong = (reduced > 0 and one.lower[j] == -math.inf) or (reduced < 0 and one.upper[j] == math.inf)
        if wrong and abs(reduced) > Fraction(1e-14) * size + Fraction(1e-300):
            return False
    return True


def quadratic_faults(seed: int, counts: Counter[str]) -> Iterator[str]:
    """The same of `QuadraticProgram`, whose optimum is held to points found, checked in rationals."""
    data, _, draw = drawn(seed)
    n, rank = data.c.shape[-1], draw.randint(0, data.c.shape[-1])
    root = torch.tensor([draw.randint(-2, 2) for _ in range(BATCH * rank * n)], dtype=torch.float64)
    root = root.reshape(BATCH, rank, n)
    P = root.mT @ root
    for rounding in _ROUNDINGS:
        found = QuadraticProgram(rounding=rounding)(P, *data)
        for i in range(BATCH):
            one, lower = _known(data.one(i)), float(found.lower[i])
            empty = exact_optimum(one._replace(c=torch.zeros_like(one.c))) == math.inf
            counts[_name("QP", math.inf if empty else None, found.status[i])] += 1
            status = found.status[i].item()
            if (status == Status.INFEASIBLE and not empty) or (
                status == Status.UNBOUNDED and empty and not _nearly_feasible(one)
            ):
                yield f"QP seed {seed}, problem {i}, {rounding}: {Status(status).name}"
            best = min((_quadratic(one, P[i], x) for x in _points(one, found.primal[i].detach())), default=None)
            room = Fraction(0)
            if rounding == "nearest" and best is not None:
                terms = _size(one, found, i) + _quadratic_size(one, P[i], found.primal[i].detach())
                room = Fraction(NEAREST) * max(1, abs(best)) + Fraction(terms) / 10**15
            if best is not None and lower > -math.inf and Fraction(lower) > best + room:
                yield f"QP seed {seed}, problem {i}, {rounding}: lower {lower} above {float(best)}"


def _quadratic_size(one: Data, P: Tensor, x: Tensor) -> float:
    """Of the terms of the objective that may cancel."""
    return float((one.c * x).abs().sum() + x.abs() @ P.abs() @ x.abs())


def _points(one: Data, x: Tensor) -> Iterator[list[Fraction]]:
    """Rationals near a point that meet every constraint exactly."""
    exact = [Fraction(t) for t in x.tolist()]
    for near in (exact, *([t.limit_denominator(size) for t in exact] for size in (1, 64, 1000))):
        ends = zip(one.lower.tolist(), near, one.upper.tolist(), strict=True)
        if all(low <= t <= high for low, t, high in ends) and _meets(one, near):
            yield near


def _meets(one: Data, x: list[Fraction]) -> bool:
    def reached(row: list[float]) -> Fraction:
        return sum((Fraction(a) * t for a, t in zip(row, x, strict=True)), Fraction(0))

    below = all(reached(row) <= side for row, side in zip(one.A.tolist(), one.b.tolist(), strict=True))
    return below and all(reached(row) == side for row, side in zip(one.E.tolist(), one.d.tolist(), strict=True))


def _quadratic(one: Data, P: Tensor, x: list[Fraction]) -> Fraction:
    linear = sum((Fraction(c) * t for c, t in zip(one.c.tolist(), x, strict=True)), Fraction(0))
    return (
        linear
        + sum(
            (
                s * Fraction(entry) * t
                for s, row in zip(x, P.tolist(), strict=True)
                for entry, t in zip(row, x, strict=True)
            ),
            Fraction(0),
        )
        / 2
    )


def integer_faults(seed: int, counts: Counter[str]) -> Iterator[str]:
    """The same of `MixedIntegerProgram`, whose optimum is found by trying all integers."""
    data, _, draw = drawn(seed, integers=True)
    mask = torch.tensor([True, *(draw.random() < 0.8 for _ in range(data.c.shape[-1] - 1))])
    exact = [_best_integers(_known(data.one(i)), mask) for i in range(BATCH)]
    for rounding in _ROUNDINGS:
        found = MixedIntegerProgram(integer=mask, rounding=rounding)(*data)
        for i, value in enumerate(exact):
            status, lower, got = Status(int(found.status[i])), float(found.lower[i]), float(found.value[i])
            counts[_name("MILP", value, found.status[i])] += 1
            where = f"MILP seed {seed}, problem {i}, {rounding}: "
            if status == Status.UNBOUNDED or (status == Status.INFEASIBLE and value != math.inf):
                yield where + status.name
            if value == math.inf:
                continue
            room = 0 if rounding == "outward" else Fraction(NEAREST) * max(1, abs(value))
            if lower > -math.inf and Fraction(lower) > value + room:
                yield where + f"lower {lower} above {float(value)}"
            close = 1e-6 * max(1, abs(float(value)))
            if status == Status.OPTIMAL and abs(got - float(value)) > close:
                # a point may violate what rounding alone forbids
                least = _best_integers(_moved(data.one(i), 1e-6), mask)
                if not float(least) - close <= got <= float(value):
                    yield where + f"value {got}, not {float(value)}"


def _best_integers(one: Data, mask: Tensor) -> float | Fraction:
    places = mask.nonzero().squeeze(-1).tolist()
    ranges = [range(math.ceil(one.lower[j]), math.floor(one.upper[j]) + 1) for j in places]
    best: float | Fraction = math.inf
    for held in itertools.product(*ranges):
        lower, upper = one.lower.clone(), one.upper.clone()
        lower[places] = upper[places] = torch.tensor(held, dtype=torch.float64)
        best = min(best, exact_optimum(one._replace(lower=lower, upper=upper)))
    return best


Faults = Callable[[int, Counter[str]], Iterator[str]]
KINDS: tuple[Faults, ...] = (linear_faults, quadratic_faults, integer_faults, shared_faults)


def main() -> None:
    """Try `--count` programs from `--seed` on; print every fault, the progress, and what was said."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    start, faults = time.perf_counter(), 0
    for done, seed in enumerate(range(options.seed, options.seed + options.count // BATCH), 1):
        for fault in KINDS[seed % len(KINDS)](seed, counts):
            faults += 1
            print(fault, flush=True)  # noqa: T201
        if done % 300 == 0 or done == options.count // BATCH:
            print(f"{done * BATCH} programs: {faults} faults; {time.perf_counter() - start:.0f} s", flush=True)  # noqa: T201
    for name, number in sorted(counts.items()):
        print(f"{number:7d}  {name}")  # noqa: T201


if __name__ == "__main__":
    main()
