"""Plans: which rows a table needs within a budget, and how many images, lines and seeds stand behind each figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optrelax.checks import require_range
from optrelax.errors import suggest
from optrelax.papers.budgets import BUDGETS
from optrelax.papers.network_rows import (
    LPS,
    METHODS,
    REFERENCES,
    base_method,
    certified_row,
    fixed_row,
    images_said,
    measured_rows,
    network_notes,
    own_relaxation,
    trained_run,
)
from optrelax.papers.questions import Degrees
from optrelax.papers.row_files import Row
from optrelax.papers.scales import ExperimentScale, NetworkTraining

__all__ = ["FIVE", "MODIFIED", "TABLES", "Line", "TablePlan", "plan"]

FIVE = ("box", "hbox", "crown-ibp", "deepz", "crown")
"""The paper's relaxations; `crown-ibp` is its CROWN-IBP (R)."""
MODIFIED = (
    *("hbox", "hbox-diag", "hbox-diag-c", "hbox-switch"),
    *("deepz", "deepz-box", "deepz-diag", "deepz-diag-c", "deepz-switch", "deepz-soft"),
    *("crown", "crown-0", "crown-1", "crown-0-c", "crown-1-c"),
    *("crown-0-tria", "crown-1-tria", "crown-0-tria-c", "crown-1-tria-c", "crown-soft"),
    *("crown-ibp", "crown-ibp-soft"),
)
"""The modified relaxations, each behind the one it modifies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a table.

    certified: a row a seed, of networks trained so.  own: the relaxation that these are certified by.
    tight, jumps, steps: on the fixed network, the same for every line.  degrees: on a network of random weights.
    """

    label: str
    relaxation: str
    group: str = ""
    own: str | None = None
    omega: float | None = None
    grid: float | None = None
    certified: tuple[Row, ...] = ()
    tight: Row | None = None
    jumps: Row | None = None
    steps: Row | None = None
    degrees: Row | None = None

    def rows(self) -> list[Row]:
        """Every row of the line."""
        measured = (self.tight, self.jumps, self.steps, self.degrees)
        return [*self.certified, *(row for row in measured if row is not None)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """A table within a budget: its lines, and what must be said about them."""

    table: str
    budget: str
    seed: int
    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    fixed: Row | None = None
    """Accuracies of the fixed network, where the table has one."""
    published: bool = False
    """Whether published figures stand beside ours."""

    def rows(self) -> list[Row]:
        """Every row of every line."""
        rows = [row for line in self.lines for row in line.rows()]
        return rows if self.fixed is None else [self.fixed, *rows]


def _trained(
    how: NetworkTraining, method: str, seeds: Sequence[int], own: str, relaxation: str | None = None
) -> tuple[Row, ...]:
    """What is certified by `own` of networks trained by a method, or by a relaxation with the method's settings."""
    return tuple(certified_row(trained_run(how, method, seed, relaxation), how, own) for seed in seeds)


def _measured(scale: ExperimentScale, how: NetworkTraining, seed: int, name: str, **more: Any) -> Line:
    """A relaxation's line with its three properties on the fixed network."""
    return Line(label=name, relaxation=name, **measured_rows(scale, how, seed, name)._asdict(), **more)


def _table1(scale: ExperimentScale, seed: int) -> TablePlan:
    """The five relaxations: their properties on one network, and what training with each gives."""
    how, natural = scale.anchor, scale.natural_anchor
    lines = []
    for name in FIVE:
        method = "crown-ibp-r" if name == "crown-ibp" else name
        certified = _trained(how, method, range(seed, seed + scale.seeds), name)
        lines.append(_measured(scale, natural, seed, name, own=name, certified=certified))
    lp = measured_rows(scale, natural, seed, LPS[1])
    lines.append(Line(label=LPS[1], relaxation=LPS[1], tight=lp.tight))
    notes = (
        *network_notes(scale, natural),
        f"Trained networks: {how.said}; certified accuracy on {images_said(how)}.",
        f"`{LPS[1]}`, the triangle LP on CROWN's bounds, is measured for tightness alone, on "
        f"{scale.measuring(natural).lp_images} images: where that is fewer, its area compares with no other row.",
    )
    title = "Five relaxations and training with them"
    return _plan("table1", scale, seed, title, lines, notes, natural, published=True)


def _table2(scale: ExperimentScale, seed: int) -> TablePlan:
    """Certified accuracy of training by each method, for data sets and networks."""
    lines = []
    for how in scale.networks:
        for method in METHODS:
            own = own_relaxation(method)
            certified = _trained(how, method, range(seed, seed + scale.seeds), own)
            lines.append(Line(label=method, relaxation=own, own=own, group=how.label, certified=certified))
    notes = [f"{how.label}: {how.said}; certified on {images_said(how)}." for how in scale.networks]
    return _plan("table2", scale, seed, "Training by six methods", lines, notes, published=True)


def _table3(scale: ExperimentScale, seed: int) -> TablePlan:
    """Every modified relaxation: trained with, and measured."""
    how, natural = scale.modified, scale.natural_small
    lines = []
    for name in ("box", *MODIFIED):
        method = "crown-ibp-r" if name == "crown-ibp" else base_method(name)
        modified = None if name in FIVE else name
        certified = _trained(how, method, range(seed, seed + scale.seeds), name, modified)
        lines.append(_measured(scale, natural, seed, name, own=name, certified=certified))
    notes = (
        f"Trained networks: {how.said}, every relaxation with the settings of the one it modifies; certified accuracy "
        f"on {images_said(how)}.",
        *network_notes(scale, natural),
    )
    return _plan("table3", scale, seed, "Modified relaxations", lines, notes, natural)


def _table4(scale: ExperimentScale, seed: int) -> TablePlan:
    """Loosened Box: widened by omega, continuous or in F jumps a unit."""
    how, seeds = scale.loosened, range(seed, seed + scale.loose_seeds)
    lines = [Line(label="box", relaxation="box", group="box", own="box", certified=_trained(how, "box", seeds, "box"))]
    for omega in scale.omegas:
        for grid in (None, *scale.grids):
            name = f"box-widen:omega={omega:g}" if grid is None else f"box-round:omega={omega:g},F={grid:g}"
            kind = "C" if grid is None else "DC"
            rows = _trained(how, "box", seeds, name, name)
            lines.append(
                Line(label=name, relaxation=name, group=kind, own=name, omega=omega, grid=grid, certified=rows)
            )
    notes = (
        f"Trained networks: {how.said}, all with Box's settings; {scale.loose_seeds} seeds.",
        f"Certified by Box itself, not loosened, and by any of {', '.join(REFERENCES)} and the loosened Box, on "
        f"{images_said(how)}: the control is in training, so all are judged alike.",
        "C widens every pre-activation interval by omega at both ends: looser, and continuous. DC widens each end by "
        "between 0 and omega, and jumps by omega F times a unit of that end: as loose at most, and discontinuous.",
    )
    return _plan("table4", scale, seed, "Loosened Box: looseness apart from jumps", lines, notes)


def _properties(scale: ExperimentScale, seed: int) -> TablePlan:
    """Every relaxation's three properties on one network."""
    how = scale.natural_small
    lines = []
    for name in ("box", "box-widen:omega=0.01", "box-round:omega=0.01,F=10", *MODIFIED, *LPS):
        degrees = Row("digits", None, Degrees(relaxation=name, eps=0.1, hidden=scale.degrees_hidden))
        line = _measured(scale, how, seed, name, degrees=degrees)
        # One LP a neuron at every step.
        lines.append(replace(line, steps=None) if name == "layerwise" else line)
    m = scale.small
    sizes = "-".join(map(str, (64, *scale.degrees_hidden, 10)))
    notes = (
        *network_notes(scale, how),
        f"LPs: {m.lp_images} images for tightness; one line of {100 * m.lp_length:g} % and one example for jumps; "
        "their gradients carry the solver's tolerance, which shows in the smallest steps.",
        f"Degrees: of numerator and denominator of a margin's bound in the step, on a network {sizes} of random "
        "weights, first test image of the digits, eps 0.1, the greatest over its margins; they hold for that network's "
        "crossing neurons, and say how bounds differ in kind, not how large the effect is.",
    )
    return _plan("properties", scale, seed, "Three properties of every relaxation", lines, notes, how)


def _plan(
    table: str,
    scale: ExperimentScale,
    seed: int,
    title: str,
    lines: Sequence[Line],
    notes: Sequence[str],
    fixed: NetworkTraining | None = None,
    published: bool = False,
) -> TablePlan:
    """fixed: how the network that is measured was trained."""
    return TablePlan(
        table=table,
        budget=scale.name,
        seed=seed,
        title=title,
        lines=tuple(lines),
        notes=(*scale.warning, *notes),
        fixed=None if fixed is None else fixed_row(scale, fixed, seed),
        published=published,
    )


_MAKERS: dict[str, Callable[[ExperimentScale, int], TablePlan]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "properties": _properties,
}
TABLES = tuple(_MAKERS)
"""What `plan` knows."""


def plan(table: str, budget: str, seed: int = 0) -> TablePlan:
    """The plan of a table within a budget.  ValueError for a name that is neither, or a negative seed."""
    if table not in _MAKERS:
        raise ValueError(f"paper: no table {table!r}; {suggest(table, TABLES)}")
    if budget not in BUDGETS:
        raise ValueError(f"paper: no budget {budget!r}; {suggest(budget, BUDGETS)}")
    require_range("paper", ">= 0", seed=seed)
    return _MAKERS[table](BUDGETS[budget], seed)
