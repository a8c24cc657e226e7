"""The largest radius at which each example is certified, found by bisection or by a scan of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from optrelax.certification.attacks import Attack
from optrelax.certification.certifiers import Certifier
from optrelax.certification.preparation import device_of
from optrelax.margin_rows import label_rows
from optrelax.regions import ball_of
from optrelax.relaxations import Relaxation

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp

__all__ = ["RadiusSearch", "Search"]

Search = Literal["bisection", "grid scan"]
Certified = Callable[[Tensor, Tensor], Tensor]  # positions [p] and radii [p] -> bool [p]


@dataclass(frozen=True, slots=True)
class RadiusSearch:
    """Radii of all examples of a run by any means; radii are float64 [n] in units of the pixels.

    limit: the largest radius of interest.  resolution: width at which a bracket is closed.  points: of the grid, from
    0 to the smallest radius at which a counterexample is known, an image at a time.
    """

    run: Certifier
    size: int
    limit: float
    resolution: float
    points: int
    progress: Callable[[str, int, int], None]

    def attacked(self, attack: Attack) -> Tensor:
        """Smallest radius at which a counterexample was found, 0 for misclassified examples, `limit` without one.

        The radius is the distance of the point itself, so no sound bound certifies beyond it.
        """
        reach = torch.full((len(self.run.samples),), self.limit, dtype=torch.float64, device="cpu")
        natural = torch.cat(
            [self._margins(p, self._x(p)).amin(1) for p in self._batches(torch.arange(len(reach), device="cpu"))]
        )
        reach[~(natural > 0)] = 0.0
        low = torch.zeros_like(reach)
        rounds = max(1, math.ceil(math.log2(max(2.0, self.limit / self.resolution))))
        open_ = reach > 0
        for i in range(rounds + 1):
            # The first round asks at the limit itself, the others between what withstood and what did not.
            ask = reach.clone() if i == 0 else (low + reach) / 2
            self._attack_once(open_, ask, reach, low, attack)
            open_ &= reach - low > self.resolution
            self.progress("attack", i + 1, rounds + 1)
        return reach

    def _attack_once(self, open_: Tensor, ask: Tensor, reach: Tensor, low: Tensor, attack: Attack) -> None:
        """Attack the open examples at the radii asked; move one end of each bracket."""
        for p in self._batches(open_.nonzero()[:, 0]):
            x = self._x(p)
            ball = self.run.ball(x, ask[p].to(x.device))
            keys = self.run.samples.index[p].tolist()
            points = attack.search(self.run.network, ball, self._rows(p), keys).points
            distance = ball_of(self.run.norm).length((points - x).flatten(1)).cpu()
            found = (self._margins(p, points).amin(1) <= 0) & (distance <= reach[p])
            reach[p] = torch.where(found, distance, reach[p])
            low[p] = torch.where(found, low[p].clamp_max(distance), ask[p])

    def relaxed(self, name: str, reach: Tensor) -> tuple[Tensor, int]:
        """Largest certified radius by a relaxation, and how many bounds of an example that took in all.

        Raises ValueError where it certifies an attacked radius: the relaxation is unsound.
        """
        relaxation = self.run.relaxations[name].deciding
        asked = [0]

        def certified(positions: Tensor, radii: Tensor) -> Tensor:
            asked[0] += len(positions)
            parts = [self._worst(relaxation, p, radii[i]) > 0 for i, p in self._pieces(positions)]
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device="cpu")

        self._refute(name, relaxation, reach)
        if relaxation.monotone:
            low, high = self._from_zero(certified, reach)
        else:
            low, high = self._scanned(name, certified, reach)
        return self._bisected(name, certified, low, high), asked[0]

    def exact(self, milp: Milp, low: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Bisection by a MILP solver between certified and attacked radii: the radius proved, and the one refuted.

        Where the time limit leaves an example open, its bracket stays as wide as it is.
        """
        low, high = low.clone(), torch.maximum(low, reach)
        for i in range(len(low)):
            while high[i] - low[i] > self.resolution:
                middle = (low[i] + high[i]) / 2
                verdict = self._decided(milp, i, middle)
                if verdict is None:
                    break
                (low if verdict else high)[i] = middle
            self.progress("milp", i + 1, len(low))
        return low, high

    def _decided(self, milp: Milp, position: int, radius: Tensor) -> bool | None:
        """Whether every margin of one example is positive at a radius; None where the solver left it open."""
        p = torch.tensor([position], device="cpu")
        x = self._x(p)
        ball = self.run.ball(x, float(radius))
        rows = self._rows(p)
        cheap = milp.preactivation.lower_bounds(self.run.network, ball, rows)[0]
        order = [row for row in cheap.argsort().tolist() if not cheap[row] > 0]
        answer = milp.decide(self.run.network, ball, rows, order)
        if float(answer.upper.amin()) <= 0:
            return False
        return True if float(torch.maximum(answer.lower, cheap.cpu()).amin()) > 0 else None

    def _at_limit(self, certified: Certified, reach: Tensor) -> Tensor:
        """`limit` where no counterexample is known and it is certified, -1 (at no radius so far) elsewhere."""
        low = torch.full_like(reach, -1.0)
        top = (reach >= self.limit).nonzero()[:, 0]
        low[top[certified(top, reach[top])]] = self.limit
        return low

    def _from_zero(self, certified: Certified, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Brackets from 0, where it is certified there, to the reach."""
        low = self._at_limit(certified, reach)
        some = ((low < 0) & (reach > 0)).nonzero()[:, 0]
        low[some[certified(some, torch.zeros(len(some), dtype=torch.float64, device="cpu"))]] = 0.0
        return low, reach.clone()

    def _scanned(self, name: str, certified: Certified, reach: Tensor) -> tuple[Tensor, Tensor]:
        """From the reach downwards, the first grid radius that is certified, and the grid radius above it."""
        low, high = self._at_limit(certified, reach), reach.clone()
        for step in range(self.points - 1, -1, -1):
            left = ((low < 0) & (reach > 0)).nonzero()[:, 0]
            if left.numel() == 0:
                break
            radii = reach[left] * (step / self.points)
            yes = certified(left, radii)
            low[left[yes]] = radii[yes]
            high[left[~yes]] = radii[~yes]
            self.progress(name, self.points - step, self.points)
        return low, high

    def _bisected(self, name: str, certified: Certified, low: Tensor, high: Tensor) -> Tensor:
        """Close every bracket: certified at `low` (-1: at no radius), not at `high`."""
        low, high = low.clone(), high.clone()
        done = 0
        while True:
            open_ = ((low >= 0) & (high - low > self.resolution)).nonzero()[:, 0]
            if open_.numel() == 0:
                return low.clamp_min(0)
            middle = (low[open_] + high[open_]) / 2
            yes = certified(open_, middle)
            low[open_[yes]], high[open_[~yes]] = middle[yes], middle[~yes]
            done += 1
            self.progress(f"{name}, closing", done, done + math.ceil(math.log2(max(2.0, self._widest(low, high)))))

    def _widest(self, low: Tensor, high: Tensor) -> float:
        return float(((high - low)[low >= 0]).max()) / self.resolution if bool((low >= 0).any()) else 1.0

    def _refute(self, name: str, relaxation: Relaxation, reach: Tensor) -> None:
        """ValueError where a bound is above the margin of a point of the same region."""
        attacked = ((reach > 0) & (reach < self.limit)).nonzero()[:, 0]
        for i, p in self._pieces(attacked):
            radii = reach[attacked][i]
            worst = self._worst(relaxation, p, radii)
            # The counterexample's margin is at most 0; rounding to nearest may lift a bound by some ulps.
            scale = self._margins(p, self._x(p)).abs().amax(1)
            wrong = worst > 1e-5 * scale
            if bool(wrong.any()):
                index = int(self.run.samples.index[p][wrong][0])
                raise ValueError(
                    f"measure_tightness: {name} is unsound: it gives example {index} "
                    f"a margin of at least {float(worst[wrong][0]):g} at radius {float(radii[wrong][0]):g}, where a "
                    "point with a margin of at most 0 is known"
                )

    def _worst(self, relaxation: Relaxation, positions: Tensor, radii: Tensor) -> Tensor:
        """Lower bound of the smallest margin: float64 [p]; NaN counts as nothing known."""
        x = self._x(positions)
        region = self.run.rounded(self.run.ball(x, radii.to(x.device)))
        lower = relaxation.lower_bounds(self.run.network, region, self._rows(positions).to(self.run.dtype))
        return lower.amin(1).double().nan_to_num(-math.inf).cpu()

    def _x(self, positions: Tensor) -> Tensor:
        return self.run.samples.x[positions].to(device_of(self.run.network), torch.float64)

    def _rows(self, positions: Tensor) -> Tensor:
        rows = label_rows(self.run.samples.labels[positions], self.run.network.output_shape, "radii").double()
        return rows.reshape(*rows.shape[:2], *self.run.network.output_shape).to(device_of(self.run.network))

    def _margins(self, positions: Tensor, points: Tensor) -> Tensor:
        """Every margin at a point of each example: float64 [p, k]."""
        logits = self.run.network(points).flatten(1)
        return (self._rows(positions).flatten(2) @ logits[..., None])[..., 0].double().cpu()

    def _batches(self, positions: Tensor) -> list[Tensor]:
        return list(positions.split(self.size)) if positions.numel() else []

    def _pieces(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Places in `positions` and the positions there, batch by batch."""
        places = torch.arange(len(positions), device="cpu")
        return [(i, positions[i]) for i in self._batches(places)]
