"""What is asked of each sample: its region, the rows of its specification, and in what type bounds are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optrelax.certification.preparation import device_of
from optrelax.data.samples import Samples
from optrelax.margin_rows import label_rows
from optrelax.networks.graph import Network
from optrelax.regions import Region, ball_of
from optrelax.rounding import Rounding
from optrelax.specifications import Specification

__all__ = ["SampleQuestions"]


@dataclass(frozen=True, kw_only=True)
class SampleQuestions:
    """Questions about the samples of one data set; batches are positions in the samples."""

    network: Network
    samples: Samples
    eps: float | None
    """None where a region was given."""
    clip: tuple[float, float] | None
    norm: str
    rounding: Rounding
    dtype: torch.dtype
    region: Region | None = None
    """One of every sample, in place of the ball of eps."""
    spec: Specification | None = None
    """In place of the margins of the labels; of every sample, or shared."""

    def ball(self, x: Tensor, eps: float | Tensor | None = None) -> Region:
        """The region around inputs; eps: another radius than the run's."""
        return ball_of(self.norm)(x, self.eps if eps is None else eps, self.clip)

    def rounded(self, ball: Region) -> Region:
        """The region in `dtype`, with outward rounding wide enough for the rounding of its own ends."""
        return ball.outward().enclosing(self.dtype) if self.rounding == "outward" else ball.to(self.dtype)

    def label(self, position: int) -> int | None:
        """Of a sample, where there is one."""
        return int(self.samples.labels[position]) if self.samples.labelled else None

    def specification(self, positions: Tensor) -> Specification:
        """What is asked of some samples, on the network's device."""
        if self.spec is not None:
            return self.spec.select(positions.to(self.spec.rows.device)).to(device_of(self.network))
        rows = label_rows(self.samples.labels[positions], self.network.output_shape, "certify")
        return Specification(rows.to(device_of(self.network), torch.float64))

    def question(self, positions: Tensor) -> tuple[Tensor, Region, Specification]:
        """Inputs of a batch, their regions and what is asked there, in float64."""
        x = self.samples.x[positions.to(self.samples.x.device)].to(device_of(self.network), torch.float64)
        if self.region is None:
            assert self.eps is not None
            return x, self.ball(x), self.specification(positions)
        part = self.region.select(positions.to(self.region.device))
        return x, part.to(torch.float64, x.device), self.specification(positions)

    def prediction(self, logits: Tensor) -> int | None:
        """The class of the greatest score; with one output, by its sign, in the labels' own numbers."""
        if not self.samples.labelled or bool(logits.isnan().any()):
            return None
        if len(logits) > 1:
            return int(logits.argmax())
        negative = -1 if bool((self.samples.labels < 0).any()) else 0
        return 1 if float(logits) > 0 else negative
