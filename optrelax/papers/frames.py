"""The tables of a report, as data frames: what the rows of a plan answered, a line each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optrelax.papers.plans import Line, TablePlan
from optrelax.papers.published import ANCHOR
from optrelax.papers.row_files import Outcome, Row

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "TableOutcomes",
    "loosened_frame",
    "properties_frame",
    "summary_frame",
    "tightness_frame",
    "together_frame",
    "trained_frame",
]

_STEP = 1e-2
"""The step of the weights whose sensitivity stands in the tables."""


@dataclass(frozen=True, slots=True)
class TableOutcomes:
    """A plan and what became of its rows."""

    plan: TablePlan
    outcomes: Mapping[str, Outcome]

    def answer(self, row: Row | None) -> Mapping[str, Any] | None:
        """The row's answer; None where it failed or the line has none."""
        return None if row is None else self.outcomes[row.name].answer

    def failed(self) -> dict[str, str]:
        """Errors by row, training runs included."""
        rows = dict.fromkeys(r.name for row in self.plan.rows() for r in (row.training, row) if r is not None)
        return {name: error for name in rows if (error := self.outcomes[name].error) is not None}

    def seconds(self) -> float:
        """Of all rows together, networks included."""
        rows = dict.fromkeys(r.name for row in self.plan.rows() for r in (row.training, row) if r is not None)
        return sum(self.outcomes[name].seconds for name in rows)


def _certified(found: TableOutcomes, line: Line) -> dict[str, Any]:
    """Accuracies in percent over the line's seeds: means, and the range of what matters most."""
    answers = [a for row in line.certified if (a := found.answer(row)) is not None]
    if not answers:
        return {}
    own = [100 * a["certified_by"][line.own] for a in answers]
    every = [100 * a["certified"] for a in answers]
    return {
        "seeds": len(answers),
        "accuracy %": statistics.fmean(100 * a["accuracy"] for a in answers),
        "certified %": statistics.fmean(own),
        "certified % by box": statistics.fmean(100 * a["certified_by"]["box"] for a in answers),
        "certified % by any": statistics.fmean(every),
        "lowest": min(every) if len(answers) > 1 else None,
        "highest": max(every) if len(answers) > 1 else None,
        "under attack %": statistics.fmean(100 * (1 - a["attacked"]) for a in answers),
        "training s": statistics.fmean(
            found.outcomes[row.training.name].seconds for row in line.certified if row.training is not None
        ),
    }


def _tight(found: TableOutcomes, line: Line) -> dict[str, object]:
    answer = found.answer(line.tight)
    if answer is None:
        return {}
    row = answer["table"][0]
    return {
        "area": row["area"],
        "low": row["low"],
        "high": row["high"],
        "images": answer["examples"],
        "gap": row["gap"],
        "propagation %": row["propagation %"],
    }


def _jumps(found: TableOutcomes, line: Line) -> dict[str, object]:
    answer = found.answer(line.jumps)
    if answer is None:
        return {}
    row = answer["table"][0]
    return {
        "jumps": row["bound jumps"],
        "a unit": row["bound / unit"],
        "largest, loss": row["largest loss"],
        "share of travel %": None if row["travel"] is None else 100 * row["travel"],
        "causes": row["causes"] or "none met",
        "listed": row["listed"],
        "verdict": row["verdict"] + ("" if row["complete"] else " (search cut short)"),
    }


def _steps(found: TableOutcomes, line: Line) -> dict[str, object]:
    answer = found.answer(line.steps)
    if answer is None:
        return {}
    rows = {(row["kind"], row["step"]): row for row in answer["table"]}
    smallest = min(step for _, step in rows)
    up, small, large = rows["adversarial", _STEP], rows["gradient step", smallest], rows["gradient step", _STEP]
    return {
        "loss": up["loss"],
        "loss change %": None if up["relative change"] is None else 100 * up["relative change"],
        "gradient change %": None if up["gradient change"] is None else 100 * up["gradient change"],
        "bound change": up["bound change"],
        "predicted, smallest step": small["predicted"],
        "predicted, 1 %": large["predicted"],
    }


def _degrees(found: TableOutcomes, line: Line) -> dict[str, object]:
    answer = found.answer(line.degrees)
    if answer is None:
        return {}
    pair = answer["degrees"]
    return {"degrees": "not rational, or no rule" if pair is None else f"{pair[0]} / {pair[1]}"}


def _met(jumps: Mapping[str, object]) -> str:
    return f"{jumps['jumps']} ({jumps['causes']})" if jumps["jumps"] else "none"


def _frame(lines: Sequence[Mapping[str, object]], columns: Mapping[str, type]) -> pl.DataFrame:
    import polars as pl

    kinds = {float: pl.Float64, int: pl.Int64, str: pl.String}
    schema = {name: kinds[kind] for name, kind in columns.items()}
    return pl.DataFrame([[line.get(name) for name in columns] for line in lines], schema=schema, orient="row")


def summary_frame(found: TableOutcomes) -> pl.DataFrame:
    """The published table of relaxations with our figures beside: published columns end in `(paper)`."""
    lines = []
    for line in found.plan.lines:
        if line.relaxation not in ANCHOR:
            continue
        said = ANCHOR[line.relaxation]
        jumps = _jumps(found, line)
        lines.append(
            {
                "relaxation": line.label,
                "tightness": _tight(found, line).get("area"),
                "tightness (paper)": said.tightness,
                "jumps met": None if not jumps else _met(jumps),
                "continuous (paper)": "yes" if said.continuous else "no",
                "loss change %": _steps(found, line).get("loss change %"),
                "low sensitivity (paper)": "yes" if said.insensitive else "no",
                "certified %": _certified(found, line).get("certified %"),
                "certified % (paper)": said.certified,
            }
        )
    words = ("relaxation", "jumps met", "continuous (paper)", "low sensitivity (paper)")
    names = (
        *("relaxation", "tightness", "tightness (paper)", "jumps met", "continuous (paper)"),
        *("loss change %", "low sensitivity (paper)", "certified %", "certified % (paper)"),
    )
    return _frame(lines, {name: str if name in words else float for name in names})


def trained_frame(found: TableOutcomes) -> pl.DataFrame:
    """What training gave, a line a way of training."""
    published = found.plan.published
    lines = []
    for line in found.plan.lines:
        if not line.certified:
            continue
        cells = {"network": line.group, "trained by": line.label, "own bound": line.own, **_certified(found, line)}
        # The anchor is about MNIST and CONV only; crown-ibp, which ends at Box, is not among its rows.
        relaxation = "crown-ibp" if line.label == "crown-ibp-r" else line.label
        about = found.plan.table == "table1" or (line.group == "mnist, CONV" and line.label != "crown-ibp")
        if published and about and relaxation in ANCHOR and _is_conv(line):
            cells["certified % (paper)"] = ANCHOR[relaxation].certified
        lines.append(cells)
    columns: dict[str, type] = {"network": str} if any(line["network"] for line in lines) else {}
    columns |= {"trained by": str, "own bound": str, "accuracy %": float, "certified %": float}
    columns |= {"certified % (paper)": float} if published else {}
    columns |= {"certified % by box": float, "certified % by any": float, "lowest": float, "highest": float}
    columns |= {"under attack %": float, "seeds": int, "training s": float}
    return _frame(lines, columns)


def _is_conv(line: Line) -> bool:
    run = line.certified[0].run
    return run is not None and run.row.data == "mnist" and run.row.model == "conv" and run.row.eps == 0.3


def tightness_frame(found: TableOutcomes) -> pl.DataFrame:
    """Tightness of each relaxation on the fixed network."""
    lines = [{"relaxation": line.label, **_tight(found, line)} for line in found.plan.lines if line.tight is not None]
    columns: dict[str, type] = {"relaxation": str, "area": float, "low": float, "high": float}
    return _frame(lines, columns | {"images": int, "gap": float, "propagation %": float})


def properties_frame(found: TableOutcomes) -> pl.DataFrame:
    """Continuity and sensitivity of each relaxation on the fixed network, and what training with it gave."""
    lines = []
    for line in found.plan.lines:
        if line.jumps is None:
            continue
        cells = _jumps(found, line) | _steps(found, line) | _degrees(found, line)
        lines.append({"relaxation": line.label, **cells})
    columns: dict[str, type] = {"relaxation": str, "jumps": int, "a unit": float, "largest, loss": float}
    columns |= {"share of travel %": float, "causes": str, "listed": str, "verdict": str}
    columns |= {"loss": float, "loss change %": float, "gradient change %": float, "bound change": float}
    columns |= {"predicted, smallest step": float, "predicted, 1 %": float}
    columns |= {"degrees": str} if any(line.degrees is not None for line in found.plan.lines) else {}
    return _frame(lines, columns)


def together_frame(found: TableOutcomes) -> pl.DataFrame:
    """What training gave beside the three properties, the essentials of each."""
    lines = []
    for line in found.plan.lines:
        cells = _certified(found, line) | _tight(found, line) | _jumps(found, line) | _steps(found, line)
        lines.append({"relaxation": line.label, **cells})
    columns: dict[str, type] = {"relaxation": str, "accuracy %": float, "certified %": float}
    columns |= {"certified % by any": float, "lowest": float, "highest": float, "area": float, "jumps": int}
    return _frame(lines, columns | {"listed": str, "verdict": str, "loss change %": float})


def loosened_frame(found: TableOutcomes) -> pl.DataFrame:
    """Loosened Box: kind, omega, F, and what training with it gave."""
    lines = []
    for line in found.plan.lines:
        cells = _certified(found, line)
        lines.append({"training": line.group, "omega": line.omega, "F": line.grid, **cells})
    columns: dict[str, type] = {"training": str, "omega": float, "F": float, "accuracy %": float}
    columns |= {"certified % by box": float, "certified % by any": float}
    columns |= {"lowest": float, "highest": float, "certified %": float}
    return _frame(lines, columns | {"under attack %": float, "seeds": int, "training s": float})
