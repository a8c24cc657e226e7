"""What a VNN-LIB file asserts: linear terms with exact coefficients, and formulas over comparisons of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

__all__ = ["AllOf", "AnyOf", "Atom", "Formula", "Linear", "linear_sum", "scaled_term"]

_MOST_TERMS = 2**14  # of the disjunctive normal form

Variable = tuple[str, int]  # "X" or "Y", and its place in the flattened tensor
Linear = tuple[dict[Variable, Fraction], Fraction]  # coefficients and constant


class Formula(ABC):
    """What a file asserts."""

    @abstractmethod
    def terms(self) -> list[tuple[Atom, ...]]:
        """Disjunctive normal form: any of all of.  ValueError for too many alternatives."""

    def conjuncts(self) -> Iterator[Formula]:
        """What must all be so."""
        yield self

    @property
    def bounds_input(self) -> bool:
        """Whether it compares one input with a number, and nothing else."""
        return False


@dataclass(frozen=True, slots=True)
class Atom(Formula):
    """sum of coefficients * variable + constant <= 0, or < 0."""

    coefficients: dict[Variable, Fraction]
    constant: Fraction
    strict: bool

    def terms(self) -> list[tuple[Atom, ...]]:
        return [(self,)]

    @property
    def bounds_input(self) -> bool:
        return self.side == "X"

    @property
    def side(self) -> str:
        """ "X" for a comparison of one input, "Y" for one of outputs, "" for one of numbers; ValueError for others."""
        sides = {side for side, _ in self.coefficients}
        if sides == {"X"} and len(self.coefficients) == 1:
            return "X"
        if sides <= {"Y"}:
            return "Y" if sides else ""
        names = ", ".join(f"{side}_{place}" for side, place in sorted(self.coefficients)[:4])
        raise ValueError(f"compares {names}: only one input with a number, or outputs, are understood")


@dataclass(frozen=True, slots=True)
class AnyOf(Formula):
    """At least one of several."""

    parts: Sequence[Formula]

    def terms(self) -> list[tuple[Atom, ...]]:
        found = [term for part in self.parts for term in part.terms()]
        _require_few(len(found))
        return found


@dataclass(frozen=True, slots=True)
class AllOf(Formula):
    """Each of several."""

    parts: Sequence[Formula]

    def terms(self) -> list[tuple[Atom, ...]]:
        found = [part.terms() for part in self.parts]
        _require_few(math.prod(map(len, found)))
        return [tuple(atom for term in choice for atom in term) for choice in product(*found)]

    def conjuncts(self) -> Iterator[Formula]:
        for part in self.parts:
            yield from part.conjuncts()


def _require_few(terms: int) -> None:
    if terms > _MOST_TERMS:
        raise ValueError(f"has more than {_MOST_TERMS} alternatives")


def linear_sum(terms: list[Linear]) -> Linear:
    """Like variables together."""
    coefficients: dict[Variable, Fraction] = {}
    for found, _ in terms:
        for variable, c in found.items():
            coefficients[variable] = coefficients.get(variable, Fraction(0)) + c
    return {v: c for v, c in coefficients.items() if c}, sum((d for _, d in terms), Fraction(0))


def scaled_term(term: Linear, factor: Fraction) -> Linear:
    """The term times a number; ValueError where that grows without end."""
    if max(factor.numerator.bit_length(), factor.denominator.bit_length()) > 20000:
        raise ValueError("multiplies to a number of more than 6,000 digits")
    return {v: c * factor for v, c in term[0].items() if factor}, term[1] * factor
