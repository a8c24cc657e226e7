"""What was published, and nothing else: figures that stand beside ours in the reports."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ANCHOR", "SETTING", "SOURCE", "Anchor"]

SOURCE = "Jovanović et al., arXiv 2102.06700"
SETTING = "MNIST, CONV, eps 0.3, 200 epochs"


@dataclass(frozen=True, slots=True)
class Anchor:
    """One row of the published table of relaxations."""

    tightness: float
    """Area under certified robustness against eps, times 100, on a naturally trained CONV; their grid is unknown."""
    continuous: bool
    insensitive: bool
    certified: float
    """Percent, of the network trained with the relaxation."""


ANCHOR = {
    "box": Anchor(0.73, True, True, 86.8),
    "hbox": Anchor(1.76, False, True, 83.7),
    "crown-ibp": Anchor(2.15, False, False, 75.4),
    "deepz": Anchor(3.00, True, False, 69.8),
    "crown": Anchor(3.36, False, False, 70.2),
}
"""By relaxation; `crown-ibp` is the paper's CROWN-IBP (R)."""
