"""Properties of a network: boxes in, any and all of linear conditions out, in exact numbers as a file states them.

A property says what must not happen, as VNN-LIB does: it holds if no input of a case's box gives outputs that meet one
of the case's clauses, and a clause is met where all its halfspaces are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from optrelax.regions import InputBox, Region, require_box
from optrelax.specifications import Specification

__all__ = ["Case", "Halfspace", "Property", "avoiding"]


@dataclass(frozen=True, slots=True)
class Halfspace:
    """All outputs y with sum of coefficients * y + constant <= 0; `strict`: < 0."""

    coefficients: tuple[tuple[int, Fraction], ...]
    """Of the outputs that it names, in their order, none 0."""
    constant: Fraction
    strict: bool = False

    def scaled(self) -> Halfspace:
        """The same halfspace in whole numbers, where floats hold those exactly and not the coefficients as they are."""
        numbers = [c for _, c in self.coefficients]
        factor = math.lcm(*(n.denominator for n in numbers))
        if not all(map(_exact, numbers)) and all(_exact(n * factor) for n in numbers):
            rows = tuple((i, c * factor) for i, c in self.coefficients)
            return Halfspace(rows, self.constant * factor, self.strict)
        return self


_MOST = 2**120  # of a coefficient: single precision holds it


def _exact(number: Fraction) -> bool:
    return abs(number) < _MOST and Fraction(float(number)) == number


@dataclass(frozen=True, slots=True)
class Case:
    """A box of inputs, ends included unless `open` names them, and the clauses that outputs must not meet there."""

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]
    clauses: tuple[tuple[Halfspace, ...], ...]
    """Any of all of. A clause of no halfspaces is met by every output."""
    open: frozenset[tuple[int, str]] = frozenset()
    """(input, "lower" or "upper") of the ends that do not belong to the box."""

    def outer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ends in `dtype` that enclose the box, [inputs] each: the nearest float outside where an end is none."""
        return _rounded(self.lower, dtype, -1), _rounded(self.upper, dtype, 1)

    def inner(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ends in `dtype` that the box encloses, [inputs] each: crossed where it holds no float at all."""
        lower, upper = _rounded(self.lower, dtype, 1), _rounded(self.upper, dtype, -1)
        for i, end in self.open:
            ends, exact, side = (lower, self.lower, 1) if end == "lower" else (upper, self.upper, -1)
            if Fraction(float(ends[i])) == exact[i]:
                ends[i] = torch.nextafter(ends[i], torch.tensor(side * math.inf, dtype=dtype, device="cpu"))
        return lower, upper


def _rounded(numbers: Sequence[Fraction], dtype: torch.dtype, side: int) -> Tensor:
    """The nearest float at most (side -1) or at least (side 1) each number; infinite past the largest."""
    kind = np.float32 if dtype == torch.float32 else np.float64
    most = Fraction(float(np.finfo(kind).max))
    found = np.empty(len(numbers), kind)
    for i, number in enumerate(numbers):
        if abs(number) > most:
            away = (number > 0) == (side > 0)
            found[i] = (1 if number > 0 else -1) * (math.inf if away else float(most))
            continue
        near = kind(float(number))
        if not math.isfinite(near):
            near = kind((1 if number > 0 else -1) * float(most))
        error = Fraction(float(near)) - number
        found[i] = np.nextafter(near, kind(side * math.inf)) if error * side < 0 else near
    return torch.from_numpy(found)


@dataclass(frozen=True, slots=True)
class Property:
    """What must not happen, case by case.  Made by `read_property`, or by hand.

    Args:
        inputs: of the network, flattened.
        outputs: of the network, flattened.
        cases: boxes of inputs with what outputs must not meet there.

    Raises:
        ValueError: for a case of other inputs or outputs, or whose ends cross.

    Example:
        >>> region = ox.InputBox(torch.zeros(1, 2), torch.ones(1, 2))
        >>> above = ox.Property.of(region, ox.Specification(torch.tensor([[1.0]]), offsets=-3.0))  # y0 > 3
        >>> above.inputs, above.outputs, len(above.cases)
        (2, 1, 1)
    """

    inputs: int
    outputs: int
    cases: tuple[Case, ...]
    """Boxes that hold no input are left out: without cases a property holds."""

    def __post_init__(self) -> None:
        for case in self.cases:
            if not len(case.lower) == len(case.upper) == self.inputs:
                raise ValueError(f"Property: a case has {len(case.lower)} inputs, the property {self.inputs}")
            if any(l > u for l, u in zip(case.lower, case.upper, strict=True)):
                raise ValueError("Property: a case's lower end exceeds its upper end")
            named = [i for clause in case.clauses for half in clause for i, _ in half.coefficients]
            if named and not 0 <= min(named) <= max(named) < self.outputs:
                raise ValueError(f"Property: a halfspace names output {max(named)} of {self.outputs}")

    @classmethod
    def of(cls, region: Region, spec: Specification) -> Property:
        """Broken where the specification is, at a point of an example's box: a case an example, in exact numbers.

        region [batch, *input_shape]; a `LinfBall` is the box around it in real arithmetic.
        Raises ValueError where the specification is of another batch, or not exact.
        """
        region = require_box("Property", region, "give the box around it")
        if type(region) is not InputBox:
            region = region.outward()
        batch = region.shape[0]
        spec = spec.flat()
        if spec.slack is not None or not bool(spec.offsets.isfinite().all()):
            raise ValueError("Property: the specification stands for others' coefficients; give the exact ones")
        spec.require_fit("Property", spec.rows.shape[-1], torch.Size([batch]))
        lower, upper = (end.detach().double().flatten(1).tolist() for end in (region.lower, region.upper))
        rows = spec.rows.detach().double().expand(batch, -1, -1).tolist()
        offsets = spec.offsets.detach().double().expand(batch, -1).tolist()
        strict = spec.closed.tolist()
        cases = []
        for i in range(batch):
            halves = [_halfspace(*parts) for parts in zip(rows[i], offsets[i], strict, strict=True)]
            clauses = tuple(tuple(halves[k] for k in group) for group in spec.groups)
            cases.append(Case(tuple(map(Fraction, lower[i])), tuple(map(Fraction, upper[i])), clauses))
        return cls(len(lower[0]), spec.rows.shape[-1], tuple(cases))


def _halfspace(row: Sequence[float], offset: float, strict: bool) -> Halfspace:
    """Where a row's value is <= 0, or < 0."""
    return Halfspace(tuple((i, Fraction(c)) for i, c in enumerate(row) if c), Fraction(offset), strict)


def avoiding(clauses: Sequence[Sequence[Halfspace]], outputs: int, dtype: torch.dtype) -> Specification:
    """Fulfilled by outputs that meet none of the clauses; each halfspace is a row, one that repeats the same."""
    places: dict[Halfspace, int] = {}
    groups = tuple(tuple(places.setdefault(half.scaled(), len(places)) for half in c) for c in clauses)
    rows = torch.zeros(len(places), outputs, dtype=dtype, device="cpu")
    slack = torch.zeros_like(rows)
    for half, k in places.items():
        for i, c in half.coefficients:
            if abs(c) >= _MOST:
                raise ValueError(f"Specification: the coefficient of output {i} exceeds 2**120")
            rows[k, i] = float(c)
            slack[k, i] = _rounded([abs(c - Fraction(float(rows[k, i])))], dtype, 1)[0]
    offsets = _rounded([half.constant for half in places], dtype, -1)
    closed = torch.tensor([half.strict for half in places], dtype=torch.bool, device="cpu")
    return Specification(rows, offsets, groups, closed=closed, slack=slack if bool(slack.any()) else None)
