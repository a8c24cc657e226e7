"""Steps over balls: what a training step costs over l2 and l1 balls, cut by the range of pixels or not."""

from __future__ import annotations

from torch import Tensor

import optrelax as ox
from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.data.datasets import load_dataset
from optrelax.regions import ball_of

TITLE = "Steps over balls: 784-100-100-10, batch 100, random weights"

_BALLS = (("linf", 0.1), ("l2", 0.3), ("l2", 1.58), ("l1", 1.0), ("l1", 8.0))
_CLIP = (0.0, 1.0)


def run(options: Options) -> Report:
    """One table; a cut ball may cost twice the whole one under CROWN."""
    facts = environment(options)
    table = _steps(options)
    ms = {(row["loss"], row["norm"], row["eps"], row["cut"]): row["step ms"] for row in table.rows}
    bars = []
    for norm, eps in _BALLS[1:]:
        cut, whole = ms["crown", norm, eps, "yes"], ms["crown", norm, eps, "no"]
        bars.append(Bar(f"crown, {norm} {eps}: cut / whole", 2.0, None, cut / whole))
    return Report("ball_steps", TITLE, options, [table], bars, facts)


def _steps(options: Options) -> Table:
    data = load_dataset(options.data, options.data_dir, split="train").subset(6 if options.quick else 100)
    x, labels = data.images, data.labels
    net = ox.models.build("fc-small", data.input_shape, data.classes, options.seed)
    network = ox.capture(net, x.shape[1:])
    tasks: dict[str, Task] = {}
    for relaxation in ("box", "crown"):
        loss = ox.CertifiedLoss(relaxation)
        for norm, eps in _BALLS:
            for clip in (None, _CLIP):
                tasks[f"{relaxation} {norm} {eps} {clip}"] = _step(loss, network, ball_of(norm)(x, eps, clip), labels)
    timed = interleaved(tasks, runs=options.runs)
    rows: list[Row] = [
        {
            "loss": relaxation,
            "norm": norm,
            "eps": eps,
            "cut": "no" if clip is None else "yes",
            "step ms": 1e3 * timed.median(name := f"{relaxation} {norm} {eps} {clip}"),
            "/ linf": timed.ratio(name, f"{relaxation} linf 0.1 {_CLIP}"),
        }
        for relaxation in ("box", "crown")
        for norm, eps in _BALLS
        for clip in (None, _CLIP)
    ]
    return Table(
        title=f"The certified loss, forward and backward, {len(labels)} training images",
        keys=("loss", "norm", "eps", "cut"),
        rows=rows,
        smaller=("/ linf",),
        notes=("cut: the ball meets the range of pixels, [0, 1].",),
    )


def _step(loss: ox.CertifiedLoss, network: ox.Network, region: ox.Region, labels: Tensor) -> Task:
    def run() -> None:
        network.module.zero_grad(set_to_none=True)
        loss(network, region, labels).total.backward()

    return run
