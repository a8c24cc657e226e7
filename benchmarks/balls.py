"""Balls: networks trained against l2 balls, certified on every test image."""

from __future__ import annotations

import optrelax as ox
from benchmarks.networks import Trained
from benchmarks.reports import Options, Report, Row, Table, environment
from optrelax.data.datasets import load_dataset
from optrelax.data.splits import Dataset

TITLE = "Balls: MNIST in l2, 784-100-100-10, balls cut to the range of pixels"

_RADII = (0.3, 1.58)
_TRAININGS = {"box": Trained("fc-small", "box", 5), "crown": Trained("fc-small", "crown", 5, images=8000)}
_CLIP = (0.0, 1.0)


def run(options: Options) -> Report:
    """Certified accuracy by radius and training."""
    facts = environment(options)
    return Report("balls", TITLE, options, [_certified(options)], (), facts)


def _certified(options: Options) -> Table:
    images = load_dataset(options.data, options.data_dir, split="test")
    images = images.subset(20 if options.quick else len(images))
    rows = []
    for eps in _RADII:
        for method, training in _TRAININGS.items():
            rows.append(_verdicts(eps, method, training, images, options))
    return Table(
        title=f"Trained and certified in l2, {len(images)} test images",
        keys=("eps", "training"),
        rows=rows,
        notes=(
            "Certified in float64, bounds rounded outward; triangle on evenly spaced images. attacks, at most: what "
            "PGD left of the accuracy.",
        ),
    )


def _verdicts(eps: float, method: str, training: Trained, images: Dataset, options: Options) -> Row:
    cut = {"images": 600, "epochs": 2} if options.quick else {}
    settings = {field: getattr(training, field) for field in ("model", "method", "epochs", "seed", "images")}
    trained = Trained(**settings | cut, norm="l2", eps=eps)
    net = trained.network(options)
    found = ox.certify(net, images, eps, _CLIP, ["box", "crown"], norm="l2")
    few = ox.certify(net, images, eps, _CLIP, "triangle", norm="l2", subset=5 if options.quick else 100)
    by = {name: 100 * share for name, share in (found.certified_by | few.certified_by).items()}
    left = found.pgd_accuracy
    return {
        "eps": eps,
        "training": method,
        "images": trained.images or 60_000,
        "epochs": trained.epochs,
        "accuracy %": 100 * found.accuracy,
        "box %": by["box"],
        "crown %": by["crown"],
        "any %": 100 * found.certified,
        "triangle %": by["triangle"],
        "of images": len(few.examples),
        "attacks, at most %": None if left is None else 100 * left,
        "ms an image": 1e3 * found.seconds / len(found.examples),
        "ms by triangle": 1e3 * few.seconds / len(few.examples),
    }
