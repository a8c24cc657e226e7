"""Budgets: the numbers of every table, from a few seconds to the paper's own schedule."""

from __future__ import annotations

from dataclasses import replace

from optrelax.papers.scales import ExperimentScale, Measuring, NetworkTraining

__all__ = ["BUDGETS"]


# --- smoke: scikit-learn's digits, seconds ------------------------------------------------------------------------

_TINY = NetworkTraining(
    data="digits",
    model="fc-small",
    images=40,
    changes={"epochs": 4, "subset": 200, "eps": 0.05},
    said="FC-SMALL (64-100-100-10), 200 digits, 4 epochs, eps 0.05",
)
_TINY_NATURAL = replace(
    _TINY,
    changes={"epochs": 8, "subset": 800},
    said="FC-SMALL (64-100-100-10), trained naturally on 800 digits for 8 epochs",
)
_TINY_MEASURES = Measuring(
    eps=0.05,
    images=6,
    points=8,
    resolution=4e-3,
    lines=1,
    examples=1,
    length=2e-3,
    cells=4,
    steps=(1e-4, 1e-2),
    step_examples=2,
    draws=1,
    lp_images=2,
    lp_length=1e-4,
)
_SMOKE = ExperimentScale(
    name="smoke",
    warning=(
        "Budget `smoke` shows that everything runs, on scikit-learn's digits in place of the paper's data: its figures "
        "say nothing about relaxations.",
    ),
    loose_seeds=2,
    anchor=_TINY,
    natural_anchor=_TINY_NATURAL,
    natural_small=_TINY_NATURAL,
    networks=(_TINY,),
    modified=_TINY,
    loosened=_TINY,
    omegas=(0.01, 1.0),
    grids=(1.0, 10.0),
    degrees_hidden=(4, 4),
    conv=_TINY_MEASURES,
    small=_TINY_MEASURES,
)

# --- cpu: under an hour of two cores ------------------------------------------------------------------------------

_SHORT: dict[str, object] = {"epochs": 10, "subset": 6000, "eps": 0.2, "kappa": 0.5, "lr": 2e-3, "batch": 25}
_CPU_SMALL = NetworkTraining(
    data="mnist",
    model="fc-small",
    images=1000,
    changes=_SHORT,
    said="FC-SMALL in place of the paper's FC on 6,000 evenly spaced images for 10 epochs, eps 0.2 (at the paper's 0.3 "
    "so small a network and short a training certify next to nothing), half the final weight on the natural loss, "
    "learning rate 2e-3, batch 25; one schedule for all, chosen on Box and CROWN-IBP (R)",
)
_CPU_CONV = NetworkTraining(
    data="mnist",
    model="conv",
    images=500,
    changes=_SHORT | {"epochs": 8, "subset": 3000, "eps": 0.3},
    said="CONV on 3,000 evenly spaced images of MNIST for 8 epochs of the paper's 200, eps 0.3, half the final weight "
    "on the natural loss, learning rate 2e-3, batch 25 (chosen on Box); warm-up, mixing and L1 as in the paper, epochs "
    "in their shares",
)
_CPU_MEASURES = Measuring(
    images=20,
    resolution=1e-3,
    lines=2,
    examples=1,
    length=2e-3,
    step_examples=8,
    draws=4,
    lp_images=20,
    lp_length=5e-4,
)
_CPU = ExperimentScale(
    name="cpu",
    warning=(
        "Budget `cpu` trains on a few hundredths of the paper's images at most, one seed where none is named: its "
        "certified accuracies are far below the published ones, and differences of a few points between methods are "
        "noise.",
    ),
    loose_seeds=2,
    anchor=_CPU_CONV,
    natural_anchor=replace(
        _CPU_CONV, changes={"epochs": 3}, said="CONV trained naturally on all of MNIST for 3 epochs"
    ),
    natural_small=replace(
        _CPU_SMALL,
        changes={"epochs": 5},
        said="FC-SMALL (784-100-100-10) trained naturally on all of MNIST for 5 epochs",
    ),
    networks=(_CPU_SMALL, replace(_CPU_SMALL, data="fashion-mnist", said="as MNIST, FC-SMALL"), _CPU_CONV),
    modified=_CPU_SMALL,
    loosened=replace(
        _CPU_SMALL,
        images=500,
        changes={"epochs": 3, "eps": 0.2, "kappa": 0.5, "lr": 2e-3, "batch": 100},
        said="FC-SMALL on all of MNIST for 3 epochs, eps 0.2, half the final weight on the natural loss, learning rate "
        "2e-3, batch 100",
        suffix="-loosened",
    ),
    omegas=(0.01, 0.5, 1.0, 3.0),
    grids=(1.0, 10.0, 100.0),
    degrees_hidden=(12, 12),
    conv=_CPU_MEASURES,
    small=replace(
        _CPU_MEASURES,
        images=50,
        resolution=5e-4,
        examples=2,
        length=1e-2,
        step_examples=16,
        lp_images=50,
        lp_length=2e-3,
    ),
)

# --- full: the paper's schedule -----------------------------------------------------------------------------------


def _paper(data: str, model: str) -> NetworkTraining:
    return NetworkTraining(
        data=data,
        model=model,
        images=10_000,
        changes={},
        said=f"{model.upper()} on all of {data}, the paper's recipes: 200 epochs, eps 0.3",
    )


_FULL_MEASURES = Measuring(
    images=100,
    resolution=1e-4,
    lines=4,
    examples=2,
    length=1e-2,
    step_examples=16,
    draws=8,
    lp_images=100,
    lp_length=1e-3,
)
_FULL = ExperimentScale(
    name="full",
    warning=(),
    loose_seeds=3,
    anchor=_paper("mnist", "conv"),
    natural_anchor=replace(
        _paper("mnist", "conv"), changes={"epochs": 20}, said="CONV trained naturally on all of MNIST for 20 epochs"
    ),
    natural_small=replace(
        _paper("mnist", "fc-small"),
        changes={"epochs": 20},
        said="FC-SMALL (784-100-100-10) trained naturally on all of MNIST for 20 epochs",
    ),
    networks=tuple(_paper(data, model) for data in ("mnist", "fashion-mnist") for model in ("fc", "conv")),
    modified=_paper("mnist", "fc"),
    loosened=replace(
        _paper("mnist", "fc-small"),
        changes={"eps": 0.3},
        said="FC-SMALL on all of MNIST for 100 epochs, eps 0.3",
    ),
    omegas=(0.01, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0),
    grids=(1.0, 10.0, 100.0, 300.0, 1000.0),
    degrees_hidden=(16, 16),
    conv=_FULL_MEASURES,
    small=replace(_FULL_MEASURES, images=200, lines=8, examples=4, step_examples=32, lp_images=200, lp_length=1e-2),
)

BUDGETS = {scale.name: scale for scale in (_SMOKE, _CPU, _FULL)}
"""By name, from the quickest to the longest."""
