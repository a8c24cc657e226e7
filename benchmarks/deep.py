"""Deep convolutional and residual networks: CROWN by windows against whole rows, and against auto_LiRPA where given."""

from __future__ import annotations

import unittest.mock
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import optrelax as ox
from benchmarks import peers
from benchmarks.measuring import interleaved, peak_bytes
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.data.datasets import normalization
from optrelax.domains import frames, interval
from optrelax.domains.passes import planning
from optrelax.training.runs import start_from

TITLE = "Deep convolutional and residual networks: CROWN"
CIFAR = (3, 32, 32)
_EQUAL = 1e-4


@dataclass(frozen=True, slots=True)
class _Case:
    """A network at CIFAR's shape; step: forward and backward, else forward alone.

    Its weights are random, or those of a stored run, whose images are the test set's first.
    """

    network: str
    build: Callable[[int], nn.Module]
    batch: int
    eps: float
    step: bool = False
    at_least: float = 2.0
    """Bar: how often faster than auto_LiRPA."""
    trained: bool = False

    @property
    def relaxation(self) -> str:
        """auto_LiRPA bounds neurons of certified networks as this does: those alone that intervals leave crossing."""
        return "box+crown" if self.trained else "crown"


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


_TRAINED = _Case("cnn7, width 16, trained", _cnn7, 2, 2 / 255, step=True, at_least=4.0, trained=True)
_BATCHES = tuple(_Case("cnn7, width 16", _cnn7, batch, 2 / 255, step=True) for batch in (1, 2, 4, 8))
_EVERY = (*_CASES, _TRAINED, *_BATCHES)
_LINEAR = 1.25
"""Bar: cost of an example in the greatest batch, as a share of its cost alone."""
_WAYS = ("windows", "whole rows", "auto_LiRPA")
_PEER = "auto_LiRPA / windows"


def run(options: Options) -> Report:
    """Every network by windows, by whole rows where that is no matter of minutes, and by auto_LiRPA where given."""
    cases = _CASES[1:2] if options.quick else _cases(options)
    machine = environment(options)
    theirs = peers.auto_lirpa_version()
    rows = [_row(case, options) for case in cases]
    table = Table(
        title="CROWN, seconds",
        keys=("network", "batch", "what"),
        rows=rows,
        greater=("whole rows / windows",),
        notes=(
            "Random weights of the default initialisation, or a stored run's with its batch norms in the convolutions, "
            "on the first test images; 9 margins an image. Medians of rounds side by side; whole rows for forward "
            f"passes alone. Bounds differ by at most {_EQUAL} of 1 + |bound|, or the run fails; the trained network's, "
            "by box+crown, may exceed auto_LiRPA's. Rows: share of hidden neurons that are bounded by rows. Peak "
            "memory of a second call in a process of its own.",
            f"auto_LiRPA {theirs if options.auto_lirpa else 'was not given'}; its convolutions as patches.",
        ),
    )
    bars = [
        Bar(f"{case.network}, batch {case.batch}: times faster than auto_LiRPA", None, case.at_least, row[_PEER])
        for case, row in zip(cases, rows, strict=True)
        if row[_PEER] is not None
    ]
    tables = [table]
    if not options.quick:
        tables.append(_growth([_alone(case, options) for case in _BATCHES]))
        first, last = tables[1].rows[0], tables[1].rows[-1]
        for what in ("s an example", "MiB an example"):
            if first[what] is not None and last[what] is not None:
                name = f"cnn7, width 16: {what}, batch {last['batch']} / batch {first['batch']}"
                bars.append(Bar(name, _LINEAR, None, last[what] / first[what]))
    return Report("deep", TITLE, options, tables, bars, machine)


def _growth(rows: list[Row]) -> Table:
    """How a step's cost grows with the batch."""
    return Table(
        title="CROWN step by batch",
        keys=("network", "batch"),
        rows=rows,
        notes=("Time and peak memory of a step by windows, random weights, as above.",),
    )


def _alone(case: _Case, options: Options) -> Row:
    """Time and peak memory of one case by windows."""
    of = _Given.of(case, options.seed, None, None)
    seconds = interleaved({"windows": _ours(of, True)}, runs=options.runs, clock=options.clock).median("windows")
    peak = _peak(case, "windows", options)
    row: Row = {"network": case.network, "batch": case.batch, "s": seconds, "s an example": seconds / case.batch}
    return row | {"MiB": peak, "MiB an example": None if peak is None else peak / case.batch}


def _peak(case: _Case, way: str, options: Options) -> float | None:
    """MiB of a second call in a process of its own."""
    given = {"index": _EVERY.index(case), "way": way, "seed": options.seed}
    stored = {"trained": options.trained, "data_dir": options.data_dir} if case.trained else {}
    found = peak_bytes(build, threads=options.threads, **given, **stored)
    return None if found is None else found / 2**20


def _cases(options: Options) -> tuple[_Case, ...]:
    return _CASES if options.trained is None else (*_CASES, _TRAINED)


@dataclass(frozen=True, slots=True)
class _Given:
    """What all ways are given."""

    case: _Case
    net: nn.Module
    lower: Tensor
    upper: Tensor
    labels: Tensor

    @classmethod
    def of(cls, case: _Case, seed: int, trained: str | None, data_dir: str | None) -> _Given:
        if case.trained:
            assert trained is not None
            net, normalize = _folded(trained)
            x, labels = ox.load_dataset("cifar10", data_dir)[: case.batch]
            return cls(case, net, normalize(x - case.eps), normalize(x + case.eps), labels)
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(case.batch, *CIFAR, generator=generator)
        return cls(case, case.build(seed).eval(), x - case.eps, x + case.eps, torch.arange(case.batch) % 10)

    @property
    def region(self) -> ox.InputBox:
        return ox.InputBox(self.lower, self.upper)

    def bounded(self) -> float:
        """Share of hidden neurons that rows bound, in percent."""
        network = ox.capture(self.net, CIFAR)
        known = interval.exact_nodes(network, self.region)
        with torch.no_grad():
            before = ox.preactivation_bounds(network, self.region, "box")
        wanted = total = 0
        for node in network.activations:
            b = before[node.path]
            total += b.lower.numel()
            if node.inputs[0] not in known:
                crossing = node.op.crossing(b.lower, b.upper)  # type: ignore[union-attr]
                wanted += int(crossing.sum()) if self.case.trained else b.lower.numel()
        return 100 * wanted / total


def _folded(run: str) -> tuple[nn.Module, nn.Module]:
    """A stored CNN7 of width 16 as convolutions alone, which auto_LiRPA takes; and how its images are normalised."""
    net = ox.models.cnn7(width=16, features=128, normalize=normalization("cifar10"))
    start_from(net, run)
    normalize, *layers = net.eval()
    found: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            found[-1] = fuse_conv_bn_eval(found[-1], layer)
        elif isinstance(layer, nn.BatchNorm1d):
            found[-1] = fuse_linear_bn_eval(found[-1], layer)
        else:
            found.append(layer)
    return nn.Sequential(*found).eval(), normalize


def _row(case: _Case, options: Options) -> Row:
    of = _Given.of(case, options.seed, options.trained, options.data_dir)
    ways = {"windows": _ours(of, True)}
    if not case.step:
        ways["whole rows"] = _ours(of, False)
    if options.auto_lirpa is not None:
        ways["auto_LiRPA"] = _theirs(of)
    bounds = {name: way() for name, way in ways.items()}
    for name, other in bounds.items():
        difference = (other - bounds["windows"]) / (1 + other.abs())
        worst = float((difference if case.trained else difference.abs()).max())
        if not worst <= _EQUAL:
            raise RuntimeError(f"{case.network}: bounds of windows and of {name} differ by {worst}")
    samples = interleaved(ways, runs=options.runs, clock=options.clock)
    row: Row = {"network": case.network, "batch": case.batch, "what": "step" if case.step else "forward"}
    row["rows %"] = of.bounded()
    row |= {f"{name} [s]": samples.median(name) if name in ways else None for name in _WAYS}
    for name in _WAYS[1:]:
        row[f"{name} / windows"] = samples.ratio(name, "windows") if name in ways else None
    for name in _WAYS[::2]:
        row[f"{name} [MiB]"] = _peak(case, name, options) if name in ways else None
    return row


def build(
    *, index: int, way: str, seed: int, device: str, trained: str | None = None, data_dir: str | None = None
) -> Callable[[], Tensor]:
    """One call for `peak_bytes`, the first made beforehand: it imports and compiles."""
    of = _Given.of(_EVERY[index], seed, trained, data_dir)
    found = _ours(of, True) if way == "windows" else _theirs(of)
    found()
    return found


def _ours(of: _Given, windows: bool) -> Callable[[], Tensor]:
    network = ox.capture(of.net, CIFAR)

    def run() -> Tensor:
        with ExitStack() as stack:
            # What was planned is kept with the graph: the compiled steps have to be off as well.
            for where, name in () if windows else ((frames, "plan"), (frames, "plan_rows"), (planning, "program")):
                stack.enter_context(unittest.mock.patch.object(where, name, return_value=None))
            stack.enter_context(torch.set_grad_enabled(of.case.step))
            rows = ox.margins(of.labels, 10)
            return _stepped(of.net, ox.lower_bounds(network, of.region, rows, of.case.relaxation), of.case)

    return run


def _theirs(of: _Given) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

        module = BoundedModule(of.net, torch.zeros_like(of.lower[:1]), bound_opts={"conv_mode": "patches"})
    rows = ox.margins(of.labels, 10).to(of.lower)
    perturbation = PerturbationLpNorm(norm=float("inf"), x_L=of.lower, x_U=of.upper)

    def run() -> Tensor:
        with torch.set_grad_enabled(of.case.step):
            given = BoundedTensor((of.lower + of.upper) / 2, perturbation)
            bound, _ = module.compute_bounds(x=(given,), C=rows, method="CROWN", bound_upper=False)
            return _stepped(module, bound, of.case)

    return run


def _stepped(net: nn.Module, bound: Tensor, case: _Case) -> Tensor:
    if case.step:
        net.zero_grad()
        bound.sum().backward()
    return bound.detach()
