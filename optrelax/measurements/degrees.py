"""Degrees of a bound as a rational function of a step along a line in weight space, op by op.

The paper's algebraic view of sensitivity (arXiv 2102.06700, section 4.3): Box and hBox give polynomials of as many
degrees as there are affine layers, relaxations by chords ratios whose degrees grow with every crossing neuron.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from optrelax.analysis import Net, prepare, prepare_rows
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.measurements.degree_walks import DegreeWalk, LinearMap
from optrelax.measurements.rationals import Ratio
from optrelax.measurements.tracked import Tracked, Values
from optrelax.measurements.weight_lines import MovingWeights, Weights, moving, random_direction
from optrelax.networks.activations import PiecewiseLinear
from optrelax.networks.graph import Network
from optrelax.networks.ops import Affine
from optrelax.regions import Region, require_box
from optrelax.relaxations import Relaxation, name_of, resolve

__all__ = ["LARGEST", "greatest_degrees", "step_degrees"]

LARGEST = 64
"""Most hidden neurons of a network whose degrees are propagated: every coefficient is tracked by itself."""


def step_degrees(
    net: Net, region: Region, spec: Tensor, relaxation: Relaxation | str, *, seed: int = 0
) -> list[tuple[int, int]]:
    """Degrees of numerator and denominator of each row's lower bound in t, where the weights are w + t d.

    Between switches a bound is a ratio of two polynomials in t; its degrees hold for almost every direction d in which
    all parameters move, on the piece that the weights as they are lie on. Where terms cancel beyond what is tracked (a
    chord met at its end, one denominator of both ends) they are upper bounds.

    Args:
        net: of at most LARGEST hidden neurons.
        region: one example.
        spec: [k, outputs] or [1, k, outputs].
        relaxation: one whose bounds are rational in the weights.
        seed: of the direction that tells moving entries.

    Returns:
        A pair a row; (n, 0) is a polynomial of degree n.

    Raises:
        ValueError: for a relaxation whose bounds are not rational (soft, LPs), unknown, or others than its lines give,
            for more than one example or a larger network.
        UnsupportedOpError: for ops besides affine ones and activations of one kink.

    Example:
        >>> net, region = ox.models.fc(2, 4, 2, seed=0), ox.LinfBall(torch.zeros(1, 2), eps=0.1)
        >>> ox.step_degrees(net, region, torch.eye(2), "box")  # two affine layers
        [(2, 0), (2, 0)]
    """
    resolved = resolve(relaxation)
    network, flat, batch = prepare(net, region)
    if flat.shape[0] != 1:
        raise ValueError(f"step_degrees: wants one example, got {flat.shape[0]}")
    kinked = _kinked(network)
    rows = prepare_rows(network, spec, flat, batch)
    with moving(network) as weights, torch.no_grad():
        way = random_direction(weights.origin, torch.Generator().manual_seed(seed), "step_degrees")
        box = require_box("step_degrees", flat, "measure_sensitivity takes any ball").to(torch.float64)
        walk = DegreeWalk(
            network=network,
            region=box,
            kinked=kinked,
            linear=_linear(network, weights, way),
        )
        found = walk.bounds(resolved).rows(rows[0].flatten(1).double().cpu().numpy())
        stated = resolved.lower_bounds(network, box, rows.double())[0].cpu().numpy()
    if not np.allclose(found.value, stated, rtol=1e-6, atol=1e-6):
        raise ValueError(f"step_degrees: {name_of(resolved)} states other bounds than its lines give")
    return [walk.factors.pair(ratio) for ratio in found.ratio]


def greatest_degrees(
    net: Net, region: Region, spec: Tensor, relaxation: Relaxation | str
) -> tuple[tuple[int, int] | None, str]:
    """The greatest of `step_degrees`; None, and why, where they are not known.

    That is: transcendental ones, LPs, a user's own relaxation, a network too large to track.
    """
    try:
        return max(step_degrees(net, region, spec, relaxation), key=sum), ""
    except ValueError as error:
        return None, str(error)


def _kinked(network: Network) -> dict[str, PiecewiseLinear]:
    """The activations of a network that is small, and has none but of one kink."""
    found, problems = {}, []
    for node in network:
        if node.piecewise and len(node.piecewise.kinks) == 1:
            found[node.name] = node.piecewise
        elif not node.affine:
            problems.append(Problem(node.path, type(node.op).__name__, "has no rule for degrees"))
    if problems:
        raise UnsupportedOpError(problems, "affine ops and activations of one kink")
    hidden = sum(math.prod(node.shape) for node in network.activations)
    if hidden > LARGEST:
        raise ValueError(f"step_degrees: takes networks of at most {LARGEST} hidden neurons, got {hidden}")
    return found


def _linear(network: Network, weights: MovingWeights, way: Weights) -> dict[str, LinearMap]:
    """Every affine op as matrices, and which of their entries move; ValueError where one is not affine in the step."""
    at = []
    for t in (0.0, 0.5, 1.0):
        weights.move(way, t)
        at.append({node.name: _dense(node.affine) for node in network if node.affine})
    weights.move(way, 0.0)
    found = {}
    for name in at[0]:
        parts = []
        for start, middle, end in zip(*(step[name] for step in at), strict=True):
            if not np.allclose(middle - start, (end - start) / 2, rtol=1e-9, atol=1e-12):
                raise ValueError(f"step_degrees: {network[name].path} is not affine in its parameters")
            ratio = np.full(start.shape, None, dtype=object)
            ratio[(start != 0) | (end != 0)] = Ratio(0)
            ratio[start != end] = Ratio(1)
            parts.append(Tracked(start, ratio))
        found[name] = LinearMap(tuple(parts[:-1]), parts[-1])
    return found


def _dense(op: Affine) -> list[Values]:
    """Matrices [out, in] of each input, then the bias [out]."""
    n = math.prod(op.shape)
    eye = torch.eye(n, dtype=torch.float64, device="cpu").reshape(n, *op.shape)
    parts = [part.reshape(n, -1).numpy().copy() for part in op.transpose(eye)]
    b = op.bias(eye)
    bias = np.zeros(n) if b is None else b.expand(op.shape).reshape(-1).numpy().copy()
    return [*parts, bias]
