"""Lines of smooth activations against interval arithmetic of 200 bits: `python -m tests.exact_lines --pairs 1000000`.

Every function is asked about pairs (l, u) of all sizes from 1e-300 to 1e300 in either type, of no width, a unit wide,
with an inflection or an extremum at an end or next to it. Outward lines and images are compared with the function at
both ends, at two points within, at its breaks, and where the library itself says that the line is nearest; there is no
tolerance. A line that is certainly beaten is printed with its pair, and makes the exit status 1; what no precision
decides is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if __package__:  # python -m tests.exact_lines: the oracle lies beside this file
    sys.path.insert(0, str(Path(__file__).parent))

from exact_functions import EXACT, FUNCTIONS, SLOPES, ClaimedLine, Findings, beaten, within_domain

from optrelax.networks.activations import Smooth

ROUND = 50_000
"""Pairs of one type that are asked about at once."""


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


def violations(f: Smooth, l: Tensor, u: Tensor, generator: torch.Generator) -> Findings:
    """Every outward line and image of these intervals that the function beats."""

    def share() -> Tensor:
        return torch.rand(l.shape, generator=generator, dtype=l.dtype)

    below, above = f.hull(l, u).below, f.hull(l, u).above
    parallel = f.parallel_slope(l, u)
    slopes = [(-1.0, s) for s, _ in below] + [(1.0, s) for s, _ in above] + [(-1.0, parallel), (1.0, parallel)]
    if f.slides:
        slopes += [(sign, f.supporting(l, u, share(), sign)[0][0]) for sign in (-1.0, 1.0)]
    low, high = f.outward_image(l, u)
    flat = torch.zeros_like(l)
    said = [(-1.0, flat, low), (1.0, flat, high)]
    for sign, slope in slopes:
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        said.append((sign, slope, f.beyond(slope, l, u, sign)))
    lines = [ClaimedLine(*line, f.extreme(line[1], l, u, line[0])[0]) for line in said]
    within = [torch.lerp(l, u, share()) for _ in range(2)]
    points = [l, u, *(torch.where(x.isfinite(), x, l).clamp(l, u) for x in within)]
    return beaten(f, l, u, lines, torch.stack(points + [torch.full_like(l, x).clamp(l, u) for x in f.breaks]))


@dataclass
class Count:
    """What one function was asked, and what came of it."""

    pairs: int = 0
    beaten: int = 0
    undecided: int = 0

    def __str__(self) -> str:
        return f"{self.pairs:,} pairs, {self.beaten} lines beaten, {self.undecided} points undecided"


def check(pairs: int, report: Callable[[str], None], only: Sequence[str] = (), seed: int = 0) -> dict[str, Count]:
    """Ask every function, or those named, about so many pairs; each has its own pairs, whichever are asked with it."""
    counts = {}
    for f in (*FUNCTIONS, *SLOPES):
        name = f"{f.name}{f.parameters}" if f.parameters else f.name
        if f.name not in EXACT or (only and name not in only and f.name not in only):
            continue
        generator = torch.Generator().manual_seed(seed)
        counts[name] = count = Count()
        while count.pairs < pairs:
            for dtype in (torch.float64, torch.float32):
                l, u = drawn_pairs(f, min(ROUND, pairs), dtype, generator)
                found = violations(f, l, u, generator)
                for line in found.beaten[: max(0, 5 - count.beaten)]:
                    report(f"{name} {dtype}: {line}")
                count.pairs += len(l)
                count.beaten += len(found.beaten)
                count.undecided += found.undecided
        report(f"{name}: {count}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.exact_lines", description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs a function (10,000)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="the functions of these names")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs (0)")
    given = parser.parse_args()

    def report(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    counts = check(given.pairs, report, given.only, given.seed)
    return 1 if not counts or any(count.beaten for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
