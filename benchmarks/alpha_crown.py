"""alpha-CROWN against auto_LiRPA's at equal bound: the iterations and the time that ours takes to reach theirs."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.closed_forms import CLIP, EPS, Case, case
from benchmarks.measuring import interleaved
from benchmarks.reports import Options, Report, Row, Table, environment
from optrelax.layers import AlphaCrown

TITLE = "alpha-CROWN: time to equal bounds"

_NETWORKS = {"FC-SMALL": ("fc-small", 10), "CONV": ("conv", 10)}
_QUICK = {"FC-SMALL": ("fc-small", 2)}
_LADDER = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
_ALONE = 20  # our iterations where there is nothing to compare with
_THEIRS = {"own slopes": False, "slopes of all layers": True}
"""What auto_LiRPA optimises (20 iterations, its defaults): those of the rows, or of intermediate bounds too."""


def run(options: Options) -> Report:
    """Every network against both of auto_LiRPA's settings."""
    facts = environment(options)
    rows: list[Row] = []
    for label, (model, batch) in (_QUICK if options.quick else _NETWORKS).items():
        of = case(model, batch, options.seed, options.device)
        settings = _THEIRS if peers.has_auto_lirpa() else {"not installed": None}
        rows += [
            {"network": label, "batch": batch} | _row(of, name, every, options) for name, every in settings.items()
        ]
    table = Table(
        title="alpha-CROWN at equal bound",
        keys=("network", "auto_LiRPA"),
        rows=rows,
        greater=("speed-up",),
        notes=(
            f"Bounds are means over the margins of all examples, eps {EPS}, random weights; without gradients. Ours "
            "takes the least number of iterations that reaches auto_LiRPA's mean bound; `-` where none does.",
        ),
    )
    return Report("alpha_crown", TITLE, options, [table], (), facts)


def _row(of: Case, name: str, every: bool | None, options: Options) -> Row:
    wanted, tasks = None, {}
    if every is not None:
        lower = peers.auto_lirpa(of.network.module, of.x, EPS, CLIP, "CROWN-Optimized", every_layer=every)
        wanted = float(lower(of.labels).detach().mean())
        tasks["theirs"] = lambda: lower(of.labels)
    iterations, mean = _reach(of, wanted)
    ours = AlphaCrown(iterations=_LADDER[-1] if iterations is None else iterations)
    tasks["ours"] = lambda: of.forward(ours)
    timed = interleaved(tasks, runs=options.runs, device=of.device)
    reached = wanted is not None and iterations is not None
    return {
        "auto_LiRPA": name,
        "their bound": wanted,
        "our bound": mean,
        "our iterations": iterations,
        "their ms": None if wanted is None else 1e3 * timed.median("theirs"),
        "our ms": 1e3 * timed.median("ours"),
        "speed-up": timed.ratio("theirs", "ours") if reached else None,
    }


def _reach(of: Case, wanted: float | None) -> tuple[int | None, float]:
    """The least number of iterations to a mean bound, and the bound; None where the longest search falls short."""
    best = float("nan")
    for iterations in _LADDER if wanted is not None else (_ALONE,):
        with torch.no_grad():
            best = float(of.margins(AlphaCrown(iterations=iterations)).mean())
        if wanted is None or best >= wanted:
            return iterations, best
    return None, best
