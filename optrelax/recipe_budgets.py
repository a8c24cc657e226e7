"""What a recipe's training step costs, and how many epochs and images a budget has room for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optrelax.recipes import Recipe

__all__ = ["BUDGETS", "cut", "milliseconds"]

BUDGETS = ("full", "cpu", "smoke")
"""The recipe's own epochs on all images; at most 30 minutes of two cores; under a minute."""

# Milliseconds of one core an image (forward and backward, float32, MNIST; measured at a tenth and a third of eps 0.3
# on a core that does some 100 GFLOP/s): fc-small, fc, conv.
_COST = {
    "box": (0.05, 0.2, 0.25),
    "crown-ibp": (0.25, 0.8, 1.5),
    "hbox": (2.0, 13.0, 38.0),
    "deepz": (4.0, 36.0, 25.0),
    "crown": (4.1, 32.0, 27.0),
    "triangle": (6.2, 50.0, 50.0),
    "layerwise": (52.0, 1000.0, 4000.0),
}
_METHODS = {"natural": 0.02, "pgd": 0.2, "sabr": 0.2, "mtl-ibp": 0.2, "cc-ibp": 0.2, "exp-ibp": 0.2, "colt": 1.8}
_IMAGES = {"digits": 1437, "mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000, "svhn": 73_257}
_COLOUR = 4.5  # CONVPLUS on 3 x 32 x 32 against CONV on 1 x 28 x 28
_CORE_SECONDS = {"cpu": 2400.0, "smoke": 6.0}  # two thirds of two cores' 30 minutes; starting up comes on top


def milliseconds(row: Recipe) -> float:
    """One core's time for one image of a training step, roughly: the dearest relaxation that takes part."""
    place = {"fc-small": 0, "fc": 1}.get(row.model, 2)
    names = [name for name in (row.relaxation, row.other if row.beta < 1 else None) if name is not None]
    names += [name for name, _ in row.stages]
    each = [_COST[name.split(":")[0]][place] for name in names if name.split(":")[0] in _COST]
    # A relaxation that nobody measured counts as CROWN.
    each += [_COST["crown"][place]] if len(each) < len(names) else []
    cost = max(each, default=_METHODS.get(row.method, 1.0) * (1 if place == 0 else 3))
    if row.smoothing is not None:
        cost *= row.samples if row.smoothing == "rgs" else row.samples / 3  # PGPE goes forward only
    return cost * (_COLOUR if row.data in ("cifar10", "svhn") else 1.0)


def cut(row: Recipe, budget: str) -> dict[str, Any]:
    """Epochs and subset of a recipe within a budget.

    All images where six epochs of them fit, else an evenly spaced 6,000 or fewer; at most 30 epochs (3 for smoke).
    The digits are small: they are cut for smoke only.
    """
    if budget == "full" or (row.data == "digits" and budget == "cpu"):
        return {}
    passes = _CORE_SECONDS[budget] * 1e3 / milliseconds(row)
    if budget == "smoke":
        return {"epochs": 3, "subset": row.subset or max(50, min(600, int(passes / 3)))}
    whole = _IMAGES[row.data] if row.subset is None else row.subset
    images = whole if passes >= 6 * whole else min(whole, 6000, max(100, int(passes / 6)))
    epochs = max(3, min(30, row.epochs, int(passes / images)))
    return {"epochs": epochs, "subset": row.subset if images == whole else images}
