"""Plans: which rows a table needs within a budget, and how many images, lines and seeds stand behind each figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from optrelax.errors import suggest
from optrelax.papers.budgets import BUDGETS, ExperimentScale, NetworkTraining
from optrelax.papers.questions import Certified, Degrees, Jumps, Tight, WeightSteps, safe
from optrelax.papers.rows import Row
from optrelax.training.recipes import Recipe, recipe
from optrelax.training.sweeps import SweepRun

__all__ = ["FIVE", "MODIFIED", "TABLES", "Line", "TablePlan", "plan"]

FIVE = ("box", "hbox", "crown-ibp", "deepz", "crown")
"""The paper's relaxations; `crown-ibp` is its CROWN-IBP (R)."""
METHODS = ("box", "hbox", "crown-ibp-r", "crown-ibp", "deepz", "crown")
"""Its ways of training; `crown-ibp` ends at Box."""
MODIFIED = (
    *("hbox", "hbox-diag", "hbox-diag-c", "hbox-switch"),
    *("deepz", "deepz-box", "deepz-diag", "deepz-diag-c", "deepz-switch", "deepz-soft"),
    *("crown", "crown-0", "crown-1", "crown-0-c", "crown-1-c"),
    *("crown-0-tria", "crown-1-tria", "crown-0-tria-c", "crown-1-tria-c", "crown-soft"),
    *("crown-ibp", "crown-ibp-soft"),
)
"""The modified relaxations, each behind the one it modifies."""
LPS = ("triangle", "triangle:preactivation=crown", "layerwise")
_REFERENCES = ("box", "crown-ibp", "crown")
_OWN = {"crown-ibp": "box", "crown-ibp-r": "crown-ibp"}
"""What a network is certified by where that is not what its way of training is called."""


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


# --- networks -----------------------------------------------------------------------------------------------------


def _run(row: Recipe, seed: int, name: str) -> SweepRun:
    return SweepRun(f"{name}-seed={seed}", row, seed)


def _base(method: str) -> str:
    """The way of training whose settings a relaxation is trained with: that of the one it modifies."""
    if method in METHODS:
        return method
    head = method.split(":")[0]
    for name in ("crown-ibp-soft", "hbox", "deepz", "crown", "box"):
        if head.startswith(name):
            return "crown-ibp-r" if name == "crown-ibp-soft" else name
    raise ValueError(f"no way of training for {method!r}")


def _trained(how: NetworkTraining, method: str, seed: int, relaxation: str | None = None) -> SweepRun:
    """A network trained by a method, or by a relaxation with the method's settings."""
    small = how.model == "fc-small"
    kind = "crown-ibp" if small and method == "crown-ibp-r" else method
    row = recipe(f"{how.data}-{how.model}-{kind}")
    changes: dict[str, Any] = dict(how.changes)
    if small and method == "crown-ibp":
        changes["beta"] = 0.0
    if relaxation is not None and relaxation != row.relaxation:
        changes["relaxation"] = relaxation
    label = method if relaxation is None else relaxation
    # Recipes tell apart what trained a network only by name: it must say so.
    row = replace(row.override(**changes), name=f"{how.data}-{how.model}-{safe(label)}")
    return _run(row, seed, f"{row.name}{how.suffix}")


def _natural(how: NetworkTraining, seed: int) -> SweepRun:
    """A network trained without any robust loss."""
    base = recipe(f"{how.data}-fc-small-natural").override(**how.changes)
    row = replace(base, name=f"{how.data}-{how.model}-natural", model=how.model, l1=0.0)
    return _run(row, seed, f"{row.name}{how.suffix}")


def _own(method: str) -> str:
    return _OWN.get(method, method)


def _certified(run: SweepRun, how: NetworkTraining, own: str) -> Row:
    several = tuple(dict.fromkeys((own, *_REFERENCES)))
    return Row(how.data, run, Certified(relaxations=several, eps=run.row.eps, images=how.images))


def _fixed(scale: ExperimentScale, how: NetworkTraining, seed: int) -> Row:
    m = scale.conv if how.model == "conv" else scale.small
    question = Certified(relaxations=_REFERENCES, eps=m.eps, images=how.images)
    return Row(how.data, _natural(how, seed), question)


class _Measured(NamedTuple):
    """The three measurements of a relaxation on the fixed network."""

    tight: Row
    jumps: Row
    steps: Row


def _measured(scale: ExperimentScale, how: NetworkTraining, seed: int, relaxation: str) -> _Measured:
    """Tightness, continuity and sensitivity of a relaxation on the naturally trained network."""
    run = _natural(how, seed)
    kind = relaxation.split(":")[0]
    m = scale.conv if how.model == "conv" else scale.small
    lp = kind in ("triangle", "layerwise")
    tight = Tight(
        relaxation=relaxation,
        images=m.lp_images if lp else m.images,
        points=m.points,
        resolution=m.resolution,
    )
    jumps = Jumps(
        relaxation=relaxation,
        eps=m.eps,
        lines=1 if lp else m.lines,
        examples=1 if lp else m.examples,
        length=m.lp_length if lp else m.length,
        cells=m.cells,
        seed=seed,
    )
    steps = WeightSteps(
        relaxation=relaxation, eps=m.eps, steps=m.steps, examples=m.step_examples, draws=m.draws, seed=seed
    )
    return _Measured(*(Row(how.data, run, question) for question in (tight, jumps, steps)))


# --- tables -------------------------------------------------------------------------------------------------------


def _table1(scale: ExperimentScale, seed: int) -> TablePlan:
    """The five relaxations: their properties on one network, and what training with each gives."""
    how, natural = scale.anchor, scale.natural_anchor
    lines = []
    for name in FIVE:
        method = "crown-ibp-r" if name == "crown-ibp" else name
        runs = [_trained(how, method, seed + i) for i in range(scale.seeds)]
        measured = _measured(scale, natural, seed, name)
        lines.append(
            Line(
                label=name,
                relaxation=name,
                own=name,
                certified=tuple(_certified(run, how, name) for run in runs),
                tight=measured.tight,
                jumps=measured.jumps,
                steps=measured.steps,
            )
        )
    m = scale.conv if natural.model == "conv" else scale.small
    lp = _measured(scale, natural, seed, LPS[1])
    lines.append(Line(label=LPS[1], relaxation=LPS[1], tight=lp.tight))
    notes = (
        *_network_note(scale, natural),
        f"Trained networks: {how.said}; certified accuracy on {_images(how)}.",
        f"`{LPS[1]}`, the triangle LP on CROWN's bounds, is measured for tightness alone, on {m.lp_images} images: "
        "where that is fewer, its area compares with no other row.",
    )
    return _plan(
        "table1",
        scale,
        seed,
        "Five relaxations and training with them",
        lines,
        notes,
        _fixed(scale, natural, seed),
        True,
    )


def _table2(scale: ExperimentScale, seed: int) -> TablePlan:
    """Certified accuracy of training by each method, for data sets and networks."""
    lines = []
    for how in scale.networks:
        for method in METHODS:
            runs = [_trained(how, method, seed + i) for i in range(scale.seeds)]
            lines.append(
                Line(
                    label=method,
                    relaxation=_own(method),
                    own=_own(method),
                    group=how.label,
                    certified=tuple(_certified(run, how, _own(method)) for run in runs),
                )
            )
    notes = tuple(f"{how.label}: {how.said}; certified on {_images(how)}." for how in scale.networks)
    return _plan("table2", scale, seed, "Training by six methods", lines, notes, None, True)


def _table3(scale: ExperimentScale, seed: int) -> TablePlan:
    """Every modified relaxation: trained with, and measured."""
    how = scale.modified
    lines = []
    for name in ("box", *MODIFIED):
        method = "crown-ibp-r" if name == "crown-ibp" else _base(name)
        modified = None if name in FIVE else name
        runs = [_trained(how, method, seed + i, modified) for i in range(scale.seeds)]
        measured = _measured(scale, scale.natural_small, seed, name)
        lines.append(
            Line(
                label=name,
                relaxation=name,
                own=name,
                certified=tuple(_certified(run, how, name) for run in runs),
                tight=measured.tight,
                jumps=measured.jumps,
                steps=measured.steps,
            )
        )
    notes = (
        f"Trained networks: {how.said}, every relaxation with the settings of the one it modifies; certified accuracy "
        f"on {_images(how)}.",
        *_network_note(scale, scale.natural_small),
    )
    return _plan("table3", scale, seed, "Modified relaxations", lines, notes, _fixed(scale, scale.natural_small, seed))


def _table4(scale: ExperimentScale, seed: int) -> TablePlan:
    """Loosened Box: widened by omega, continuous or in F jumps a unit."""
    how = scale.loosened
    lines = [_loosened(how, "box", "box", None, None, scale, seed)]
    for omega in scale.omegas:
        lines.append(_loosened(how, f"box-widen:omega={omega:g}", "C", omega, None, scale, seed))
        for grid in scale.grids:
            name = f"box-round:omega={omega:g},F={grid:g}"
            lines.append(_loosened(how, name, "DC", omega, grid, scale, seed))
    notes = (
        f"Trained networks: {how.said}, all with Box's settings; {scale.loose_seeds} seeds.",
        f"Certified by Box itself, not loosened, and by any of {', '.join(_REFERENCES)} and the loosened Box, on "
        f"{_images(how)}: the control is in training, so all are judged alike.",
        "C widens every pre-activation interval by omega at both ends: looser, and continuous. DC widens each end by "
        "between 0 and omega, and jumps by omega F times a unit of that end: as loose at most, and discontinuous.",
    )
    return _plan("table4", scale, seed, "Loosened Box: looseness apart from jumps", lines, notes)


def _loosened(
    how: NetworkTraining,
    name: str,
    kind: str,
    omega: float | None,
    grid: float | None,
    scale: ExperimentScale,
    seed: int,
) -> Line:
    relaxation = None if name == "box" else name
    runs = [_trained(how, "box", seed + i, relaxation) for i in range(scale.loose_seeds)]
    return Line(
        label=name,
        relaxation=name,
        group=kind,
        own=name,
        omega=omega,
        grid=grid,
        certified=tuple(_certified(run, how, name) for run in runs),
    )


def _properties(scale: ExperimentScale, seed: int) -> TablePlan:
    """Every relaxation's three properties on one network."""
    how = scale.natural_small
    names = ("box", "box-widen:omega=0.01", "box-round:omega=0.01,F=10", *MODIFIED, *LPS)
    lines = []
    for name in names:
        measured = _measured(scale, how, seed, name)
        steps = None if name == "layerwise" else measured.steps  # one LP a neuron at every step
        degrees = Row("digits", None, Degrees(relaxation=name, eps=0.1, hidden=scale.degrees_hidden))
        lines.append(
            Line(
                label=name,
                relaxation=name,
                tight=measured.tight,
                jumps=measured.jumps,
                steps=steps,
                degrees=degrees,
            )
        )
    m = scale.small
    sizes = "-".join(map(str, (64, *scale.degrees_hidden, 10)))
    notes = (
        *_network_note(scale, how),
        f"LPs: {m.lp_images} images for tightness; one line of {100 * m.lp_length:g} % and one example for jumps; "
        "their gradients carry the solver's tolerance, which shows in the smallest steps.",
        f"Degrees: of numerator and denominator of a margin's bound in the step, on a network {sizes} of random "
        "weights, first test image of the digits, eps 0.1, the greatest over its margins; they hold for that network's "
        "crossing neurons, and say how bounds differ in kind, not how large the effect is.",
    )
    return _plan(
        "properties", scale, seed, "Three properties of every relaxation", lines, notes, _fixed(scale, how, seed)
    )


def _network_note(scale: ExperimentScale, how: NetworkTraining) -> tuple[str, ...]:
    m = scale.conv if how.model == "conv" else scale.small
    return (
        f"Fixed network: {how.said}.",
        f"Tightness: {m.images} evenly spaced test images, radii to {m.resolution:g}, scanned at {m.points} points "
        "where bounds are not monotone in eps.",
        f"Continuity: eps {m.eps:g}, {m.lines} line(s) down each relaxation's own gradient, each {100 * m.length:g} % "
        f"of the weights' norm long and about {m.examples} image(s) of its own.",
        f"Sensitivity: eps {m.eps:g}, {m.step_examples} images, steps of "
        f"{', '.join(f'{100 * s:g} %' for s in m.steps)} of each weight tensor's norm.",
    )


def _images(how: NetworkTraining) -> str:
    return "the whole test set" if how.images >= 10_000 else f"{how.images:,} evenly spaced test images"


def _plan(
    table: str,
    scale: ExperimentScale,
    seed: int,
    title: str,
    lines: Sequence[Line],
    notes: Sequence[str],
    fixed: Row | None = None,
    published: bool = False,
) -> TablePlan:
    return TablePlan(
        table=table,
        budget=scale.name,
        seed=seed,
        title=title,
        lines=tuple(lines),
        notes=(*scale.warning, *notes),
        fixed=fixed,
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
    if seed < 0:
        raise ValueError(f"paper: seed must be >= 0, got {seed}")
    return _MAKERS[table](BUDGETS[budget], seed)
