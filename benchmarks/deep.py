"""Deep convolutional and residual networks: CROWN by windows against whole rows, and against auto_LiRPA where given."""

from __future__ import annotations

import unittest.mock
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import optrelax as ox
from benchmarks import peers
from benchmarks.measuring import Samples, interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.domains import frames

TITLE = "Deep convolutional and residual networks: CROWN"
CIFAR = (3, 32, 32)
_EQUAL = 1e-4


@dataclass(frozen=True, slots=True)
class _Case:
    """A network at CIFAR's shape with random weights; step: forward and backward, else forward alone."""

    network: str
    build: Callable[[int], nn.Module]
    batch: int
    eps: float
    step: bool = False
    at_least: float = 2.0
    """Bar: how often faster than auto_LiRPA."""


def _stack(*convs: tuple[int, int, int], features: int) -> Callable[[int], nn.Module]:
    """Convolutions (channels, kernel, stride), padded by 1, a hidden layer and ten outputs."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, (out, kernel, stride) in zip([3, *(c for c, _, _ in convs)], convs, strict=False):
            layers += [nn.Conv2d(before, out, kernel, stride, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 100), nn.ReLU(), nn.Linear(100, 10))

    return build


def _cnn7(seed: int) -> nn.Module:
    return ox.models.cnn7(width=16, features=128, batch_norm=False, seed=seed)


def _resnet(seed: int) -> nn.Module:
    return ox.models.resnet(seed=seed)


_BASE = _stack((8, 4, 2), (16, 4, 2), features=1024)
_WIDE = _stack((16, 4, 2), (32, 4, 2), features=2048)
_DEEP = _stack((8, 4, 2), (8, 3, 1), (8, 3, 1), (8, 4, 2), features=512)
NETWORKS = {"cnn7": (_cnn7, 2 / 255), "deep_kw": (_DEEP, 0.004), "resnet": (_resnet, 0.004)}
"""Builders by name, and their eps."""
_CASES = (
    _Case("cnn7, width 16", _cnn7, 2, 2 / 255, step=True, at_least=3.0),
    *(_Case("as cifar_base_kw", _BASE, batch, 0.004) for batch in (1, 10)),
    *(_Case("as cifar_wide_kw", _WIDE, batch, 0.004) for batch in (1, 10)),
    *(_Case("as cifar_deep_kw", _DEEP, batch, 0.004) for batch in (1, 10)),
    *(_Case("as resnet_2b", _resnet, batch, 0.004) for batch in (1, 10)),
)


def run(options: Options) -> Report:
    """Every network by windows, by whole rows where that is no matter of minutes, and by auto_LiRPA where given."""
    cases = _CASES[1:2] if options.quick else _CASES
    machine = environment(options)
    theirs = peers.auto_lirpa_version()
    rows = [_row(case, options) for case in cases]
    table = Table(
        title="CROWN, seconds",
        keys=("network", "batch", "what"),
        rows=rows,
        greater=("whole rows / windows",),
        notes=(
            "Random weights of the default initialisation, 9 margins an image. Medians of rounds side by side; whole "
            f"rows for forward passes alone. Bounds differ by at most {_EQUAL} of 1 + |bound|, or the run fails.",
            f"auto_LiRPA {theirs if options.auto_lirpa else 'was not given'}; its convolutions as patches.",
        ),
    )
    bars = [
        Bar(f"{case.network}, batch {case.batch}: times faster than auto_LiRPA", None, case.at_least, row[_PEER])
        for case, row in zip(cases, rows, strict=True)
        if row[_PEER] is not None
    ]
    return Report("deep", TITLE, options, [table], bars, machine)


_PEER = "auto_LiRPA / windows"


def _row(case: _Case, options: Options) -> Row:
    net = case.build(options.seed).eval()
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.rand(case.batch, *CIFAR, generator=generator)
    labels = torch.arange(case.batch) % 10
    tasks = {"windows": _ours(net, x, labels, case, True)}
    if not case.step:
        tasks["whole rows"] = _ours(net, x, labels, case, False)
    if options.auto_lirpa is not None:
        tasks["auto_LiRPA"] = _theirs(net, x, labels, case)
    bounds = [task() for task in tasks.values()]
    for other in bounds[1:]:
        difference = float(((other - bounds[0]).abs() / (1 + bounds[0].abs())).max())
        if not difference <= _EQUAL:
            raise RuntimeError(f"{case.network}: bounds differ by {difference}")
    samples = interleaved(tasks, runs=options.runs)
    row: Row = {"network": case.network, "batch": case.batch, "what": "step" if case.step else "forward"}
    row |= {f"{name} [s]": _median(samples, name) for name in ("windows", "whole rows", "auto_LiRPA")}
    for name in ("whole rows", "auto_LiRPA"):
        row[f"{name} / windows"] = samples.ratio(name, "windows") if name in samples.seconds else None
    return row


def _median(samples: Samples, name: str) -> float | None:
    return samples.median(name) if name in samples.seconds else None


def _ours(net: nn.Module, x: Tensor, labels: Tensor, case: _Case, windows: bool) -> Callable[[], Tensor]:
    network = ox.capture(net, CIFAR)

    def run() -> Tensor:
        off = unittest.mock.patch.object
        with (
            nullcontext() if windows else off(frames, "plan", lambda *_: None),
            nullcontext() if windows else off(frames, "plan_rows", lambda *_: None),
            torch.set_grad_enabled(case.step),
        ):
            return _stepped(
                net, ox.lower_bounds(network, ox.LinfBall(x, case.eps), ox.margins(labels, 10), "crown"), case
            )

    return run


def _theirs(net: nn.Module, x: Tensor, labels: Tensor, case: _Case) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

        module = BoundedModule(net, torch.zeros_like(x[:1]), bound_opts={"conv_mode": "patches"})
    rows = ox.margins(labels, 10).to(x)

    def run() -> Tensor:
        with torch.set_grad_enabled(case.step):
            given = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=case.eps))
            bound, _ = module.compute_bounds(x=(given,), C=rows, method="CROWN", bound_upper=False)
            return _stepped(module, bound, case)

    return run


def _stepped(net: nn.Module, bound: Tensor, case: _Case) -> Tensor:
    if case.step:
        net.zero_grad()
        bound.sum().backward()
    return bound.detach()
