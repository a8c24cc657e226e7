"""What a recipe's training step costs, and how many epochs and images a budget has room for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optrelax.training.recipes import Recipe

__all__ = ["BUDGETS", "core_seconds", "cut", "milliseconds"]

BUDGETS = ("full", "cpu", "smoke")
"""The recipe's own epochs on all images; at most 30 minutes of two cores; under a minute."""

# Milliseconds of one core an image: forward, backward and Adam's step, float32, MNIST, with pages kept, on a core that
# does some 100 GFLOP/s. The mean of a network of random weights at a third of eps, where most neurons cross, and one
# trained by CROWN-IBP at eps (0.1 on fc-small, 0.3 on the others), and a tenth more: fc-small, fc, conv.
_COST = {
    "box": (0.1, 0.18, 0.25),
    "crown-ibp": (0.27, 0.65, 0.9),
    "hbox": (1.5, 15.5, 4.2),
    "deepz": (1.4, 16.0, 4.7),
    "crown": (2.7, 31.0, 7.2),
    "triangle": (3.5, 18.5, 27.0),
    "layerwise": (18.0, 300.0, 220.0),
    "natural": (0.03, 0.07, 0.09),
    "pgd": (0.2, 0.6, 1.05),
    "landscape": (0.35, 1.0, 1.8),
    "sabr": (0.22, 0.55, 1.05),
    "mtl-ibp": (0.22, 0.6, 1.0),
    "cc-ibp": (0.22, 0.6, 1.0),
    "exp-ibp": (0.22, 0.6, 1.0),
    "colt": (1.9, 12.0, 110.0),
}
_IMAGES = {"digits": 1437, "mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000, "svhn": 73_257}
# Times the above: 8 x 8 pixels; 3 x 32 x 32.
_PIXELS = {"digits": 0.5, "cifar10": 3.0, "svhn": 3.0}
# Against CONV on the same images; the field's networks against CONV on MNIST, whatever the channels of their images.
_CONVPLUS = 1.5
_FIELD = {"cnn7": 156.0, "cnn7-w16": 16.5, "cnn5": 93.0, "resnet-2b": 2.3}
_MNIST_AREA = 0.77
# Of one core: the second one is not counted on, as small layers gain little by it.
_ROOM = {"cpu": 1440.0, "smoke": 12.0}
_START = 10.0  # seconds until the first step: Python, torch, the data


def milliseconds(row: Recipe) -> float:
    """One core's time for one image of a training step, roughly; a mean over the stages of those that have some."""
    cost = sum(share * _pass(row, name) for name, share in _turns(row))
    if row.smoothing is not None:
        cost *= row.samples if row.smoothing == "rgs" else row.samples / 3  # PGPE goes forward only
    pixels = _PIXELS.get(row.data, 1.0)
    if row.model in _FIELD:
        return cost * _FIELD[row.model] * (1.0 if pixels > 1 else _MNIST_AREA)
    return cost * pixels * (_CONVPLUS if row.model == "convplus" else 1.0)


def core_seconds(row: Recipe) -> float:
    """One core's time for the whole run, until the network is stored, roughly."""
    images = _images(row)
    return _START + row.epochs * images * milliseconds(row) / 1e3


def _images(row: Recipe) -> int:
    """Training images; of data that nobody measured as many as MNIST has."""
    return _IMAGES.get(row.data, _IMAGES["mnist"]) if row.subset is None else row.subset


def _turns(row: Recipe) -> Iterator[tuple[str, float]]:
    """What takes part in the loss, with the share of the epochs in which it does."""
    if not row.stages:
        yield row.relaxation or row.method, 1.0
        if row.relaxation is not None and row.beta < 1:
            yield row.other, 1.0
    ends = [begin for _, begin in row.stages[1:]] + [float(row.epochs)]
    for (name, begin), end in zip(row.stages, ends, strict=False):
        yield name, (end - begin) / row.epochs


def _pass(row: Recipe, name: str) -> float:
    place = {"fc-small": 0, "fc": 1}.get(row.model, 2)
    # A relaxation that nobody measured counts as CROWN.
    return _COST.get(name.split(":")[0], _COST["crown"])[place]


def cut(row: Recipe, budget: str) -> dict[str, object]:
    """Epochs and subset of a recipe within a budget.

    All images where six epochs of them fit, else an evenly spaced 6,000 or fewer; at most 30 epochs (3 for smoke).
    """
    if budget == "full":
        return {}
    passes = _ROOM[budget] * 1e3 / milliseconds(row)
    if budget == "smoke":
        return {"epochs": 3, "subset": row.subset or max(10, min(600, int(passes / 3)))}
    whole = _images(row)
    images = whole if passes >= 6 * whole else min(whole, 6000, max(100, int(passes / 6)))
    epochs = max(3, min(30, row.epochs, int(passes / images)))
    return {"epochs": epochs, "subset": row.subset if images == whole else images}
