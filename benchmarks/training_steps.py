"""Training steps: the loss of every relaxation, LP layers in the loop included, side by side on one network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from benchmarks.measuring import Task, interleaved
from benchmarks.networks import Trained
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.data.datasets import load_dataset
from optrelax.training.loss_terms import LossTerms
from optrelax.training.recipes import recipe

TITLE = "Training steps: 784-100-100-10, batch 100, the losses of the recipes"
NAMES = ("box", "crown-ibp", "hbox", "deepz", "crown", "triangle", "layerwise")

_EPS, _CLIP, _IMAGES = 0.1, (0.0, 1.0), 100
_LP = {"triangle": 2.0, "layerwise": 20.0}
"""A step may take this many of CROWN's."""


def run(options: Options) -> Report:
    """One table a network: random weights, trained naturally, trained by Box."""
    facts = environment(options)
    tables, bars = [], []
    epochs = {"natural": 1, "box": 2} if options.quick else {"natural": 3, "box": 10}
    for method in (None, *epochs):
        name = "random weights" if method is None else f"trained by {method}"
        net = _network(method, epochs, options)
        table = _table(name, net, options)
        tables.append(table)
        rows = {row["loss"]: row for row in table.rows}
        bars += [Bar(f"{name}: {lp} step, times CROWN's", most, None, rows[lp]["/ crown"]) for lp, most in _LP.items()]
        bars.append(Bar(f"{name}: triangle, median relative gap", 1e-3, None, rows["triangle"]["median gap"]))
    return Report("training_steps", TITLE, options, tables, bars, facts)


def _network(method: str | None, epochs: dict[str, int], options: Options) -> nn.Module:
    if method is not None:
        return Trained("fc-small", method, epochs[method], options.seed).network(options).to(options.device)
    data = load_dataset(options.data, options.data_dir)
    return ox.models.build("fc-small", data.input_shape, data.classes, options.seed).to(options.device)


def _table(name: str, net: nn.Module, options: Options) -> Table:
    images = load_dataset(options.data, options.data_dir, split="train").subset(6 if options.quick else _IMAGES)
    x, labels = images.images.to(options.device), images.labels.to(options.device)
    losses = {loss: recipe(f"{options.data}-fc-small-{loss}").loss() for loss in NAMES}
    network = ox.capture(net, x.shape[1:])  # once, as `train` does
    tasks: dict[str, Task] = {"own step": own_step(net, x, labels)}
    tasks |= {loss: step(network, call, x, labels) for loss, call in losses.items()}
    timed = interleaved(tasks, runs=options.runs, device=options.device)
    rows = []
    for loss, call in losses.items():
        solved = _terms(network, call, x, labels).solved
        rows.append(_row(loss, timed.median(loss), timed.ratio(loss, "crown"), timed.ratio(loss, "own step"), solved))
    return Table(
        title=f"{name}, {len(labels)} images",
        keys=("loss",),
        rows=rows,
        smaller=("/ crown", "/ own step"),
        notes=(
            f"A step is the loss at eps {_EPS}, forward and backward; {options.data}, evenly spaced training images. "
            "LP layers have the recipes' budget and gap target, and start afresh.",
        ),
    )


def _row(loss: str, seconds: float, crown: float, own: float, solved: Any) -> Row:
    gaps = None if solved is None else float(solved.gaps.double().quantile(0.5, interpolation="higher"))
    open_ = None if solved is None else 100 * float(solved.unfinished.double().mean())
    return {
        "loss": loss,
        "step ms": 1e3 * seconds,
        "/ crown": crown,
        "/ own step": own,
        "median gap": gaps,
        "unfinished %": open_,
    }


def _terms(net: ox.Network, loss: Callable[..., LossTerms], x: Tensor, labels: Tensor, eps: float = _EPS) -> LossTerms:
    return loss(net, ox.LinfBall(x, eps, _CLIP), labels)


def step(net: ox.Network, loss: Callable[..., LossTerms], x: Tensor, labels: Tensor, eps: float = _EPS) -> Task:
    """The loss and its gradient."""

    def run() -> None:
        net.module.zero_grad(set_to_none=True)
        _terms(net, loss, x, labels, eps).total.backward()

    return run


def own_step(net: nn.Module, x: Tensor, labels: Tensor) -> Task:
    """The network's own cross-entropy and its gradient."""

    def run() -> None:
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), labels).backward()

    return run
