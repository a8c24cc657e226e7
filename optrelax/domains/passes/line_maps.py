"""The lines of activations as maps, made once for all targets behind them."""

from __future__ import annotations

from torch import Tensor

from optrelax.domains.lines import Lines
from optrelax.domains.passes.folding import lines_at_arrival
from optrelax.domains.row_walks import Enclosure
from optrelax.networks.activations import Line
from optrelax.networks.graph import Network


class LineMaps(dict[str, Enclosure]):
    """Lines of each activation by its name; as maps they are made once for all targets behind it."""

    constant = False
    """As of `MixedMaps`."""

    def __init__(self) -> None:
        super().__init__()
        self._maps: dict[str, tuple[Tensor, ...]] = {}

    def maps(self, network: Network, name: str) -> tuple[Tensor, ...]:
        """Both lines in the value at which rows arrive: slope, intercept, slope, intercept [batch, h, w, c]."""
        if name not in self._maps:
            lines = self[name]
            assert isinstance(lines, Lines)
            self._maps[name] = tuple(t.contiguous() for t in lines_at_arrival(network, network[name], lines))
        return self._maps[name]


class MixedMaps:
    """Two lower lines and an upper one of each activation by its name: rows have weights of their own between the two.

    Weight 0 is the first lower line, 1 the second.
    constant: whether the gradient is wanted in the weights and the upper lines alone: the lower lines, and the network,
    are constants then.
    """

    def __init__(self, constant: bool) -> None:
        self.constant = constant
        self._lines: dict[str, tuple[Lines, Lines]] = {}
        self._maps: dict[str, tuple[Tensor, ...]] = {}

    def add(self, name: str, first: Line, second: Line, above: Line) -> None:
        """The lines of an activation: slope and intercept [batch, *shape] each."""
        self._lines[name] = (Lines(*first, *above), Lines(*second, *above))

    def maps(self, network: Network, name: str) -> tuple[Tensor, ...]:
        """As `LineMaps.maps`; then slope and intercept of the second lower line less the first's."""
        if name not in self._maps:
            first, second = (lines_at_arrival(network, network[name], lines) for lines in self._lines[name])
            below = (*first[:2], second[0] - first[0], second[1] - first[1])
            ls, li, ds, di = (t.detach() for t in below) if self.constant else below
            self._maps[name] = tuple(t.contiguous() for t in (ls, li, *first[2:], ds, di))
        return self._maps[name]
