"""Arrays of numbers with the degrees that they have in a step: the arithmetic of `optrelax.measurements.degrees`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optrelax.measurements.rationals import Factors, Ratio

__all__ = ["Arithmetic", "Tracked", "Values"]

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tracked:
    """Numbers at the origin of the line, and their degrees: arrays of one shape."""

    value: Values
    ratio: Any  # array of Ratio, None where it is 0


@dataclass(slots=True, kw_only=True)
class Arithmetic:
    """Sums and products that share their factors."""

    factors: Factors = field(default_factory=Factors)

    def plus(self, *terms: Tracked) -> Tracked:
        """Entrywise sum."""
        value = np.sum([t.value for t in terms], axis=0)
        ratio = np.empty(value.shape, dtype=object)
        for place in np.ndindex(value.shape):
            ratio[place] = self.factors.add(t.ratio[place] for t in terms)
        return Tracked(value, ratio)

    def scaled(self, a: Tracked, b: Tracked) -> Tracked:
        """Entrywise product, broadcast."""
        left: Any
        right: Any
        left, right = np.broadcast_arrays(a.ratio, b.ratio)
        ratio = np.empty(left.shape, dtype=object)
        for place in np.ndindex(left.shape):
            ratio[place] = self.factors.multiply(left[place], right[place])
        return Tracked(a.value * b.value, ratio)

    def matmul(self, a: Tracked, b: Tracked) -> Tracked:
        """[r, n] [n, m] -> [r, m]."""
        ratio = np.empty((a.value.shape[0], b.value.shape[1]), dtype=object)
        for i, j in np.ndindex(ratio.shape):
            pairs = set(zip(a.ratio[i], b.ratio[:, j], strict=True))
            ratio[i, j] = self.factors.add({self.factors.multiply(x, y) for x, y in pairs})
        return Tracked(a.value @ b.value, ratio)

    def apply(self, matrix: Tracked, x: Tracked) -> Tracked:
        """[out, in] [in] -> [out]."""
        out = self.matmul(matrix, Tracked(x.value[:, None], x.ratio[:, None]))
        return Tracked(out.value[:, 0], out.ratio[:, 0])

    def least(self, matrix: Tracked, low: Tracked, high: Tracked) -> Tracked:
        """Least value of matrix [out, in] times anything between low and high [in]: at one end of each entry.

        Ends, not centre and radius: what cancels between those two would count.
        """
        value = np.empty(len(matrix.value))
        ratio = np.empty(len(matrix.value), dtype=object)
        for i in range(len(value)):
            ends = self.chosen(matrix.value[i] > 0, low, high)
            value[i] = matrix.value[i] @ ends.value
            pairs = set(zip(matrix.ratio[i], ends.ratio, strict=True))
            ratio[i] = self.factors.add({self.factors.multiply(x, y) for x, y in pairs})
        return Tracked(value, ratio)

    @staticmethod
    def chosen(where: NDArray[np.bool_], a: Tracked, b: Tracked) -> Tracked:
        """Entries of a where true, else of b."""
        return Tracked(np.where(where, a.value, b.value), np.where(where, a.ratio, b.ratio))

    @staticmethod
    def minus(a: Tracked) -> Tracked:
        """-a."""
        return Tracked(-a.value, a.ratio)

    @staticmethod
    def constant(value: Values) -> Tracked:
        """Numbers that do not move."""
        ratio = np.full(value.shape, None, dtype=object)
        ratio[value != 0] = Ratio(0)
        return Tracked(value, ratio)
