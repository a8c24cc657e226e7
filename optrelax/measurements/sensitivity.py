"""Sensitivity: how strongly a bound's loss and its gradient react to small moves of the weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optrelax.analysis import Net
from optrelax.checks import require_range
from optrelax.measurements.questions import MarginProblem, ask
from optrelax.measurements.stages import DEFAULT, MeasuredTable, ReportProgress, reporter
from optrelax.measurements.weight_lines import MovingWeights, Weights, gradient_of, length_of, moving
from optrelax.relaxations import NamedRelaxations, Relaxation

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

__all__ = ["STEPS", "Sensitivity", "measure_sensitivity"]

STEPS = (1e-4, 1e-3, 1e-2)
_OWNER = "measure_sensitivity"


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity(MeasuredTable):
    """Result of `measure_sensitivity`: one row a relaxation, kind of step, and size of step.

    A step of size s moves each weight tensor by s times its own norm.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> found = ox.measure_sensitivity(net, (x, net(x).argmax(1)), 0.1, "box", steps=[0.01], draws=1, examples=1)
        >>> found.table["kind"].to_list()
        ['random', 'adversarial', 'gradient step']
    """

    table: pl.DataFrame
    """relaxation; kind: random, adversarial (up the loss), gradient step (one straight step down it); step: size; loss
    (at the weights themselves); loss change: largest |change| over the steps of this kind; relative change: by the
    loss; bound change: largest |change| of the mean smallest margin's bound, in logits, which no exponential magnifies;
    gradient change: largest |change| to the norm of the gradient; loss Lipschitz, gradient Lipschitz: largest change to
    the length of the step, in norms of the weights; predicted: of gradient steps, the change of the loss to what its
    gradient predicts (1: linear); agreement: mean cosine of the gradients before and after."""
    settings: Mapping[str, Any]
    """JSON-ready; `degrees`: of the bound along a line in weight space, by relaxation, where they are known: numerator
    and denominator, the greatest over the margins of the first example."""

    def figure(self, title: str = "") -> Figure:
        """Change of loss and of gradient against the size of the step, a panel a kind, a line a relaxation."""
        from optrelax.measurements.figures import sensitivity_panels

        return sensitivity_panels(self.table, title=title)


def measure_sensitivity(
    net: Net,
    data: object,
    eps: float,
    relaxations: NamedRelaxations = DEFAULT,
    *,
    steps: Sequence[float] = STEPS,
    draws: int = 8,
    ascent: int = 5,
    examples: int = 16,
    degrees: bool = True,
    clip: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
    seed: int = 0,
    progress: ReportProgress | None = None,
) -> Sensitivity:
    """How the certified loss on some examples, and its gradient, change with small relative steps of the weights.

    Args:
        net: moved in float64 during the measurement and put back bit for bit.
        data: as for `certify`.
        eps: as for `certify`.
        relaxations: as for `compare`.
        steps: sizes, relative: each weight tensor moves by that share of its norm.
        draws: of the random direction, the same for every relaxation.
        ascent: sub-steps of the adversarial step, which follows the loss's gradient upwards.
        examples: evenly spaced.
        degrees: whether to work them out too, of small networks over boxes.
        clip: as for `certify`.
        norm: as for `certify`.
        seed: of the draws.
        progress: called as steps are done.

    Returns:
        A table, one row a relaxation, kind and size of step.

    Raises:
        ValueError: for bad input.
        UnsupportedOpError: for a network that cannot be bounded.

    Gradient: how far it predicts is what the third kind of step shows, straight down it.

    Example:
        >>> net, x = ox.models.fc(2, 4, 2, seed=0), torch.full((1, 2), 0.5)
        >>> found = ox.measure_sensitivity(net, (x, net(x).argmax(1)), 0.1, "box", steps=[1e-4], draws=1, examples=1)
        >>> found.table["predicted"].drop_nulls().round(2).to_list()  # as the gradient says
        [1.0]
    """
    if not steps or any(not 0 < s < math.inf for s in steps):
        raise ValueError(f"{_OWNER}: steps must be positive and finite, got {list(steps)}")
    require_range(_OWNER, "at least 1", draws=draws, ascent=ascent, examples=examples)
    question = ask(_OWNER, net, data, relaxations, eps, clip, examples, norm)
    rows: list[dict[str, object]] = []
    with moving(question.network) as weights:
        stages = [(name, s) for name in question.relaxations for s in steps]
        for done, (name, size) in enumerate(stages):
            probe = _Probe(question, weights, question.relaxations[name])
            rows += [{"relaxation": name, **row} for row in probe.rows(size, draws, ascent, seed)]
            reporter(progress)(name, done + 1, len(stages))
    import polars as pl

    settings = question.settings() | {
        "steps": list(steps),
        "draws": draws,
        "ascent": ascent,
        "seed": seed,
        "degrees": _degrees(question) if degrees and norm == "linf" else {},
    }
    return Sensitivity(pl.DataFrame(rows), settings)


def _degrees(question: MarginProblem) -> dict[str, list[int] | None]:
    """Degrees of the bound by relaxation; None where they are not known."""
    from optrelax.measurements.degrees import greatest_degrees

    one = question.part(slice(0, 1))
    rows = one.rows[0].flatten(1)
    found = {name: greatest_degrees(one.network, one.region, rows, r)[0] for name, r in question.relaxations.items()}
    return {name: None if pair is None else list(pair) for name, pair in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """One relaxation's loss at moved weights."""

    question: MarginProblem
    weights: MovingWeights
    relaxation: Relaxation

    def at(self, shift: Weights | None) -> tuple[float, Weights, float]:
        """Loss and gradient at the weights plus `shift`, and the mean of the smallest margins' bounds."""
        self.weights.shift(shift if shift is not None else tuple(torch.zeros_like(w) for w in self.weights.origin))
        lower = self.relaxation.lower_bounds(self.question.network, self.question.region, self.question.rows)
        loss, gradient = gradient_of(lower, self.weights.parameters)
        return loss, gradient, float(lower.detach().amin(1).mean())

    def rows(self, size: float, draws: int, ascent: int, seed: int) -> list[dict[str, object]]:
        """One row a kind of step."""
        loss, gradient, bound = self.at(None)
        generator = torch.Generator().manual_seed(seed)
        kinds = {
            "random": [self._random(size, generator) for _ in range(draws)],
            "adversarial": [self._adversarial(size, ascent, gradient)],
            "gradient step": [self._relative(gradient, -size)],
        }
        return [self._row(kind, size, shifts, loss, gradient, bound) for kind, shifts in kinds.items()]

    def _row(
        self, kind: str, size: float, shifts: Sequence[Weights], loss: float, gradient: Weights, bound: float
    ) -> dict[str, object]:
        changes, moves, turns, slopes, bends, cosines = [], [], [], [], [], []
        scale, whole = length_of(gradient), length_of(self.weights.origin)
        for shift in shifts:
            there, other, margin = self.at(shift)
            moves.append(abs(margin - bound))
            difference = length_of(tuple(a - b for a, b in zip(other, gradient, strict=True)))
            length = length_of(shift) / whole
            changes.append(there - loss)
            turns.append(difference / scale if scale else math.nan)
            slopes.append(abs(there - loss) / length if length else math.nan)
            bends.append(difference / length if length else math.nan)
            cosines.append(_cosine(other, gradient))
        expected = sum(float((s * g).sum()) for s, g in zip(shifts[0], gradient, strict=True))
        predicted = changes[0] / expected if kind == "gradient step" and expected else None
        return {
            "kind": kind,
            "step": size,
            "loss": loss,
            "loss change": max(map(abs, changes)),
            "relative change": max(map(abs, changes)) / loss if loss else math.nan,
            "bound change": max(moves),
            "gradient change": max(turns),
            "loss Lipschitz": max(slopes),
            "gradient Lipschitz": max(bends),
            "predicted": predicted,
            "agreement": statistics.fmean(cosines),
        }

    def _relative(self, direction: Weights, size: float) -> Weights:
        """The direction with each tensor as long as `size` times the weights that it moves."""
        parts = []
        for d, w in zip(direction, self.weights.origin, strict=True):
            length = d.norm()
            parts.append(d * (size * w.norm() / length) if float(length) > 0 else torch.zeros_like(w))
        return tuple(parts)

    def _random(self, size: float, generator: torch.Generator) -> Weights:
        noise = tuple(
            torch.randn(w.shape, generator=generator, dtype=torch.float64, device="cpu").to(w.device)
            for w in self.weights.origin
        )
        return self._relative(noise, size)

    def _adversarial(self, size: float, ascent: int, gradient: Weights) -> Weights:
        """Up the loss in sub-steps, drawn back tensor by tensor to the size of the whole step."""
        shift = tuple(torch.zeros_like(w) for w in self.weights.origin)
        for i in range(ascent):
            up = gradient if i == 0 else self.at(shift)[1]
            moved = self._relative(up, 2 * size / (ascent + 1))
            shift = tuple(s + m for s, m in zip(shift, moved, strict=True))
            shift = tuple(
                s * min(1.0, size * float(w.norm()) / float(s.norm())) if float(s.norm()) > 0 else s
                for s, w in zip(shift, self.weights.origin, strict=True)
            )
        return shift


def _cosine(a: Weights, b: Weights) -> float:
    product = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    size = length_of(a) * length_of(b)
    return product / size if size else math.nan
