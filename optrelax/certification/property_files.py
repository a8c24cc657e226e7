"""Properties from VNN-LIB files, 1.0 and 2.0, plain or gzipped.

Written here, for want of a reader that is right on the competition's files: the `vnnlib` package reads 2.0 in one
version (1.0.2) and 1.0 in another (0.0.1), of one name, neither of them gzip nor exponents; its transformation into
boxes and polytopes takes several disjunctions for alternatives (ACAS Xu's property 6 becomes one of unbounded inputs),
and gives floats where a bound must know on which side of them the decimal lies.
What is not understood to the last word is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable
from fractions import Fraction
from pathlib import Path
from typing import Any

from optrelax.certification.vnnlib_formulas import (
    AllOf,
    AnyOf,
    Atom,
    Formula,
    Linear,
    linear_sum,
    scaled_term,
)
from optrelax.certification.vnnlib_text import (
    Expression,
    expressions,
    joined_indices,
    parse_decimal,
    parse_integers,
    read_text,
    shown,
)
from optrelax.properties import Case, Halfspace, Property

__all__ = ["read_property"]

_NEGATED = {"<=": ">", ">=": "<", "<": ">=", ">": "<=", "=": "!=", "!=": "="}
_TYPES = ("real", "float32", "float64", "f32", "f64")


def read_property(path: str | os.PathLike[str]) -> Property:
    r"""The property of a VNN-LIB file, with its decimals as exact fractions.

    Understood: declarations of X_0, ..., Y_0, ... (1.0) or of one network with one input and one output (2.0; entries
    are counted row by row), assertions of and, or, not over comparisons of linear terms. A comparison must be of one
    input with a number, or of outputs.

    Args:
        path: the file, plain or packed by gzip.

    Returns:
        What must not happen, case by case.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: with the line, for anything else.

    Example:
        >>> lines = ["(declare-const X_0 Real)", "(declare-const Y_0 Real)", "(assert (>= X_0 0.1))"]
        >>> lines += ["(assert (<= X_0 0.2))", "(assert (<= Y_0 0))"]
        >>> with open("low.vnnlib", "w") as file:
        ...     _ = file.write("\n".join(lines))
        >>> found = ox.read_property("low.vnnlib")
        >>> found.inputs, found.outputs, str(found.cases[0].upper[0])
        (1, 1, '1/5')
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return parse_property(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def parse_property(text: str) -> Property:
    """The property that a VNN-LIB text states.  Errors as `read_property`."""
    reader = _PropertyReader()
    for line, expression in expressions(text):
        try:
            reader.take(expression)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None
    return reader.property()


class _PropertyReader:
    """What the file has said so far."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}  # 2.0: name to side and shape
        self.places: dict[str, set[int]] = {"X": set(), "Y": set()}  # 1.0: what is declared
        self.assertions: list[Formula] = []
        self.version = ""

    def take(self, expression: list[Any]) -> None:
        """One top-level list."""
        match expression:
            case ["assert", body]:
                self._require_names()
                self.assertions.append(self._formula(body, False))
            case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"]:
                self._declare(name)
            case ["vnnlib-version", str(version)]:
                if self.version or self.shapes or version not in ("<1.0>", "<2.0>"):
                    raise ValueError(f"version {version} is not known here; <1.0> and <2.0> are")
                self.version = version
            case ["declare-network", str(_), *parts]:
                self._network(parts)
            case ["set-logic", str(_)] | ["check-sat"]:
                pass
            case _:
                raise ValueError(f"not understood: {shown(expression)}")

    def _declare(self, name: str) -> None:
        match = re.fullmatch(r"([XY])_(0|[1-9]\d{0,8})", name)
        if self.shapes or self.version == "<2.0>" or match is None or int(match[2]) in self.places[match[1]]:
            raise ValueError(f"declares {name!r}; X_0, X_1, ... and Y_0, ... are wanted, each once")
        self.places[match[1]].add(int(match[2]))

    def _network(self, parts: list[Any]) -> None:
        if self.shapes or any(self.places.values()):
            raise ValueError("declares a second network; properties of one are understood")
        for part in parts:
            match part:
                case ["declare-input" | "declare-output" as kind, str(name), str(dtype), str(shape)]:
                    side = "X" if kind == "declare-input" else "Y"
                    if name in self.shapes or any(s == side for s, _ in self.shapes.values()):
                        raise ValueError("wants one input and one output")
                    if dtype.lower() not in _TYPES:
                        raise ValueError(f"{name} is of type {dtype}; wants one of {', '.join(_TYPES)}")
                    self.shapes[name] = (side, parse_integers(shape, 1))
                case _:
                    raise ValueError(f"not understood: {shown(part)}")
        self._require_names()

    def _require_names(self) -> None:
        sides = [side for side, _ in self.shapes.values()]
        if sorted(sides) != ["X", "Y"] if sides else not all(self.places.values()):
            raise ValueError("inputs and outputs must be declared first, each")

    def sizes(self) -> tuple[int, int]:
        """How many inputs and outputs there are."""
        if self.shapes:
            found = {side: math.prod(shape) for side, shape in self.shapes.values()}
            if max(found.values()) > 2**24:
                raise ValueError("declares a tensor of more than 2**24 numbers")
            return found["X"], found["Y"]
        for side, places in self.places.items():
            if not places or places != set(range(len(places))):
                raise ValueError(f"{side}_0 to {side}_{max(places, default=0)} must all be declared")
        return len(self.places["X"]), len(self.places["Y"])

    def _formula(self, body: Expression, negated: bool) -> Formula:
        match body if isinstance(body, str) else joined_indices(body):
            case ["and" | "or" as connective, *parts] if parts:
                found = [self._formula(part, negated) for part in parts]
                return AllOf(found) if (connective == "and") != negated else AnyOf(found)
            case ["not", part]:
                return self._formula(part, not negated)
            case ["<=" | ">=" | "<" | ">" | "=" | "==" | "!=" as sign, left, right]:
                sign = "=" if sign == "==" else str(sign)
                return self._comparison(_NEGATED[sign] if negated else sign, left, right)
        raise ValueError(f"not understood: {shown(body)}")

    def _comparison(self, sign: str, left: Expression, right: Expression) -> Formula:
        (a, b), (c, d) = self._linear(left), self._linear(right)
        difference = linear_sum([(a, b), scaled_term((c, d), Fraction(-1))])
        opposite = scaled_term(difference, Fraction(-1))
        below, above = (Atom(*side, strict=sign in ("<", ">", "!=")) for side in (difference, opposite))
        if sign in ("=", "!="):
            return AllOf([below, above]) if sign == "=" else AnyOf([below, above])
        return below if sign in ("<=", "<") else above

    def _linear(self, term: Expression) -> Linear:
        """Coefficients and constant of a linear term."""
        if isinstance(term, str):
            return self._plain(term)
        operator, terms = term[:1], [self._linear(t) for t in joined_indices(term[1:])]
        match operator, terms:
            case ["+"], [_, *_]:
                return linear_sum(terms)
            case ["-"], [only]:
                return scaled_term(only, Fraction(-1))
            case ["-"], [first, *others] if others:
                return linear_sum([first, *(scaled_term(other, Fraction(-1)) for other in others)])
            case ["*"], [_, *_] if len(terms) <= 16:
                varying = [t for t in terms if t[0]]
                factor = math.prod((constant for found, constant in terms if not found), start=Fraction(1))
                if len(varying) <= 1:
                    return scaled_term(varying[0], factor) if varying else ({}, factor)
            case ["/"], [first, (found, divisor)] if divisor and not found:
                return scaled_term(first, 1 / divisor)
        raise ValueError(f"not a linear term: {shown(term)}")

    def _plain(self, token: str) -> Linear:
        """A number or a variable."""
        if token[0].isdigit() or token[0] in "-.":
            return {}, parse_decimal(token)
        name, bracket, indices = token.partition("[")
        if self.shapes:
            side, shape = self.shapes.get(name, ("", ()))
            index = parse_integers("[" + indices) if bracket else ()
            if not side or len(index) != len(shape) or any(i >= n for i, n in zip(index, shape, strict=True)):
                raise ValueError(f"{token} is no declared entry")
            place = 0
            for i, n in zip(index, shape, strict=True):
                place = place * n + i
            return {(side, place): Fraction(1)}, Fraction(0)
        side, _, number = token.partition("_")
        if not re.fullmatch(r"[XY]_(0|[1-9]\d{0,8})", token) or int(number) not in self.places[side]:
            raise ValueError(f"{token} is not declared")
        return {(side, int(number)): Fraction(1)}, Fraction(0)

    def property(self) -> Property:
        """All that was said, as cases."""
        self._require_names()
        inputs, outputs = self.sizes()
        common = _Box()
        rest: list[Formula] = []
        for assertion in self.assertions:
            for part in assertion.conjuncts():
                if not part.bounds_input:
                    rest.append(part)
                    continue
                for (atom,) in part.terms():
                    common.tighten(atom)
        boxes: dict[Hashable, tuple[_Box, list[tuple[Halfspace, ...]]]] = {}
        for term in AllOf(rest).terms():
            own = _Box()
            clause: dict[Halfspace, None] = {}
            possible = True
            for atom in term:
                if atom.bounds_input:
                    own.tighten(atom)
                elif atom.side == "Y":
                    row = tuple((place, c) for (_, place), c in sorted(atom.coefficients.items()))
                    clause[Halfspace(row, atom.constant, atom.strict)] = None
                else:
                    possible &= atom.constant < 0 or (atom.constant == 0 and not atom.strict)
            if possible:
                boxes.setdefault(own.key(), (own, []))[1].append(tuple(clause))
        if len(boxes) * inputs > 2**26:
            raise ValueError(f"{len(boxes)} boxes of {inputs} inputs are more than is read")
        cases = (common.case(own, inputs, tuple(dict.fromkeys(clauses))) for own, clauses in boxes.values())
        return Property(inputs, outputs, tuple(case for case in cases if case is not None))


class _Box:
    """Ends by input: (value, whether it does not belong)."""

    def __init__(self) -> None:
        self.lower: dict[int, tuple[Fraction, bool]] = {}
        self.upper: dict[int, tuple[Fraction, bool]] = {}

    def tighten(self, atom: Atom) -> None:
        """By c x + d <= 0."""
        (((_, place), c),) = atom.coefficients.items()
        end = (-atom.constant / c, atom.strict)
        if c > 0:  # the lesser value, at equal ones the open end
            self.upper[place] = min(self.upper.get(place, end), end, key=lambda e: (e[0], not e[1]))
        else:
            self.lower[place] = max(self.lower.get(place, end), end, key=lambda e: (e[0], e[1]))

    def key(self) -> Hashable:
        """Equal for equal boxes."""
        return tuple(sorted(self.lower.items())), tuple(sorted(self.upper.items()))

    def case(self, own: _Box, inputs: int, clauses: tuple[tuple[Halfspace, ...], ...]) -> Case | None:
        """Both boxes in one; None where they hold nothing."""
        both = _Box()
        both.lower, both.upper = dict(self.lower), dict(self.upper)
        for place, end in own.lower.items():
            both.lower[place] = max(both.lower.get(place, end), end)
        for place, end in own.upper.items():
            both.upper[place] = min(both.upper.get(place, end), end, key=lambda e: (e[0], not e[1]))
        for ends, word in ((both.lower, "lower"), (both.upper, "upper")):
            missing = next((i for i in range(inputs) if i not in ends), None)
            if missing is not None:
                raise ValueError(f"input {missing} has no {word} end; a box needs both of every input")
        lower, upper = ([ends[i] for i in range(inputs)] for ends in (both.lower, both.upper))
        if any(l[0] > u[0] or (l[0] == u[0] and (l[1] or u[1])) for l, u in zip(lower, upper, strict=True)):
            return None
        opened = {(i, "lower") for i, end in enumerate(lower) if end[1]}
        opened |= {(i, "upper") for i, end in enumerate(upper) if end[1]}
        return Case(tuple(e[0] for e in lower), tuple(e[0] for e in upper), clauses, frozenset(opened))
