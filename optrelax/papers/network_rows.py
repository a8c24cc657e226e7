"""Rows about one network: how it is trained, what certifies it, and what is measured on it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from optrelax.papers.questions import Certified, Jumps, Tight, WeightSteps, safe
from optrelax.papers.row_files import Row
from optrelax.papers.scales import ExperimentScale, NetworkTraining
from optrelax.training.recipes import Recipe, recipe
from optrelax.training.sweeps import SweepRun

__all__ = [
    "LPS",
    "METHODS",
    "REFERENCES",
    "base_method",
    "certified_row",
    "fixed_row",
    "images_said",
    "measured_rows",
    "network_notes",
    "own_relaxation",
    "trained_run",
]

METHODS = ("box", "hbox", "crown-ibp-r", "crown-ibp", "deepz", "crown")
"""The paper's ways of training; `crown-ibp` ends at Box."""
LPS = ("triangle", "triangle:preactivation=crown", "layerwise")
REFERENCES = ("box", "crown-ibp", "crown")
_OWN = {"crown-ibp": "box", "crown-ibp-r": "crown-ibp"}
"""What a network is certified by where that is not what its way of training is called."""


def _run(row: Recipe, seed: int, name: str) -> SweepRun:
    return SweepRun(f"{name}-seed={seed}", row, seed)


def base_method(method: str) -> str:
    """The way of training whose settings a relaxation is trained with: that of the one it modifies."""
    if method in METHODS:
        return method
    head = method.split(":")[0]
    for name in ("crown-ibp-soft", "hbox", "deepz", "crown", "box"):
        if head.startswith(name):
            return "crown-ibp-r" if name == "crown-ibp-soft" else name
    raise ValueError(f"no way of training for {method!r}")


def trained_run(how: NetworkTraining, method: str, seed: int, relaxation: str | None = None) -> SweepRun:
    """A network trained by a method, or by a relaxation with the method's settings."""
    small = how.model == "fc-small"
    kind = "crown-ibp" if small and method == "crown-ibp-r" else method
    row = recipe(f"{how.data}-{how.model}-{kind}")
    changes: dict[str, object] = dict(how.changes)
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


def own_relaxation(method: str) -> str:
    """The relaxation that certifies a network trained by a method."""
    return _OWN.get(method, method)


def certified_row(run: SweepRun, how: NetworkTraining, own: str) -> Row:
    """The question how much of a trained network is certified, by its own relaxation and others."""
    several = tuple(dict.fromkeys((own, *REFERENCES)))
    return Row(how.data, run, Certified(relaxations=several, eps=run.row.eps, images=how.images))


def fixed_row(scale: ExperimentScale, how: NetworkTraining, seed: int) -> Row:
    """The same question of the naturally trained network."""
    m = scale.measuring(how)
    question = Certified(relaxations=REFERENCES, eps=m.eps, images=how.images)
    return Row(how.data, _natural(how, seed), question)


class MeasuredRows(NamedTuple):
    """The three measurements of a relaxation on the fixed network."""

    tight: Row
    jumps: Row
    steps: Row


def measured_rows(scale: ExperimentScale, how: NetworkTraining, seed: int, relaxation: str) -> MeasuredRows:
    """Tightness, continuity and sensitivity of a relaxation on the naturally trained network."""
    run = _natural(how, seed)
    kind = relaxation.split(":")[0]
    m = scale.measuring(how)
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
    return MeasuredRows(*(Row(how.data, run, question) for question in (tight, jumps, steps)))


def network_notes(scale: ExperimentScale, how: NetworkTraining) -> tuple[str, ...]:
    """What must be said about the fixed network and the measurements on it."""
    m = scale.measuring(how)
    return (
        f"Fixed network: {how.said}.",
        f"Tightness: {m.images} evenly spaced test images, radii to {m.resolution:g}, scanned at {m.points} points "
        "where bounds are not monotone in eps.",
        f"Continuity: eps {m.eps:g}, {m.lines} line(s) down each relaxation's own gradient, each {100 * m.length:g} % "
        f"of the weights' norm long and about {m.examples} image(s) of its own.",
        f"Sensitivity: eps {m.eps:g}, {m.step_examples} images, steps of "
        f"{', '.join(f'{100 * s:g} %' for s in m.steps)} of each weight tensor's norm.",
    )


def images_said(how: NetworkTraining) -> str:
    """How many images certify a network, in words."""
    return "the whole test set" if how.images >= 10_000 else f"{how.images:,} evenly spaced test images"
