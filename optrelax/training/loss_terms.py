"""What every training loss is made of: the terms of one batch, the frame of natural, robust and penalty parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optrelax.checks import require_choice, require_range
from optrelax.joined_specifications import Spec, as_specification
from optrelax.margin_rows import label_rows
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network, Node
from optrelax.regions import Region
from optrelax.specifications import Specification

if TYPE_CHECKING:
    from optrelax.training.lp_losses import DualMemory

__all__ = ["Batch", "Loss", "LossTerms", "WeightedLoss", "certified_cross_entropy", "l1_norm", "require_share"]

Reduction = Literal["mean", "sum", "none"]


def certified_cross_entropy(m: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy of the worst logits: log(1 + sum exp(-m)) over the last dimension.

    Args:
        m: lower bounds of the margins, [*batch, classes - 1].
        reduction: "mean", "sum" or "none".

    Returns:
        [], or [*batch] ("none"). A margin of -inf (nothing is known) gives a loss of inf.

    Raises:
        ValueError: for another reduction, and for a scalar.

    Sound: an upper bound of the cross-entropy over the region where every m is a bound.  Gradient: exact, and finite
    for every finite m.
    Source: Wong and Kolter 2018, theorem 2.

    Example:
        >>> ox.certified_cross_entropy(torch.zeros(2, 1)).exp()  # even odds
        tensor(2.)
    """
    require_choice("certified_cross_entropy", "reduction", reduction, "mean", "sum", "none")
    if m.dim() == 0:
        raise ValueError("certified_cross_entropy: wants margins [*batch, classes - 1], got a scalar")
    # The label's own logit is 0, the others -m. Not logsumexp: its gradient exp(x - logsumexp(x)) loses the share of
    # each where the logits are so large that log 2 is lost in them.
    each = -torch.log_softmax(F.pad(-m, (1, 0)), dim=-1)[..., 0]
    each = torch.where((m == -math.inf).any(-1), math.inf, each)
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss and what it is made of: total = kappa * natural + (1 - kappa) * robust + l1 * penalty.

    `.total.backward()` is the training step; the rest is for reports. Where kappa is 1 nothing robust is computed:
    `robust` and `margins` are None.
    """

    total: Tensor  # []
    natural: Tensor  # []
    robust: Tensor | None  # []
    penalty: Tensor  # [], the sum of |weights|; 0 where l1 is 0
    logits: Tensor  # [batch, classes] at the images themselves
    margins: Tensor | None  # [batch, classes - 1], lower bounds, or those of an attacked point
    solved: Solved | None = None  # where the margins come from linear programs


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """How the linear programs of one batch ended, those of hidden neurons included; no part of any graph."""

    gaps: Tensor
    """Certified gap of each, relative to max(1, |lower|); inf without a feasible point: [problems]."""
    unfinished: Tensor
    """Where the gap is above the solver's tolerance, so that the fallback took over: [problems] of bool."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a robust part is computed from."""

    network: Network
    region: Region
    labels: Tensor  # [batch]
    rows: Tensor  # margins' rows in the region's type, [batch, classes - 1, classes]
    generator: torch.Generator | None
    memory: DualMemory | None = None  # dual points of earlier steps, see `optrelax.training.lp_losses`
    index: Tensor | None = None  # the examples' places in the data set, [batch]
    spec: Specification | None = None  # whose rows these are, where not those of labels

    def combined(self, values: Tensor) -> Tensor:
        """Bounds or values of the rows [batch, k] as those of what is asked: offsets added, the greatest of a group."""
        return values if self.spec is None else self.spec.worst(values + self.spec.offsets)


@dataclass(frozen=True, slots=True)
class Robust:
    """The robust part of a loss, and the margins that it is reported by."""

    loss: Tensor  # []
    margins: Tensor  # [batch, classes - 1]
    solved: Solved | None = None


@runtime_checkable
class Loss(Protocol):
    """What every loss is: a frozen dataclass whose call gives the terms for one batch.

    region [batch, *input_shape], labels [batch] of integers; x [batch, *input_shape], the images, by default those
    of a ball, the centres of another region; generator: the source of all randomness, None for torch's own.
    """

    def __call__(
        self,
        net: nn.Module | Network,
        region: Region,
        labels: Tensor,
        x: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """The terms of the loss for one batch."""


def clean_images(region: Region, x: Tensor | None) -> Tensor:
    """The images of a loss's call: by default those of a ball, the centres of another region."""
    if x is not None:
        return x
    return region.origin


@dataclass(frozen=True, kw_only=True)
class WeightedLoss:
    """kappa * natural + (1 - kappa) * robust + l1 * sum |weights|; subclasses give the robust part."""

    kappa: float = 0.0
    l1: float = 0.0

    def __post_init__(self) -> None:
        require_share(self, kappa=self.kappa)
        require_range(type(self).__name__, ">= 0 and finite", l1=self.l1)

    def _robust(self, batch: Batch) -> Robust:
        """The robust part: by default the cross-entropy of `_margins`."""
        found = batch.combined(self._margins(batch))
        return Robust(certified_cross_entropy(found), found)

    def _margins(self, batch: Batch) -> Tensor:
        """Margins of the robust part, one a row of the batch's rows: [batch, classes - 1]."""
        raise NotImplementedError

    def __call__(
        self,
        net: nn.Module | Network,
        region: Region,
        labels: Tensor,
        x: Tensor | None = None,
        *,
        spec: Spec | None = None,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """The terms of the loss for one batch.  ValueError where labels do not fit.

        spec: what is asked in place of the labels' margins; of a group the greatest row's bound counts. Labels may
        then be targets [batch, *output_shape], and the natural loss is their mean squared error.
        """
        return self._terms(net, region, labels, x, generator, spec=spec)

    def _terms(
        self,
        net: nn.Module | Network,
        region: Region,
        labels: Tensor,
        x: Tensor | None,
        generator: torch.Generator | None,
        memory: DualMemory | None = None,
        index: Tensor | None = None,
        spec: Spec | None = None,
    ) -> LossTerms:
        network = capture(net, region.shape[1:])
        x = clean_images(region, x)
        asked = None if spec is None else self._asked(spec, network, region)
        targets = asked is not None and labels.is_floating_point()
        wanted = (x.shape[0], *network.output_shape) if targets else (x.shape[0],)
        if labels.shape != wanted:
            raise ValueError(
                f"{type(self).__name__}: labels must be {list(wanted)}, one an image, got {tuple(labels.shape)}"
            )
        if asked is None:
            rows = label_rows(labels, network.output_shape, "train").to(region.like)  # checks the labels too
        else:
            rows = asked.rows.expand(x.shape[0], *asked.rows.shape[-2:])
        passed = None
        if network.graph.in_training:
            network, passed = network.on_batch(x)
        # A part without weight is reported, where it is cheap, and never in the graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kappa > 0):
            logits = (network(x) if passed is None else passed if self.kappa > 0 else passed.detach()).flatten(1)
            natural = F.mse_loss(logits, labels.flatten(1)) if targets else F.cross_entropy(logits, labels)
        total, robust = self.kappa * natural, None
        if self.kappa < 1:
            robust = self._robust(Batch(network, region, labels, rows, generator, memory, index, asked))
            total = total + (1 - self.kappa) * robust.loss
        penalty = l1_norm(network) if self.l1 > 0 else torch.zeros_like(natural)
        total = total + self.l1 * penalty
        if robust is None:
            return LossTerms(total, natural, None, penalty, logits, None)
        return LossTerms(total, natural, robust.loss, penalty, logits, robust.margins, robust.solved)

    def _asked(self, spec: Spec, network: Network, region: Region) -> Specification:
        """The specification for a batch; ValueError from losses that are made of margins."""
        name = type(self).__name__
        if type(self)._robust is not WeightedLoss._robust:
            raise ValueError(f"{name}: is made of the margins of labels; for a specification use CertifiedLoss")
        found = as_specification(spec).flat()
        found.require_fit(name, network.outputs, region.shape[:1])
        return found.to(region.device, region.dtype)


def l1_norm(network: Network) -> Tensor:
    """Sum of |w| over the weight tensors of the affine layers, biases left out; a shared tensor counts once: []."""
    found = weights_of(node for node in network if node.affine)
    if not found:
        raise ValueError("l1_norm: the network has no weight tensors")
    return torch.stack([weight.abs().sum() for weight in found]).sum()


def weights_of(nodes: Iterable[Node]) -> list[Tensor]:
    """The weight tensors that ops read, in order, each once."""
    read = [source() for node in nodes if (source := node.op.tensors().get("weight")) is not None]
    return list({id(weight): weight for weight in read}.values())


def require_share(owner: object, **values: float) -> None:
    """ValueError for a share outside [0, 1]."""
    require_range(type(owner).__name__, "in [0, 1]", optional=False, **values)
