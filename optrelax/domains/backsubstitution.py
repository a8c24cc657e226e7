"""Back-substitution: rows of a linear function of the output pulled back to the input, relaxation by relaxation.

The one implementation behind CROWN, Fast-Lin, DeepZ (backward), Box (with constant lines) and the dual bound of the
LP layers. Source: Zhang et al. 2018 (CROWN), Singh et al. 2019 (DeepPoly); outward rounding: see `optrelax.rounding`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optrelax.domains import row_rules  # noqa: F401  # importing it registers them
from optrelax.domains.balls import Ball
from optrelax.domains.frames import Plan
from optrelax.domains.row_walks import Enclosure, Rows
from optrelax.domains.rules import find_rule, require_rules
from optrelax.domains.windows import Windows
from optrelax.enclosures import from_above, from_below
from optrelax.networks.graph import Network
from optrelax.regions import InputBox, Region
from optrelax.rounding import SLACK, gamma


def substitute(
    network: Network,
    target: str,
    rows: Tensor,
    region: Region,
    lines: Mapping[str, Enclosure],
    *,
    magnitude: Mapping[str, Tensor] | None = None,
    plan: Plan | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Lower bound of each row of `rows` times the value of node `target`.

    rows [batch or 1, k, *shape of target] -> [batch, k]; plan, places: see `pull`.
    Sound: yes, for sound lines.  Gradient: in weights, lines, rows and region; at coefficients of exactly 0 that
    of the upper line (relu(0)' = 0 for the positive part).
    """
    end = region.as_box if magnitude is None else None
    walk = pull(network, target, rows, region.shape[0], lines, magnitude, end=end, plan=plan, places=places)
    return concretise(walk, region)


def substitute_both(
    network: Network,
    target: str,
    rows: Tensor,
    region: Region,
    lines: Mapping[str, Enclosure],
    *,
    plan: Plan | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of each row of `rows` times the value of node `target`, by parallel lines, to nearest.

    rows [batch or 1, k, *shape of target] -> [batch, k] each, from one walk: the upper bound's coefficients are those
    of the lower.  Sound and gradient: as `substitute`; at coefficients of exactly 0 that of the middle.
    """
    walk = pull(network, target, rows, region.shape[0], lines, both=True, end=region.as_box, plan=plan, places=places)
    a = walk.pending.pop(network.input, None)
    if a is not None:
        low, high = walk.extent(a, region)
        walk.add_constant(low, upper=high)
    assert walk.upper is not None
    return from_below(walk.constant), from_above(walk.upper)


def pull(
    network: Network,
    target: str,
    rows: Tensor,
    batch: int,
    lines: Mapping[str, Enclosure],
    magnitude: Mapping[str, Tensor] | None = None,
    stop: frozenset[str] = frozenset(),
    both: bool = False,
    end: InputBox | None = None,
    plan: Plan | None = None,
    places: Tensor | None = None,
) -> Rows:
    """Pull rows back until they reach the input (or a node of `stop`, where they are left in `.stops`).

    both: the constants of lower and upper bounds at once; every line is one of a parallel pair.
    end: a box in whose bounds rows may end on the way, where that is faster; to nearest only.
    plan: where the coefficients of every node lie; places: those of the target whose rows these are, as windows,
    [batch or 1, places, 2]: rows [examples or 1, k, 1, 1, channels], and constants are [batch, places * k].
    """
    require_rules(network, Rows)
    zeros = rows.new_zeros(batch, rows.shape[1] * (1 if places is None else places.shape[1]))
    walk = Rows(network, lines, magnitude, zeros, zeros if both else None, end)
    if plan is not None:
        walk.frames, walk.grid, walk.places = plan.frames, plan.grid, places
    walk.pending[target] = rows
    for node in reversed(network.nodes):
        if node.name not in walk.pending:
            continue
        a = walk.pending.pop(node.name)
        if node.name in stop:
            walk.stops[node.name] = a
            continue
        frame = walk.frames.get(node.name, "rows")
        step = find_rule(node.op, Rows if frame == "rows" else Windows)
        assert step is not None
        step(node.op, node, a, *(() if frame == "rows" else (frame,)), walk)
    return walk


def concretise(walk: Rows, region: Region) -> Tensor:
    """Lower bound over the region once every row has reached the input: [batch, k]."""
    name = walk.network.input
    a = walk.pending.pop(name, None)
    if a is not None:
        if walk.magnitude is None:
            walk.add_constant(walk.least(a, region))
        else:
            walk.add_constant(*walk.least_outward(a, region))
    if walk.allowance is None:
        return from_below(walk.constant)
    total = walk.allowance
    if walk.terms is not None:
        total = total + gamma(4 * len(walk.network.nodes) + 8, total.dtype) * walk.terms
    return from_below(walk.constant - SLACK * total)


def magnitudes(network: Network, balls: Mapping[str, Ball]) -> dict[str, Tensor]:
    """Greatest |value| of every node from a walk of intervals with outward rounding."""
    return {name: b.magnitude * SLACK for name, b in balls.items()}
