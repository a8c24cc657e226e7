"""Lines of smooth activations against 200-bit arithmetic: `python -m tests.exact_lines --minutes 60`.

Every function is asked about pairs (l, u) of all sizes from 1e-300 to 1e300 in either type, of no width, a unit wide,
with an inflection or an extremum at an end or next to it. Outward lines and images are compared with the function at
both ends, at a point within, at its breaks, and where the library itself says that the line is nearest; there is no
tolerance. A line that is beaten is printed with its pair, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __package__:  # python -m tests.exact_lines: the oracle lies beside this file
    sys.path.insert(0, str(Path(__file__).parent))

from exact_functions import EXACT, FUNCTIONS, SLOPES, ClaimedLine, beaten, within_domain

from optrelax.networks.activations import Smooth

ROUND = 500
"""Pairs of one function in one type before the next one's turn."""


def drawn_pairs(f: Smooth, count: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many intervals within the domain: a third of ordinary ends, a third of any size, the rest at breaks."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def sized(low: float, high: float) -> Tensor:
        sign = torch.where(rand(2, count) < 0.5, -1.0, 1.0)
        return sign * 10 ** (low + (high - low) * rand(2, count))

    extreme = 300.0 if dtype == torch.float64 else 38.0
    ordinary, any_size, near = sized(-3, 1.5), sized(-extreme, extreme), sized(-17, 0.5)
    breaks = torch.tensor([*f.breaks, 0.0], dtype=torch.float64)
    at = breaks[(rand(2, count) * len(breaks)).long()]
    beside = at + near * (rand(2, count) < 0.6)
    kind = rand(count)
    ends = torch.where(kind < 0.33, ordinary, torch.where(kind < 0.66, any_size, beside)).to(dtype)
    first, second = ends
    narrow = rand(count)
    second = torch.where(narrow < 0.05, first, second)
    second = torch.where((narrow >= 0.05) & (narrow < 0.12), torch.nextafter(first, first + first.abs() + 1), second)
    return within_domain(f, torch.minimum(first, second), torch.maximum(first, second))


def violations(f: Smooth, l: Tensor, u: Tensor, generator: torch.Generator) -> list[str]:
    """Every outward line and image of these intervals that the function beats."""
    below, above = f.hull(l, u).below, f.hull(l, u).above
    parallel = f.parallel_slope(l, u)
    slopes = [(-1.0, s) for s, _ in below] + [(1.0, s) for s, _ in above] + [(-1.0, parallel), (1.0, parallel)]
    low, high = f.outward_image(l, u)
    flat = torch.zeros_like(l)
    said = [(-1.0, flat, low), (1.0, flat, high)]
    for sign, slope in slopes:
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        said.append((sign, slope, f.beyond(slope, l, u, sign)))
    lines = [ClaimedLine(*line, f.extreme(line[1], l, u, line[0])[0]) for line in said]
    within = torch.lerp(l, u, torch.rand(l.shape, generator=generator, dtype=l.dtype))
    within = torch.where(within.isfinite(), within, l).clamp(l, u)
    return beaten(f, l, u, lines, torch.stack([l, u, within, *(torch.full_like(l, x).clamp(l, u) for x in f.breaks)]))


def check(
    pairs: int, until: float, report: Callable[[str], None], only: str | None = None, seed: int = 0
) -> tuple[Counter[str], int]:
    """Ask in turns, until every function has had its pairs or the time is over: pairs asked, and lines beaten."""
    generator = torch.Generator().manual_seed(seed)
    asked: Counter[str] = Counter()
    wrong = 0
    chosen = [f for f in (*FUNCTIONS, *SLOPES) if f.name in EXACT and only in (None, f.name)]
    while chosen and time.monotonic() < until:
        for f in chosen:
            name = f"{f.name}{f.parameters}" if f.parameters else f.name
            for dtype in (torch.float64, torch.float32):
                l, u = drawn_pairs(f, ROUND, dtype, generator)
                found = violations(f, l, u, generator)
                wrong += len(found)
                for line in found[:3]:
                    report(f"{name} {dtype}: {line}")
                asked[name] += len(l)
            if time.monotonic() > until:
                break
        report(f"{sum(asked.values()):,} pairs of {len(asked)} functions, {wrong} lines beaten")
        chosen = [f for f in chosen if asked[f"{f.name}{f.parameters}" if f.parameters else f.name] < pairs]
    return asked, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.exact_lines", description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs a function (1,000,000)")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long at most (1)")
    parser.add_argument("--only", help="the one function of this name")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs (0)")
    given = parser.parse_args()

    def report(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    asked, wrong = check(given.pairs, time.monotonic() + 60 * given.minutes, report, given.only, given.seed)
    for name, count in sorted(asked.items()):
        report(f"{name}: {count:,} pairs")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
