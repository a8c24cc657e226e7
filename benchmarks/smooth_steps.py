"""Steps of smooth activations: what a training step costs with tanh, sigmoid or GELU in place of ReLU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import optrelax as ox
from benchmarks.measuring import Task, interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment

TITLE = "Steps of smooth activations: FC (784-400-200-100-100-10), random weights and images"

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
_RELAXATIONS = ("box", "crown-ibp", "crown")
_WIDTHS = (784, 400, 200, 100, 100, 10)
_MOST = 2.0
"""Times the step with ReLU that one with tanh may take, by box and crown."""


def run(options: Options) -> Report:
    """One table; bars for tanh."""
    facts = environment(options)
    batch, widths = (4, (20, 8, 5)) if options.quick else (100, _WIDTHS)
    g = torch.Generator().manual_seed(options.seed)
    x, labels = torch.rand(batch, widths[0], generator=g), torch.randint(widths[-1], (batch,), generator=g)
    rows = [row for relaxation in _RELAXATIONS for row in _steps(relaxation, widths, x, labels, options)]
    bars = [
        Bar(f"{row['relaxation']}: step with tanh / with relu", _MOST, None, row["/ relu"])
        for row in rows
        if row["activation"] == "tanh" and row["relaxation"] != "crown-ibp"
    ]
    note = "Forward and backward of the certified loss in a ball of 0.01 cut to the range of pixels, interleaved."
    title = f"The certified loss, batch {batch}"
    table = Table(title=title, keys=("relaxation", "activation"), rows=rows, smaller=("/ relu",), notes=(note,))
    return Report("smooth_steps", TITLE, options, [table], bars, facts)


def _steps(relaxation: str, widths: tuple[int, ...], x: Tensor, labels: Tensor, options: Options) -> list[Row]:
    loss = ox.CertifiedLoss(relaxation)
    tasks = {name: _step(loss, _network(kind, widths, options.seed), x, labels) for name, kind in _ACTIVATIONS.items()}
    timed = interleaved(tasks, runs=options.runs, clock=options.clock)
    return [
        {
            "relaxation": relaxation,
            "activation": name,
            "step ms": 1e3 * timed.median(name),
            "spread": timed.spread(name),
            "/ relu": timed.ratio(name, "relu"),
        }
        for name in tasks
    ]


def _network(activation: type[nn.Module], widths: tuple[int, ...], seed: int) -> ox.Network:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), activation()]
    return ox.capture(nn.Sequential(*layers[:-1]), (widths[0],))


def _step(loss: ox.CertifiedLoss, network: ox.Network, x: Tensor, labels: Tensor) -> Task:
    region = ox.LinfBall(x, 0.01, (0.0, 1.0))

    def run() -> None:
        network.module.zero_grad(set_to_none=True)
        loss(network, region, labels).total.backward()

    return run
