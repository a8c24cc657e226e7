"""The part of a report about the three properties, and the remarks that tell how to read its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optrelax.papers import figures
from optrelax.papers.frames import (
    TableOutcomes,
    properties_frame,
    tightness_frame,
)
from optrelax.papers.plans import FIVE

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["Picture", "Section", "drawn_pictures", "measured_sections"]

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


def drawn_pictures(*pictures: tuple[str, Figure | None, str]) -> list[Picture]:
    """Figures for which there was data."""
    return [Picture(name, figure, caption) for name, figure, caption in pictures if figure is not None]


def measured_sections(found: TableOutcomes, names: Sequence[str]) -> list[Section]:
    """The three properties on the fixed network."""
    return [_tightness(found, names), _weight_space(found, names)]


def _tightness(found: TableOutcomes, names: Sequence[str]) -> Section:
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
    caption = (
        f"Certified fraction of {most} test images of the fixed network against eps; the attack in grey is a limit "
        "that no sound bound crosses, not the truth. The smallest step is one image."
    )
    return Section(
        "Tightness on the fixed network",
        {"tightness": tight},
        (*said, _TIGHT_REMARK),
        drawn_pictures(("tightness", figures.tightness_lines(found, curves, ""), caption)),
    )


def _weight_space(found: TableOutcomes, names: Sequence[str]) -> Section:
    shown = ", ".join(names)
    degrees = [_DEGREE_REMARK] if any(line.degrees for line in found.plan.lines) else []
    jumps = (
        f"The loss along the first line of each of {shown}, down its own gradient, on that line's images only; jumps "
        "in orange, scales differ. One line shows what jumps look like, not how often they come."
    )
    steps = (
        f"Relative change of loss and gradient of {shown} against the size of the step of the weights. The largest "
        "over the draws; relaxations with small losses change more for that reason alone."
    )
    return Section(
        "Continuity and sensitivity on the fixed network",
        {"properties": properties_frame(found)},
        (_JUMP_REMARK, _STEP_REMARK, *degrees, *_contradictions(found)),
        drawn_pictures(
            ("continuity", figures.jump_lines(found, names, ""), jumps),
            ("sensitivity", figures.sensitivity_lines(found, names, ""), steps),
        ),
    )
