"""What each report says: its tables, how to read them, and its figures with captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optrelax.papers import figures
from optrelax.papers.frames import (
    TableOutcomes,
    loosened_frame,
    properties_frame,
    summary_frame,
    tightness_frame,
    together_frame,
    trained_frame,
)
from optrelax.papers.plans import FIVE

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["Picture", "Section", "sections"]

_PERCENT = (
    "lowest",
    "highest",
    "accuracy %",
    "certified %",
    "certified % (paper)",
    "certified % by box",
    "certified % by any",
)
_DECIMALS = {
    **dict.fromkeys((*_PERCENT, "under attack %", "loss change %", "gradient change %", "share of travel %"), 1),
    **dict.fromkeys(("tightness", "tightness (paper)", "area", "low", "high", "gap", "bound change"), 2),
    **dict.fromkeys(("predicted, smallest step", "predicted, 1 %"), 2),
    **dict.fromkeys(("a unit", "training s"), 0),
    "propagation %": 1,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, the name of its files, and its caption."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report."""

    title: str
    tables: Mapping[str, pl.DataFrame]
    remarks: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    decimals: Mapping[str, int] = field(default_factory=lambda: _DECIMALS)


def sections(found: TableOutcomes) -> list[Section]:
    """The parts of a table's report."""
    return _MAKERS[found.plan.table](found)


# --- remarks ------------------------------------------------------------------------------------------------------


def _trained_remarks(found: TableOutcomes) -> list[str]:
    images = sorted({row.question.images for line in found.plan.lines for row in line.certified})  # type: ignore[union-attr]
    least = min(images)
    spread = 196 * (0.25 / least) ** 0.5
    several = any(len(line.certified) > 1 for line in found.plan.lines)
    remarks = [
        "*certified %*: by the network's own bound; *by any*: by at least one of it, box, crown-ibp and crown, rounded "
        "outward. *under attack*: what PGD of one restart left, an upper limit. *accuracy* is natural.",
        f"Sampling of test images alone moves a percentage by up to {spread:.1f} points (95 %, {least:,} images); "
        "other seeds move it further.",
    ]
    if several:
        remarks.append(
            "Means over seeds; *lowest*, *highest*: *by any* over them, bars in figures. Two seeds bound little."
        )
    else:
        remarks.append("One seed: no figure here has a spread over seeds, and no difference should be read as one.")
    return remarks


_TIGHT_REMARK = (
    "*area*: under the certified fraction against eps, times 100, with the bootstrap's 95 % interval over images (low, "
    "high). Rows share their images, so differences are surer than intervals suggest. *gap*: least margin found by the "
    "attack minus the bound, in logits, at the attack's median radius; *propagation*: width found to width proved."
)
_JUMP_REMARK = (
    "*jumps*: of the bound, each located to floating-point resolution; *a unit*: per length of the weights' norm; "
    "*share of travel*: of the loss's total variation on these lines. *listed*: where the paper says it may jump. No "
    "jump on a few short lines proves no continuity; where jumps are listed and none was met, the lines were too short "
    "to meet one."
)
_STEP_REMARK = (
    "*loss change*, *gradient change*, *bound change* (logits): under a step of 1 % of the weights up the loss; "
    "*predicted*: change of the loss to what its gradient says, one step down it (1: linear; below 0: it went up). A "
    "small loss is nearly exp(-margin), so tighter bounds have larger relative changes for that reason alone."
)
_DEGREE_REMARK = "*degrees*: numerator / denominator of the bound as a function of the step; 0 below: a polynomial."


def _contradictions(found: TableOutcomes) -> list[str]:
    """Evidence against the paper's statements, as it was found."""
    remarks = []
    for line in found.plan.lines:
        answer = found.answer(line.jumps)
        if answer is not None and answer["table"][0]["verdict"].startswith("CONTRADICTS"):
            row = answer["table"][0]
            remarks.append(f"**Against the list:** `{line.label}` jumps at {row['causes']}, listed: {row['listed']}.")
    verdicts = [answer["table"][0]["verdict"] for line in found.plan.lines if (answer := found.answer(line.jumps))]
    if verdicts and not remarks:
        unmet = sum(verdict == "none met, though listed" for verdict in verdicts)
        remarks.append(
            f"Nothing met here contradicts the list of jumps; of {len(verdicts)} relaxations {unmet} are listed and "
            "did not jump on these lines."
        )
    areas = {row["relaxation"]: row["area"] for row in tightness_frame(found).to_dicts() if row["area"] is not None}
    order = [name for name in FIVE if name in areas]
    if order != sorted(order, key=lambda name: areas[name]):
        shown = ", ".join(f"{name} {areas[name]:.2f}" for name in sorted(order, key=lambda name: areas[name]))
        remarks.append(f"**Against the published order** (box, hbox, crown-ibp, deepz, crown): {shown}.")
    return remarks


def _kept(*pictures: tuple[str, Figure | None, str]) -> list[Picture]:
    """Figures for which there was data."""
    return [Picture(name, figure, caption) for name, figure, caption in pictures if figure is not None]


def _measured(found: TableOutcomes, names: Sequence[str]) -> list[Section]:
    """The three properties on the fixed network."""
    shown = ", ".join(names)
    tight = tightness_frame(found)
    # Curves compare on equal images only.
    images = dict(tight.select("relaxation", "images").iter_rows())
    most = max((n for n in images.values() if n is not None), default=None)
    curves = [name for name in names if images.get(name) == most]
    fixed = found.answer(found.plan.fixed)
    said = []
    if fixed is not None:
        said.append(
            f"The fixed network classifies {100 * fixed['accuracy']:.1f} % of {fixed['examples']:,} evenly spaced test "
            f"images correctly; at eps {fixed['eps']:g}, where continuity and sensitivity are measured, "
            f"{100 * fixed['certified_by']['crown']:.1f} % are certified by crown."
        )
    return [
        Section(
            "Tightness on the fixed network",
            {"tightness": tight},
            (*said, _TIGHT_REMARK),
            _kept(
                (
                    "tightness",
                    figures.tightness_lines(found, curves, ""),
                    f"Certified fraction of {most} test images of the fixed network against eps; the attack in grey is "
                    "a limit that no sound bound crosses, not the truth. The smallest step is one image.",
                )
            ),
        ),
        Section(
            "Continuity and sensitivity on the fixed network",
            {"properties": properties_frame(found)},
            (
                _JUMP_REMARK,
                _STEP_REMARK,
                *([_DEGREE_REMARK] if any(line.degrees for line in found.plan.lines) else []),
                *_contradictions(found),
            ),
            _kept(
                (
                    "continuity",
                    figures.jump_lines(found, names, ""),
                    f"The loss along the first line of each of {shown}, down its own gradient, on that line's images "
                    "only; jumps in orange, scales differ. One line shows what jumps look like, not how often they "
                    "come.",
                ),
                (
                    "sensitivity",
                    figures.sensitivity_lines(found, names, ""),
                    f"Relative change of loss and gradient of {shown} against the size of the step of the weights. The "
                    "largest over the draws; relaxations with small losses change more for that reason alone.",
                ),
            ),
        ),
    ]


# --- tables -------------------------------------------------------------------------------------------------------


def _table1(found: TableOutcomes) -> list[Section]:
    summary = summary_frame(found)
    how = (
        "*tightness*, *jumps met* and *loss change* (1 % of the weights, up the loss) are of one fixed, naturally "
        "trained network; *certified %* is of a network trained with the relaxation, by its own bound. The published "
        "tightness is of another network on a grid of eps that is not known: compare orders, not values. The published "
        "*continuous* is a statement about all networks, ours counts jumps on a few lines."
    )
    both = (
        "Each relaxation's certified accuracy after training against its tightness on a fixed network. Left: this run. "
        "Right: published. Left is one seed of the schedule above: only a full run can confirm or refute the right."
    )
    trained = trained_frame(found)
    return [
        Section(
            "Beside the published table",
            {"summary": summary},
            (how,),
            _kept(("paradox", figures.paradox(summary, ""), both)),
        ),
        Section(
            "Networks trained with each",
            {"trained": trained},
            _trained_remarks(found),
            _kept(
                (
                    "trained",
                    figures.accuracy_dots(found, trained, ""),
                    "Accuracies of each trained network; the truth lies between certified and under attack.",
                )
            ),
        ),
        *_measured(found, FIVE),
    ]


def _table2(found: TableOutcomes) -> list[Section]:
    trained = trained_frame(found)
    caption = (
        "Accuracies of each network, by data set, architecture and way of training; the truth lies between certified "
        "and under attack. Networks differ in schedule and size between groups: compare within a group."
    )
    remark = (
        "`crown-ibp-r` is the paper's CROWN-IBP (R); `crown-ibp` mixes with Box, ends there, and is certified by it."
    )
    return [
        Section(
            "Certified accuracy",
            {"trained": trained},
            (remark, *_trained_remarks(found)),
            _kept(("trained", figures.accuracy_dots(found, trained, ""), caption)),
        )
    ]


def _table3(found: TableOutcomes) -> list[Section]:
    together = together_frame(found)
    caption = (
        "Certified accuracy after training (by any bound) against tightness on the fixed, naturally trained network, a "
        "mark a relaxation. Marks are the paper's list, not what was met here. Two properties cannot explain more than "
        "the noise of one seed allows: look for groups, not for neighbours."
    )
    trained = trained_frame(found)
    return [
        Section(
            "Training beside the three properties",
            {"together": together},
            ("*area*, *jumps* and *loss change* are of the fixed network, accuracies of the trained ones.",),
            _kept(("scatter", figures.properties_scatter(together, ""), caption)),
        ),
        Section(
            "Networks trained with each",
            {"trained": trained},
            _trained_remarks(found),
            _kept(("trained", figures.accuracy_dots(found, trained, ""), "Accuracies of each trained network.")),
        ),
        *_measured(found, FIVE),
    ]


def _table4(found: TableOutcomes) -> list[Section]:
    frame = loosened_frame(found)
    caption = (
        "Natural and certified accuracy (by any bound) of training with loosened Box, means over seeds, colours from 0 "
        "to the panel's largest. First column: widened by omega without jumps; the others jump by omega, F times a "
        "unit of a pre-activation bound, and are less loose on average. Differences between cells below the spread "
        "over seeds say nothing."
    )
    remark = (
        "*certified %* is by the loosened Box itself, which is looser by construction: judge training by *by box* and "
        "*by any*."
    )
    return [
        Section(
            "Loosened Box",
            {"loosened": frame},
            (remark, *_trained_remarks(found)),
            _kept(("map", figures.loosened_map(frame, ""), caption)),
        )
    ]


def _properties(found: TableOutcomes) -> list[Section]:
    return _measured(found, figures.main_names(found))


_MAKERS: dict[str, Callable[[TableOutcomes], list[Section]]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "properties": _properties,
}
