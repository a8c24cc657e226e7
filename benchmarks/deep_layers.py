"""LP layers on deep networks: LP-LAST beside its pre-activation bounds, LP-ALL beside HiGHS one LP at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import optrelax as ox
from benchmarks import deep
from benchmarks.lp_references import program
from benchmarks.measuring import interleaved
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from optrelax.certification.property_files import read_property
from optrelax.data.datasets import normalization
from optrelax.data.splits import evenly_spaced
from optrelax.layers import DualAscent, Highs, Layerwise, Solution, Triangle
from optrelax.layers.affine_maps import AffineMaps
from optrelax.networks.checkpoints import load
from optrelax.networks.graph import Network
from optrelax.relaxations import Preactivation, identity_rows
from optrelax.training.runs import start_from

TITLE = "LP layers on deep networks"
_BOUNDS = ("box", "crown-ibp", "box+crown")
_TOL = 1e-3
_TIMES = 3.0
"""Bar: LPs, in times of their pre-activation bounds."""
_SAMPLE, _PATIENCE = 20, 40.0  # LPs of HiGHS an image, and the seconds after which no further one begins


def run(options: Options) -> Report:
    """Both tables; LP-ALL where the properties of VNN-COMP are."""
    facts = environment(options)
    last = [row for case in _cases(options) for row in _last(case, options)]
    bars = [
        Bar(f"{row['network']}, {row['bounds']}: LPs / their bounds", _TIMES, None, row["LPs / bounds"]) for row in last
    ]
    tables = [_last_table(last)]
    if options.data_dir is not None:
        tables.append(_whole_table(list(_whole(Path(options.data_dir), options))))
    return Report("deep_layers", TITLE, options, tables, bars, facts)


# --- LP-LAST ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Images:
    """A network and its images."""

    name: str
    net: nn.Module
    x: Tensor
    labels: Tensor
    eps: float


def _cases(options: Options) -> Iterator[_Images]:
    """CNN7 and a ResNet of random weights on noise; a stored CNN7 on the first test images."""
    builders: dict[str, tuple[Callable[[int], nn.Module], float, int]] = {
        "cnn7, width 16": (*deep.NETWORKS["cnn7"], 4),
        "cnn7, width 64": (lambda seed: ox.models.cnn7(batch_norm=False, seed=seed), 2 / 255, 1),
        "as resnet_2b": (*deep.NETWORKS["resnet"], 4),
    }
    for name, (build, eps, count) in builders.items():
        if options.quick and name != "as resnet_2b":
            continue
        count = 1 if options.quick else count
        x = torch.rand(count, *deep.CIFAR, generator=torch.Generator().manual_seed(options.seed))
        yield _Images(name, build(options.seed).eval(), x, torch.arange(count) % 10, eps)
    if options.trained is not None:
        net = ox.models.cnn7(width=16, features=128, normalize=normalization("cifar10"))
        start_from(net, options.trained)
        yield _Images("cnn7, width 16, trained", net.eval(), *ox.load_dataset("cifar10", options.data_dir)[:4], 2 / 255)


def _last(case: _Images, options: Options) -> Iterator[Row]:
    """Time of the bounds, and of the LPs on them, by each kind of bounds."""
    network, region = ox.capture(case.net, deep.CIFAR), ox.LinfBall(case.x, case.eps, (0.0, 1.0))
    rows, count = ox.margins(case.labels, 10), len(case.x)
    for name in _BOUNDS:
        layer = Triangle(preactivation=name, solver=DualAscent(tol=_TOL))

        def bounds(name: str = name) -> Preactivation:
            with torch.no_grad():
                return ox.preactivation_bounds(network, region, name)

        def both(layer: Triangle = layer) -> Solution:
            with torch.no_grad():
                return layer.solve(network, region, rows)

        found = both()
        timed = interleaved({"bounds": bounds, "both": both}, runs=options.runs, clock=options.clock)
        crossing = sum(int(((b.lower < 0) & (b.upper > 0)).sum()) for b in bounds().values())
        before, whole = timed.median("bounds"), timed.median("both")
        yield {
            "network": case.name,
            "bounds": name,
            "images": count,
            "crossing": crossing / count,
            "bounds ms": 1e3 * before / count,
            "LPs ms": 1e3 * (whole - before) / count,
            "LPs / bounds": timed.ratio("both", "bounds") - 1,
            "iterations": float(found.iterations.double().mean()),
            "worst gap": _worst(found),
        }


def _worst(found: Solution) -> float:
    return float((found.gap / found.lower.abs().clamp_min(1)).max())


def _last_table(rows: list[Row]) -> Table:
    return Table(
        title="LP-LAST",
        keys=("network", "bounds"),
        rows=rows,
        smaller=("LPs / bounds",),
        notes=(
            f"9 margins an image, relative gap {_TOL:g}; milliseconds an image, the LPs without their bounds. "
            "Intervals take two products a layer, and crown-ibp's pre-activation bounds are these; a sweep of 9 rows "
            "takes nine, and an LP's value and its feasible point take a sweep each: on interval bounds the least is 9 "
            "times these, whatever the solver. Iterations: of two sweeps each, on average; beside them come three at "
            "the start, two at the end, and one for every fourth iteration.",
        ),
    )


# --- LP-ALL -------------------------------------------------------------------------------------------------------


def _whole(folder: Path, options: Options) -> Iterator[Row]:
    """Properties of cifar_base_kw, evenly spaced by eps: the whole network here, some of its LPs by HiGHS."""
    place = folder / "vnncomp2021" / "oval21"
    network = load(place / "cifar_base_kw.onnx")
    files = sorted(place.glob("cifar_base_kw-*.vnnlib*"), key=lambda file: _eps(file.name))
    for i in evenly_spaced(len(files), 1 if options.quick else 4).tolist():
        (case,) = read_property(files[i]).cases
        lower, upper = (end.reshape(1, *network.input_shape) for end in case.outer(torch.float32))
        region = ox.InputBox(lower, upper)
        with torch.no_grad():
            rows = ox.margins(network(region.center).argmax(1), network.outputs)
        yield {"eps": _eps(files[i].name)} | _beside_highs(network, region, rows, options)


def _eps(name: str) -> float:
    return float(name.split("-eps")[1].split(".vnnlib")[0])


def _beside_highs(network: Network, region: ox.InputBox, rows: Tensor, options: Options) -> Row:
    layer = Layerwise(preactivation=ox.Crown(), solver=DualAscent())

    def solve() -> Solution:
        with torch.no_grad():
            return layer.solve(network, region, rows)

    found = solve()
    seconds = interleaved({"ours": solve}, runs=min(options.runs, 3), clock=options.clock).median("ours")
    with torch.no_grad():
        asked = _asked(network, ox.Crown().preactivation_bounds(network, region), rows)
    assert found.preactivation is not None
    exact, box = copy.deepcopy(network).double(), ox.InputBox(region.lower.double(), region.upper.double())
    bounds = {n: ox.Bounds(b.lower.double(), b.upper.double()) for n, b in found.preactivation.items()}
    maps, times, begin = AffineMaps(exact), [], time.monotonic()
    for i in evenly_spaced(len(asked), min(len(asked), 2 if options.quick else _SAMPLE)).tolist():
        if times and time.monotonic() - begin > _PATIENCE:
            break
        target, row = asked[i]
        lp = program(exact, box, bounds, 0, row[None].double(), maps, target)
        start = options.clock()
        lp.solve(Highs(workers=1))
        times.append(options.clock() - start)
    each = sum(times) / len(times)
    return {
        "LPs": len(asked),
        "s": seconds,
        "worst gap": _worst(found),
        "HiGHS: LPs timed": len(times),
        "HiGHS: s an LP": each,
        "HiGHS: s": each * len(asked),
        "x HiGHS": each * len(asked) / seconds,
    }


def _asked(network: Network, before: Preactivation, rows: Tensor) -> list[tuple[str, Tensor]]:
    """Every LP of the network in order: the node whose values it bounds, and its objective."""
    found: list[tuple[str, Tensor]] = []
    for node in network.activations:
        source, b = node.inputs[0], before[node.name]
        crossing = ((b.lower < 0) & (b.upper > 0)).flatten().nonzero()[:, 0]
        if source in network.exact_intervals:
            continue
        eye = identity_rows(network.shape_of(source), b.lower)[0][crossing]
        found += [(source, row) for pair in zip(eye, -eye, strict=True) for row in pair]
    return found + [(network.output, row) for row in rows[0]]


def _whole_table(rows: list[Row]) -> Table:
    return Table(
        title="LP-ALL of cifar_base_kw",
        keys=("eps",),
        rows=rows,
        greater=("x HiGHS",),
        notes=(
            "Properties of VNN-COMP 2021 (oval21), evenly spaced by eps: one image each, two LPs a neuron that crosses "
            "under CROWN's bounds, layer by layer, then 9 margins; seconds an image in float32, forward, CROWN's "
            f"bounds included. HiGHS: {_SAMPLE} of these LPs evenly spaced (none begins after {_PATIENCE:.0f} s), each "
            "from scratch in float64 on the bounds found here; HiGHS s: their mean for all LPs.",
        ),
    )
