"""What each report says: its tables, how to read them, and its figures with captions."""

from __future__ import annotations

from collections.abc import Callable

from optrelax.papers import figures
from optrelax.papers.frames import (
    TableOutcomes,
    loosened_frame,
    summary_frame,
    together_frame,
    trained_frame,
)
from optrelax.papers.measured_sections import Section, drawn_pictures, measured_sections
from optrelax.papers.plans import FIVE

__all__ = ["sections"]


def sections(found: TableOutcomes) -> list[Section]:
    """The parts of a table's report."""
    return _MAKERS[found.plan.table](found)


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


def _trained(found: TableOutcomes, title: str, caption: str, *remarks: str) -> Section:
    """What training gave: the table, how to read it, and its dots."""
    frame = trained_frame(found)
    pictures = drawn_pictures(("trained", figures.accuracy_dots(found, frame, ""), caption))
    return Section(title, {"trained": frame}, (*remarks, *_trained_remarks(found)), pictures)


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
    truth = "Accuracies of each trained network; the truth lies between certified and under attack."
    return [
        Section(
            "Beside the published table",
            {"summary": summary},
            (how,),
            drawn_pictures(("paradox", figures.paradox(summary, ""), both)),
        ),
        _trained(found, "Networks trained with each", truth),
        *measured_sections(found, FIVE),
    ]


def _table2(found: TableOutcomes) -> list[Section]:
    caption = (
        "Accuracies of each network, by data set, architecture and way of training; the truth lies between certified "
        "and under attack. Networks differ in schedule and size between groups: compare within a group."
    )
    remark = (
        "`crown-ibp-r` is the paper's CROWN-IBP (R); `crown-ibp` mixes with Box, ends there, and is certified by it."
    )
    return [_trained(found, "Certified accuracy", caption, remark)]


def _table3(found: TableOutcomes) -> list[Section]:
    together = together_frame(found)
    caption = (
        "Certified accuracy after training (by any bound) against tightness on the fixed, naturally trained network, a "
        "mark a relaxation. Marks are the paper's list, not what was met here. Two properties cannot explain more than "
        "the noise of one seed allows: look for groups, not for neighbours."
    )
    return [
        Section(
            "Training beside the three properties",
            {"together": together},
            ("*area*, *jumps* and *loss change* are of the fixed network, accuracies of the trained ones.",),
            drawn_pictures(("scatter", figures.properties_scatter(together, ""), caption)),
        ),
        _trained(found, "Networks trained with each", "Accuracies of each trained network."),
        *measured_sections(found, FIVE),
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
            drawn_pictures(("map", figures.loosened_map(frame, ""), caption)),
        )
    ]


def _properties(found: TableOutcomes) -> list[Section]:
    return measured_sections(found, figures.main_names(found))


_MAKERS: dict[str, Callable[[TableOutcomes], list[Section]]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "properties": _properties,
}
