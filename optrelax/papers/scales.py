"""What a budget decides: how networks are trained, how finely is measured, and how often."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExperimentScale", "Measuring", "NetworkTraining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTraining:
    """How networks are trained, and how many test images certify them.

    changes: of the recipe's numbers.  said: the same in words.  suffix: of the run's name, where two ways would share
    one.
    """

    data: str
    model: str
    images: int
    changes: dict[str, object]
    said: str
    suffix: str = ""

    @property
    def label(self) -> str:
        """Data and network in a table."""
        return f"{self.data}, {self.model.upper()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Numbers of the three measurements on one kind of network; `lp_`: for LP layers."""

    images: int
    resolution: float
    lines: int
    examples: int
    length: float
    step_examples: int
    draws: int
    lp_images: int
    lp_length: float
    eps: float = 0.02
    points: int = 64
    cells: int = 32
    steps: tuple[float, ...] = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentScale:
    """One budget.

    anchor, networks, modified, loosened: how the networks of tables 1 to 4 are trained.  natural_anchor,
    natural_small: the fixed networks of table 1, and of table 3 and the properties.
    """

    name: str
    warning: tuple[str, ...]
    loose_seeds: int
    anchor: NetworkTraining
    natural_anchor: NetworkTraining
    natural_small: NetworkTraining
    networks: tuple[NetworkTraining, ...]
    modified: NetworkTraining
    loosened: NetworkTraining
    omegas: tuple[float, ...]
    grids: tuple[float, ...]
    degrees_hidden: tuple[int, ...]
    conv: Measuring
    small: Measuring
    seeds: int = 1

    def measuring(self, how: NetworkTraining) -> Measuring:
        """The numbers of a network's kind."""
        return self.conv if how.model == "conv" else self.small
