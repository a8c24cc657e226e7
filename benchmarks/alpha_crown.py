"""alpha-CROWN against auto_LiRPA's at equal bound: the iterations and the time that ours takes to reach theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import optrelax as ox
from benchmarks import deep, peers
from benchmarks.closed_forms import CLIP, EPS, case
from benchmarks.measuring import Task, interleaved, peak_bytes
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.layers import AlphaCrown

TITLE = "alpha-CROWN: time to equal bounds"

_NETWORKS = {
    "FC-SMALL": ("fc-small", 10),
    "CONV": ("conv", 10),
    "cnn7, width 16": ("cnn7", 1),
    "as cifar_deep_kw": ("deep_kw", 1),
    "as resnet_2b": ("resnet", 1),
}
_UNFINISHED = ("cnn7, width 16",)
"""Of these ours are timed alone: a call of auto_LiRPA 0.7.1 takes minutes and gigabytes."""
_QUICK = {"FC-SMALL": ("fc-small", 2)}
_LADDER = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 32, 48, 96)
_ALONE = 20  # our iterations where there is nothing to compare with
_AT_LEAST = 3.0
_EQUAL = 1e-5
"""Bounds that differ by less, of max(1, |bound|), are equal: both are float32."""


@dataclass(frozen=True, slots=True)
class _Margins:
    """The margins of some random images under a network with random weights."""

    network: ox.Network
    region: ox.LinfBall
    x: Tensor
    labels: Tensor
    eps: float
    clip: tuple[float, float]

    def ours(self, relaxation: AlphaCrown) -> Tensor:
        """Lower bounds, without gradients."""
        with torch.no_grad():
            return ox.lower_bounds(self.network, self.region, ox.margins(self.labels, 10), relaxation)

    def theirs(self) -> Callable[[], Tensor]:
        """The same by auto_LiRPA's alpha-CROWN at its defaults."""
        lower = peers.auto_lirpa(self.network.module, self.x, self.eps, self.clip, "CROWN-Optimized")
        return lambda: lower(self.labels).detach()


def margins(model: str, batch: int, seed: int, device: str) -> _Margins:
    """At MNIST's shape as the other suites have them, at CIFAR's as `deep` has."""
    if model in deep.NETWORKS:
        build, eps = deep.NETWORKS[model]
        network = ox.capture(build(seed).eval().to(device), deep.CIFAR)
        x = torch.rand(batch, *deep.CIFAR, generator=torch.Generator().manual_seed(seed)).to(device)
        labels, clip = torch.arange(batch, device=device) % 10, (-1.0, 2.0)
    else:
        of = case(model, batch, seed, device)
        network, x, labels, eps, clip = of.network, of.x, of.labels, EPS, CLIP
    return _Margins(network, ox.LinfBall(x, eps, clip), x, labels, eps, clip)


def run(options: Options) -> Report:
    """Every network, beside auto_LiRPA where it can be imported."""
    facts = environment(options)
    rows: list[Row] = []
    for label, (model, batch) in (_QUICK if options.quick else _NETWORKS).items():
        beside = peers.has_auto_lirpa() and label not in _UNFINISHED
        rows.append({"network": label, "batch": batch} | _row(model, batch, options, beside))
    table = Table(
        title="alpha-CROWN at equal bound",
        keys=("network", "batch"),
        rows=rows,
        greater=("speed-up",),
        notes=(
            f"Bounds are means over the margins of all examples; random weights; eps {EPS} at MNIST's shape, 2/255 of "
            "cnn7, else 0.004; without gradients. auto_LiRPA takes its 20 iterations; ours the least number that "
            f"reaches its mean bound to {_EQUAL:g}; `-` where none does. Memory: a call's peak in its own process. "
            f"{_UNFINISHED[0]}: not asked of auto_LiRPA, for its time; ours takes {_ALONE} iterations.",
        ),
    )
    bars = [
        Bar(f"{row['network']}: times faster than auto_LiRPA", None, _AT_LEAST, row["speed-up"])
        for row in rows
        if row["speed-up"] is not None
    ]
    return Report("alpha_crown", TITLE, options, [table], bars, facts)


def _row(model: str, batch: int, options: Options, beside: bool) -> Row:
    of = margins(model, batch, options.seed, options.device)
    wanted, tasks = None, {}
    if beside:
        theirs = of.theirs()
        wanted = float(theirs().mean())
        tasks["theirs"] = theirs
    iterations, mean = _reach(of, wanted)
    ours = AlphaCrown(iterations=_LADDER[-1] if iterations is None else iterations)
    tasks["ours"] = lambda: of.ours(ours)
    timed = interleaved(tasks, runs=options.runs, device=of.x.device.type, clock=options.clock)
    given = {"model": model, "batch": batch, "seed": options.seed}

    def peak(iterations: int | None) -> float | None:
        found = peak_bytes(build, threads=options.threads, device=options.device, iterations=iterations, **given)
        return None if found is None else found / 2**20

    reached = wanted is not None and iterations is not None
    return {
        "auto_LiRPA": peers.auto_lirpa_version() or "not installed",
        "their bound": wanted,
        "our bound": mean,
        "our iterations": iterations,
        "their s": None if wanted is None else timed.median("theirs"),
        "our s": timed.median("ours"),
        "speed-up": timed.ratio("theirs", "ours") if reached else None,
        "their MiB": None if wanted is None else peak(None),
        "our MiB": peak(ours.iterations),
    }


def build(*, model: str, batch: int, seed: int, device: str, iterations: int | None) -> Task:
    """One call of ours, or with None for iterations of auto_LiRPA's, for `peak_bytes`."""
    of = margins(model, batch, seed, device)
    return of.theirs() if iterations is None else lambda: of.ours(AlphaCrown(iterations=iterations))


def _reach(of: _Margins, wanted: float | None) -> tuple[int | None, float]:
    """The least number of iterations to a mean bound, and the bound; None where the longest search falls short."""
    best = float("nan")
    for iterations in _LADDER if wanted is not None else (_ALONE,):
        best = float(of.ours(AlphaCrown(iterations=iterations)).mean())
        if wanted is None or best >= wanted - _EQUAL * max(1.0, abs(wanted)):
            return iterations, best
    return None, best
