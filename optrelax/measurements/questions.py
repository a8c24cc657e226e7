"""What the measurements in weight space are about: a network, examples, a radius, and relaxations by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.preparation import device_of
from optrelax.checks import is_number, require_range
from optrelax.data.samples import Samples, gather
from optrelax.margin_rows import label_rows
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import Region, ball_of
from optrelax.relaxations import NamedRelaxations, Relaxation, named_relaxations

__all__ = ["MarginProblem", "ask", "require_positive"]


@dataclass(frozen=True, slots=True, eq=False)
class MarginProblem:
    """The margins of some examples over their regions, in float64."""

    network: Network
    relaxations: Mapping[str, Relaxation]
    samples: Samples
    eps: float
    clip: tuple[float, float] | None
    norm: str
    region: Region
    rows: Tensor  # [n, k, *output_shape]

    def part(self, which: slice) -> MarginProblem:
        """The same about some of the examples."""
        s = self.samples
        samples = Samples(s.x[which], s.labels[which], s.index[which])
        region = self.region.select(which)
        return replace(self, samples=samples, region=region, rows=self.rows[which])

    def settings(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "eps": self.eps,
            "clip": None if self.clip is None else list(self.clip),
            "norm": self.norm,
            "relaxations": list(self.relaxations),
            "examples": len(self.samples),
            "index": self.samples.index.tolist(),
            "threads": torch.get_num_threads(),
        }


def ask(
    owner: str,
    net: Net,
    data: object,
    relaxations: NamedRelaxations,
    eps: float,
    clip: tuple[float, float] | None,
    count: int,
    norm: str = "linf",
) -> MarginProblem:
    """Check everything that the measurements share; errors begin with the name of the `owner`.

    count: evenly spaced examples to take.  Estimates such as `cauchy` are allowed: this is about training.
    """
    if not (is_number(eps) and 0 <= eps < math.inf):
        raise ValueError(f"{owner}: eps must be a finite number >= 0, got {eps!r}")
    everything = gather(data)
    if count > len(everything):
        raise ValueError(f"{owner}: wants {count} examples, the data has {len(everything)}")
    samples = gather((everything.x, everything.labels), count)
    network = capture(net, tuple(samples.x.shape[1:]))
    network.require_eval()
    samples.require_range(clip, owner)
    x = samples.x.to(device_of(network), torch.float64)
    rows = label_rows(samples.labels, network.output_shape, "measure").to(x)
    return MarginProblem(
        network=network,
        relaxations=named_relaxations(owner, relaxations),
        samples=samples,
        eps=float(eps),
        clip=clip,
        norm=norm,
        region=ball_of(norm)(x, float(eps), clip),
        rows=rows.reshape(*rows.shape[:2], *network.output_shape),
    )


def require_positive(owner: str, **numbers: float | None) -> None:
    """ValueError for a number that is not positive and finite; None is one's default."""
    require_range(owner, "positive and finite", optional=True, **numbers)
