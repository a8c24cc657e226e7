"""Degrees of rational functions of one step, added and multiplied without their coefficients.

A bound at weights origin + t * direction is, between switches, a ratio of polynomials in t. `Ratio` carries the
degree of its numerator and the factors of its denominator, so that sums find their least common denominator. Degrees
are those of generic weights: no leading coefficient vanishes by accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Factors", "Ratio"]

Powers = frozenset[tuple[int, int]]  # factor, power


@dataclass(frozen=True, slots=True)
class Ratio:
    """Numerator's degree and the denominator as powers of factors; None stands for 0."""

    numerator: int = 0
    denominator: Powers = frozenset()


@dataclass(slots=True)
class Factors:
    """The factors met so far, by their degrees, and arithmetic on ratios of them."""

    degrees: list[int] = field(default_factory=list)

    def degree(self, powers: Powers) -> int:
        """Degree of a product of factors."""
        return sum(self.degrees[factor] * power for factor, power in powers)

    def multiply(self, a: Ratio | None, b: Ratio | None) -> Ratio | None:
        """a b."""
        if a is None or b is None:
            return None
        if not b.denominator:
            return a if b.numerator == 0 else Ratio(a.numerator + b.numerator, a.denominator)
        powers = dict(a.denominator)
        for factor, power in b.denominator:
            powers[factor] = powers.get(factor, 0) + power
        return Ratio(a.numerator + b.numerator, frozenset(powers.items()))

    def add(self, terms: Iterable[Ratio | None]) -> Ratio | None:
        """A sum over its least common denominator."""
        distinct = {term for term in terms if term is not None}
        if len(distinct) < 2:
            return next(iter(distinct), None)
        common = self._common(distinct)
        whole = self.degree(common)
        return Ratio(max(t.numerator + whole - self.degree(t.denominator) for t in distinct), common)

    def share(self, u: Ratio, l: Ratio) -> Ratio:
        """u / (u - l), the slope of a chord: a denominator of both cancels, what is left is a new factor."""
        difference = self.add([u, l])
        assert difference is not None
        if difference.numerator == 0:
            return Ratio(u.numerator + self.degree(difference.denominator) - self.degree(u.denominator))
        self.degrees.append(difference.numerator)
        numerator = u.numerator + self.degree(difference.denominator) - self.degree(u.denominator)
        return Ratio(numerator, frozenset({(len(self.degrees) - 1, 1)}))

    def pair(self, ratio: Ratio | None) -> tuple[int, int]:
        """Degrees of numerator and denominator."""
        return (0, 0) if ratio is None else (ratio.numerator, self.degree(ratio.denominator))

    @staticmethod
    def _common(terms: Iterable[Ratio]) -> Powers:
        powers: dict[int, int] = {}
        for term in terms:
            for factor, power in term.denominator:
                powers[factor] = max(powers.get(factor, 0), power)
        return frozenset(powers.items())
