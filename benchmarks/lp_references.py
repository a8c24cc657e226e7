"""What the LP layers are measured against: HiGHS and cvxpylayers on the exported LP of each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.lp_cases import Case
from benchmarks.reports import Options
from optrelax.enclosures import Bounds
from optrelax.layers import Cvxpy, Highs, LinearProgram, Status
from optrelax.layers.affine_maps import AffineMaps
from optrelax.layers.network_lp import NetworkLP, export
from optrelax.networks.graph import Network
from optrelax.output.files import read_tensors, write_tensors
from optrelax.regions import InputBox
from optrelax.relaxations import Preactivation, identity_rows

Array = np.ndarray


@dataclass(frozen=True)
class Program:
    """The exported LP of one image and its objectives."""

    lp: NetworkLP
    costs: Array
    offsets: Array

    def solve(self, solver: Highs, objectives: slice = slice(None)) -> Array:
        """Optimal values by HiGHS; one model, each objective from the last one's basis."""
        lp = self.lp
        sides = (lp.row_lower, lp.row_upper, lp.col_lower, lp.col_upper)
        found = solver.solve_sparse(self.costs[objectives], lp.matrix, *sides)
        if (found.status != Status.OPTIMAL).any():
            raise RuntimeError(f"HiGHS did not solve a triangle LP, which has an optimum: statuses {found.status}")
        values: Array = found.objective + self.offsets[objectives]
        return values


def programs(case: Case) -> list[Program]:
    """The LP of every image."""
    maps = AffineMaps(case.network)
    return [program(case.network, case.region, case.preactivation, i, case.rows[i], maps) for i in range(len(case))]


def program(
    network: Network,
    region: InputBox,
    preactivation: Preactivation,
    image: int,
    rows: Tensor,
    maps: AffineMaps,
    target: str | None = None,
) -> Program:
    """The LP of one image, with rows [k, *shape] of a node (default the output) as objectives."""
    one = slice(image, image + 1)
    bounds = {name: Bounds(b.lower[one], b.upper[one]) for name, b in preactivation.items()}
    lp = export(network, region.select(one), bounds, upto=target or network.output, maps=maps)
    return Program(lp, *lp.objective(rows))


# --- HiGHS --------------------------------------------------------------------------------------------------------


def highs_warm(given: Sequence[Program], threads: int) -> Array:
    """Every LP, one thread an LP, `threads` images at a time, an image's rows in one model: [images, k]."""
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(_warm, given)))


def highs_cold(given: Sequence[Program], threads: int) -> Array:
    """Every LP from scratch, one thread an LP, `threads` at a time: [images, k]."""
    with ThreadPoolExecutor(threads) as pool:
        return np.stack([_cold(one, pool) for one in given])


def _warm(given: Program) -> Array:
    return given.solve(Highs(workers=1))


def _cold(given: Program, pool: ThreadPoolExecutor) -> Array:
    each = [slice(i, i + 1) for i in range(len(given.costs))]
    return np.concatenate(list(pool.map(lambda one: given.solve(Highs(workers=1), one), each)))


def optimal_values(case: Case, options: Options) -> Tensor:
    """HiGHS's optimal values, [images, k], from the cache where these LPs have been solved before."""
    path = Path(options.cache) / f"highs-{case.digest()}.safetensors"
    if not path.exists():
        write_tensors(
            path, {"values": torch.from_numpy(highs_warm(programs(case), options.threads))}, {"case": case.name}
        )
    return read_tensors(path)[0]["values"]


@dataclass(frozen=True)
class Whole:
    """LP-ALL of some images."""

    values: Tensor
    """[images, k]."""
    lps: int
    """LPs solved for them."""


def highs_layerwise(case: Case, threads: int, *, cold: bool = False) -> Whole:
    """LP-ALL by HiGHS: bounds of every crossing neuron, layer by layer, then the margins.

    As `Layerwise`: only neurons that cross under CROWN's bounds are solved, and bounds only get tighter.
    cold: each LP from scratch, `threads` at a time; else a layer's LPs each from the basis of the last, `threads`
    images at a time.
    """
    maps = AffineMaps(case.network)
    images = range(len(case))
    with ThreadPoolExecutor(threads) as pool:
        if cold:
            found = [_layerwise_image(case, i, maps, lambda one: _cold(one, pool)) for i in images]
        else:
            found = list(pool.map(lambda i: _layerwise_image(case, i, maps, _warm), images))
    return Whole(torch.stack([one.values for one in found]), sum(one.lps for one in found))


def _layerwise_image(case: Case, image: int, maps: AffineMaps, solve: Callable[[Program], Array]) -> Whole:
    network, solved = case.network, 0
    region = case.region.select(slice(image, image + 1))
    bounds = {n: Bounds(b.lower[image][None], b.upper[image][None]) for n, b in case.preactivation.items()}
    for node in network.activations:
        source = node.inputs[0]
        before = bounds[node.name]
        lower, upper = before.lower.flatten(), before.upper.flatten()
        crossing = ((lower < 0) & (upper > 0)).nonzero()[:, 0]
        if source in network.exact_intervals or not crossing.numel():
            continue
        eye = identity_rows(network.shape_of(source), lower)[0][crossing]
        found = solve(program(network, region, bounds, 0, torch.cat([eye, -eye]), maps, source))
        solved += len(found)
        low, high = torch.from_numpy(found).chunk(2)
        lower, upper = lower.clone(), upper.clone()
        lower[crossing] = torch.maximum(lower[crossing], low)
        upper[crossing] = torch.minimum(upper[crossing], -high)
        bounds[node.name] = Bounds(lower.reshape(before.lower.shape), upper.reshape(before.upper.shape))
    values = torch.from_numpy(solve(program(network, region, bounds, 0, case.rows[image], maps)))
    return Whole(values, solved + len(values))


# --- cvxpylayers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generic:
    """Some rows of one image's LP as dense data for cvxpylayers: SCS at 1e-4, `threads` solves at a time.

    One image, since every number of crossing neurons is another problem to compile, which takes seconds and is not
    counted.
    """

    layer: LinearProgram
    data: tuple[Tensor, ...]
    offsets: Tensor

    def forward(self) -> Tensor:
        """Values c.x* + offset without gradients."""
        with torch.no_grad():
            return self._values()

    def step(self) -> None:
        """Values and their derivative in all data."""
        for part in self.data:
            part.grad = None
        self.layer(*self.data).lower.sum().backward()

    def _values(self) -> Tensor:
        values: Tensor = (self.data[0] * self.layer(*self.data).primal).sum(-1) + self.offsets
        return values


def generic(given: Program, count: int, threads: int) -> Generic:
    """The first `count` objectives of a program."""
    lp = given.lp
    low, high = (torch.from_numpy(side) for side in (lp.row_lower, lp.row_upper))
    matrix = torch.from_numpy(lp.matrix.toarray())
    equal = low == high
    above, below = (side.isfinite() & ~equal for side in (high, low))
    data = (
        torch.from_numpy(given.costs[:count]),
        torch.cat([matrix[above], -matrix[below]]),
        torch.cat([high[above], -low[below]]),
        matrix[equal],
        low[equal],
        torch.from_numpy(lp.col_lower).clone(),
        torch.from_numpy(lp.col_upper).clone(),
    )
    solver = Cvxpy(solver="SCS", eps=1e-4, layer=True, workers=threads)
    offsets = torch.from_numpy(given.offsets[:count])
    return Generic(LinearProgram(solver), tuple(part.requires_grad_() for part in data), offsets)
