"""The library's main job in one go: train the same network in several ways, certify each by every relaxation.

Rows are ways of training, columns relaxations: what each bought, on real images. The last network, which is trained
with the triangle LP as a layer, is bounded by all of them side by side: how tight, how fast, how far from optimal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optrelax.certification.attacks import PGD
from optrelax.certification.certifying import certify
from optrelax.certification.comparison import Comparison, compare
from optrelax.checks import require_range
from optrelax.data.datasets import load_dataset
from optrelax.data.splits import Dataset
from optrelax.networks.graph import Network
from optrelax.output.plots import certified_against_eps, write_figure
from optrelax.output.tables import require_writable, write_frame, write_json
from optrelax.relaxations import Relaxation, resolve
from optrelax.training.recipes import Recipe, recipe
from optrelax.training.trainer import train

if TYPE_CHECKING:
    import polars as pl

    from optrelax.certification.verdicts import CertificationReport

__all__ = ["METHODS", "RELAXATIONS", "SLOW", "Demo", "DemoResult", "available", "run"]

METHODS = ("natural", "box", "crown-ibp", "triangle")
"""Ways of training, as recipes name them; the network of the last is the one that relaxations are compared on."""
RELAXATIONS = ("box", "hbox", "deepz", "crown-ibp", "crown", "triangle")
"""Columns of the table and lines of the pictures."""
SLOW = ("layerwise",)
"""Further columns of the table: one LP a neuron and direction is too slow for every radius of a curve."""
_RADII = (0.0, 0.5, 1.0, 1.5, 2.0)  # of the curves, in units of the trained eps

Bar = Callable[[str], contextlib.AbstractContextManager[Callable[[Any], None] | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What to compare: the recipes DATA-fc-small-METHOD, the relaxations, and on how many test images.

    relaxations: in the table and the curves.  slow: in the table only.
    epochs, eps: of every recipe, None for its own.  subset: evenly spaced test images, None for all.
    """

    data: str = "digits"
    data_dir: Path | None = None
    methods: Sequence[str] = METHODS
    relaxations: Sequence[str] = RELAXATIONS
    slow: Sequence[str] = SLOW
    epochs: int | None = None
    eps: float | None = None
    subset: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "relaxations"):
            if not getattr(self, name):
                raise ValueError(f"Demo: {name} must name at least one")
        require_range("Demo", "> 0", optional=True, eps=self.eps)
        self.recipes()
        for name in (*self.relaxations, *self.slow):
            if not resolve(name).sound:
                raise ValueError(f"Demo: {name} is an estimate, not a bound, and certifies nothing; choose another")

    def recipes(self) -> list[Recipe]:
        """One a method, all with the same eps.  ValueError for one that does not exist."""
        given = {"epochs": self.epochs, "eps": self.eps}
        changes = {key: value for key, value in given.items() if value is not None}
        return [recipe(f"{self.data}-fc-small-{method}", **changes) for method in self.methods]


@dataclass(frozen=True, slots=True, eq=False)
class DemoResult:
    """The tables at the trained eps, the certified fractions against eps, the pictures, and the time of everything."""

    table: pl.DataFrame
    """training, training s, accuracy %, PGD %, one column of certified % a relaxation, certifying s."""
    curves: pl.DataFrame
    """training, eps, relaxation, certified: fractions of 1; `PGD` among the relaxations bounds them from above."""
    comparison: Comparison
    """All relaxations on the network of the last method: bound, certified, time and gap."""
    pictures: tuple[Path, ...]
    eps: float
    examples: int
    seconds: float


def available(relaxations: Sequence[str]) -> tuple[str, ...]:
    """Those of the relaxations that this installation has."""
    found = []
    for name in relaxations:
        try:
            resolve(name)
        except (ImportError, AttributeError):
            continue
        found.append(name)
    return tuple(found)


def _silent(title: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def run(
    demo: Demo,
    folder: Path,
    *,
    training_bar: Bar = _silent,
    certification_bar: Bar = _silent,
    comparison_bar: Bar = _silent,
) -> DemoResult:
    """Train, certify and draw into `folder`; networks that an earlier run finished there are not trained again.

    training_bar, certification_bar, comparison_bar: context managers that give the callback of `train`, `certify` and
    `compare`.
    """
    import polars as pl

    begin = time.perf_counter()
    require_writable(folder)
    test = load_dataset(demo.data, demo.data_dir, "test")
    images = load_dataset(demo.data, demo.data_dir, "train")
    if demo.subset is not None:
        test = test.subset(demo.subset)
    rows, points, pictures = [], [], []
    for method, row in zip(demo.methods, demo.recipes(), strict=True):
        with training_bar(f"train {row.name}") as watch:
            network, spent = _trained(row, images, folder / method, demo.seed, watch)
        reports = _certified(demo, row, network, test, certification_bar)
        rows.append(_row(method, spent, reports[_RADII.index(1.0)]))
        points += _points(demo, method, reports)
        pictures += _picture(demo, method, row, reports, folder)
    with comparison_bar(f"compare on {row.name}") as progress:
        names = (*demo.relaxations, *demo.slow)
        compared = compare(network, test, row.eps, names, progress=progress)
    figure = compared.figure(f"{row.model} on {row.data}, training: {method}, eps {row.eps:g}")
    pictures += write_figure(figure, folder / "tightness.png", svg=False)
    table, curves = pl.DataFrame(rows), pl.DataFrame(points)
    seconds = time.perf_counter() - begin
    write_frame(table, folder / "table.csv")
    write_frame(curves, folder / "curves.csv")
    write_frame(compared.table, folder / "comparison.csv")
    settings = {**asdict(demo), "data_dir": None if demo.data_dir is None else str(demo.data_dir)}
    facts = {"table": table.to_dicts(), "comparison": compared.table.to_dicts(), "seconds": seconds}
    write_json(settings | facts, folder / "demo.json")
    return DemoResult(table, curves, compared, tuple(pictures), row.eps, len(test), seconds)


def _trained(row: Recipe, images: Dataset, folder: Path, seed: int, watch: Any) -> tuple[Network, float]:
    """The network, and the seconds that its epochs took."""
    net = row.network(images, seed)
    facts = {"recipe": asdict(row), "seed": seed}
    training = row.training(seed)
    result = train(net, images, training, folder=folder, resume=True, watch=watch, before=watch, facts=facts)
    return result.network, sum(epoch.seconds for epoch in result.history)


def _certified(demo: Demo, row: Recipe, network: Network, test: Dataset, bar: Bar) -> list[CertificationReport]:
    """One report a radius."""
    attack = PGD(restarts=2, steps=20, seed=demo.seed)
    reports = []
    for share in _RADII:
        eps = share * row.eps
        with bar(f"certify {row.name} at eps {eps:g}") as progress:
            names = _certifiers([*demo.relaxations, *(demo.slow if share == 1 else ())])
            reports.append(certify(network, test, eps, relaxation=names, attack=attack, progress=progress))
    return reports


def _certifiers(names: Sequence[str]) -> dict[str, Relaxation]:
    """Relaxations by name; the triangle LP stops where the sign of a margin is certain, which is all that counts."""
    from optrelax.layers import DualAscent, Triangle

    found = {name: resolve(name) for name in names}
    if "triangle" in found:
        found["triangle"] = Triangle(solver=DualAscent(threshold=0.0))
    return found


def _row(method: str, spent: float, report: CertificationReport) -> dict[str, object]:
    return {
        "training": method,
        "training s": spent,
        "accuracy %": 100 * report.accuracy,
        "PGD %": 100 * (report.pgd_accuracy or 0.0),
        **{f"{name} %": 100 * share for name, share in report.certified_by.items()},
        "certifying s": report.seconds,
    }


def _points(demo: Demo, method: str, reports: Sequence[CertificationReport]) -> list[dict[str, object]]:
    points = []
    for report in reports:
        lines = {name: report.certified_by[name] for name in demo.relaxations} | {"PGD": report.pgd_accuracy}
        where = {"training": method, "eps": report.settings["eps"]}
        points += [{**where, "relaxation": name, "certified": share} for name, share in lines.items()]
    return points


def _picture(demo: Demo, method: str, row: Recipe, reports: Sequence[CertificationReport], folder: Path) -> list[Path]:
    eps = [report.settings["eps"] for report in reports]
    lines = {name: [report.certified_by[name] for report in reports] for name in demo.relaxations}
    attacked = {"PGD (upper bound)": [report.pgd_accuracy or 0.0 for report in reports]}
    title = f"{row.model} on {row.data}, training: {method}"
    figure = certified_against_eps(eps, lines, title=title, reference=attacked)
    return write_figure(figure, folder / f"{method}.png", svg=False)
