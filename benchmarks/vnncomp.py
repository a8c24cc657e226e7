"""Properties of VNN-COMP 2021 by relaxations alone: how many each decides, in what time, and that none contradicts."""

from __future__ import annotations

import csv
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.certification.property_files import read_property
from optrelax.certification.property_verdicts import PropertyVerdict
from optrelax.certification.verifying import verify
from optrelax.networks.checkpoints import load
from optrelax.networks.graph import Network

TITLE = "VNN-COMP 2021: properties decided by one relaxation, without branching"

# How many instances of each benchmark: all of them but where a relaxation or the attack is dear, evenly spaced then.
_WHOLE = {"acasxu": 186, "mnistfc": 90, "oval21": 30, "cifar10_resnet": 48}
_DENSE = {name: _WHOLE[name] for name in ("acasxu", "mnistfc")}
_SHARE: dict[str, dict[str, int]] = {
    "box": _WHOLE,
    "crown-ibp": _WHOLE,
    "deepz": _DENSE,
    "triangle": _DENSE,
    "layerwise": {"acasxu": 186},
    "crown": _WHOLE,
    "alpha-crown": {"acasxu": 62},
    "attack": {"acasxu": 48, "mnistfc": 30, "oval21": 10, "cifar10_resnet": 12},
}
_QUICK = {"attack": {"acasxu": 2}, "crown": {"acasxu": 2}}


def run(options: Options) -> Report:
    """Every relaxation on its share of each benchmark; stored after each, where the options name a folder."""
    if options.data_dir is None:
        raise ValueError("vnncomp: --data-dir or OPTRELAX_DATA must name the folder that holds vnncomp2021")
    folder = Path(options.data_dir) / "vnncomp2021"
    with (folder / "instances.csv").open(newline="") as file:
        instances = list(csv.DictReader(file))
    rows: list[Row] = []
    facts = environment(options)
    for row in _rows(folder, instances, _QUICK if options.quick else _SHARE):
        rows.append(row)
        if options.out is not None:  # what a run has found that is stopped is not lost
            _report(rows, options, facts).write(Path(options.out))
    return _report(rows, options, facts)


def _report(rows: Sequence[Row], options: Options, facts: Mapping[str, Any]) -> Report:
    table = Table(
        title="Decided properties",
        keys=("benchmark", "relaxation"),
        rows=rows,
        greater=("holds", "violated"),
        notes=(
            "Bounds in float64, rounded outward; times start from captured networks and read properties, but those of "
            "the attack, behind box, from the file, as the onnx package replays its counterexamples. `of holds`, "
            "`of violated`, `of unknown`: instances of each verdict of the competition's tools (unknown: none of them "
            "decided it, or they disagree) among those taken, which are evenly spaced where fewer than all. "
            "`contradicts`: verdicts against theirs.",
        ),
    )
    wrong = sum(row["contradicts"] for row in rows)
    bars = (Bar("verdicts that contradict instances.csv", 0.0, None, float(wrong)),)
    return Report("vnncomp2021", TITLE, options, [table], bars, facts)


def _rows(folder: Path, instances: list[dict[str, str]], share: dict[str, dict[str, int]]) -> Iterator[Row]:
    for name, parts in share.items():
        for benchmark, most in parts.items():
            every = [i for i in instances if i["benchmark"] == benchmark]
            count = min(most, len(every))
            chosen = [every[k * (len(every) - 1) // max(1, count - 1)] for k in range(count)]
            yield _row(folder, benchmark, name, chosen)


def _row(folder: Path, benchmark: str, name: str, instances: list[dict[str, str]]) -> Row:
    found = [_verdict(folder / benchmark, i, name) for i in instances]
    truths = [i["verdict"] for i in instances]
    pairs = list(zip(truths, found, strict=True))
    settled = [(truth, v) for truth, v in pairs if truth in ("holds", "violated")]
    return {
        "benchmark": benchmark,
        "relaxation": name,
        "instances": len(found),
        "holds": sum(v.status == "holds" for v in found),
        "of holds": truths.count("holds"),
        "violated": sum(v.status == "violated" for v in found),
        "of violated": truths.count("violated"),
        "of unknown": len(found) - len(settled),
        "contradicts": sum(v.status not in ("unknown", truth) for truth, v in settled),
        "median s": statistics.median(v.seconds for v in found),
        "all s": sum(v.seconds for v in found),
    }


def _verdict(folder: Path, instance: dict[str, str], name: str) -> PropertyVerdict:
    """By one relaxation, or by the attack behind the cheapest."""
    prop = read_property(folder / instance["property"])
    if name == "attack":
        return verify(folder / instance["network"], prop, "box")
    return verify(_network(folder / instance["network"]), prop, name, attack=False)


@functools.lru_cache(maxsize=64)
def _network(path: Path) -> Network:
    """Captured once."""
    return load(path)
