"""Tables of jumps: by relaxation, each jump, and the loss along each line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from optrelax.measurements.jumps import Jump, Sample
from optrelax.measurements.line_searches import SearchedLine
from optrelax.measurements.questions import MarginProblem
from optrelax.relaxations import Relaxation
from optrelax.relaxations.jumps import EVERYWHERE, Jumps

if TYPE_CHECKING:
    import polars as pl

__all__ = ["jump_table", "relaxation_table", "sample_table"]


def _counted(line: SearchedLine, what: str) -> list[Jump]:
    """Jumps of the bound, or of the loss, that exceed their threshold."""
    chosen = slice(None, -1) if what == "bound" else slice(-1, None)
    kept = []
    for jump in line.found.jumps:
        size = torch.maximum(jump.left.values.abs(), jump.right.values.abs()).clamp_min(1)
        threshold = line.least * size + jump.left.noise + jump.right.noise
        if bool((jump.size.abs() > threshold)[chosen].any()):
            kept.append(jump)
    return kept


def relaxation_table(question: MarginProblem, rows: Sequence[SearchedLine]) -> pl.DataFrame:
    """One row a relaxation, over all its lines."""
    import polars as pl

    return pl.DataFrame(
        [
            _summed(name, relaxation, [r for r in rows if r.name == name])
            for name, relaxation in question.relaxations.items()
        ]
    )


def _summed(name: str, relaxation: Relaxation, lines: Sequence[SearchedLine]) -> dict[str, object]:
    length = sum(line.unit * (line.found.samples[-1].t - line.found.samples[0].t) for line in lines)
    bound = [(line, jump) for line in lines for jump in _counted(line, "bound")]
    sizes = [float(jump.size[:-1].abs().max()) for _, jump in bound]
    loss = [float(jump.size[-1].abs()) for line in lines for jump in _counted(line, "loss")]
    travel = sum(_variation(line) for line in lines)
    causes = sorted({line.cause(jump) for line, jump in bound})
    listed = relaxation.jumps
    return {
        "relaxation": name,
        "lines": len(lines),
        "length": length,
        "bound jumps": len(bound),
        "loss jumps": len(loss),
        "bound / unit": len(bound) / length,
        "loss / unit": len(loss) / length,
        "largest bound": max(sizes, default=0.0),
        "largest loss": max(loss, default=0.0),
        "mean bound": sum(sizes) / len(sizes) if sizes else 0.0,
        "mean loss": sum(loss) / len(loss) if loss else 0.0,
        "travel": sum(loss) / travel if travel > 0 else 0.0,
        "causes": "; ".join(causes),
        "listed": None if listed is None else ("; ".join(sorted(listed)) or "none"),
        "verdict": _verdict([line.cause(jump) for line, jump in bound], listed),
        "evaluations": sum(line.found.evaluations for line in lines),
        "complete": all(line.found.complete for line in lines),
    }


def _variation(line: SearchedLine) -> float:
    """Total variation of the loss over samples and jump limits."""
    values = [s.values[-1] for s in _all_samples(line)]
    return float(sum((b - a).abs() for a, b in itertools.pairwise(values)))


def _verdict(causes: Sequence[str], listed: Jumps) -> str:
    """Whether what was found fits the paper's list."""
    if listed is None:
        return "jumps" if causes else "none met"
    if not causes:
        return "none met, though listed" if listed else "none, as listed"
    if EVERYWHERE in listed:
        return "jumps, as listed"
    parts = [cause.split(", ") for cause in causes]
    if all(part in listed for each in parts for part in each):
        return "jumps, as listed"
    # Events of later layers may coincide with the switch that moved their bounds.
    fits = all(any(part in listed for part in each) for each in parts)
    return "jumps, a listed cause among each one's" if fits else "CONTRADICTS the list"


def _all_samples(line: SearchedLine) -> list[Sample]:
    samples = [*line.found.samples, *(side for jump in line.found.jumps for side in (jump.left, jump.right))]
    return sorted(samples, key=lambda sample: sample.t)


def jump_table(rows: Sequence[SearchedLine]) -> pl.DataFrame:
    """One row a jump."""
    import polars as pl

    schema = {
        "relaxation": pl.String,
        "line": pl.Int64,
        "at": pl.Float64,
        "bound": pl.Float64,
        "loss": pl.Float64,
        "cause": pl.String,
    }
    found = [
        (line.name, line.line, line.unit * jump.at, line.bound_jump(jump), float(jump.size[-1]), line.cause(jump))
        for line in rows
        for jump in line.found.jumps
    ]
    return pl.DataFrame(found, schema=schema, orient="row")


def sample_table(rows: Sequence[SearchedLine]) -> pl.DataFrame:
    """The loss and the bound at every point that was looked at, jumps' limits among them."""
    import polars as pl

    schema = {"relaxation": pl.String, "line": pl.Int64, "at": pl.Float64, "loss": pl.Float64, "bound": pl.Float64}

    def each() -> Iterator[tuple[object, ...]]:
        for line in rows:
            for sample in _all_samples(line):
                yield line.name, line.line, line.unit * sample.t, float(sample.values[-1]), line.bound(sample)

    return pl.DataFrame(list(each()), schema=schema, orient="row")
