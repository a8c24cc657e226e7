"""Values that change during training: frozen functions of the position in epochs.

Position 3.25 is a quarter of the fourth epoch in. A ramp stands still before `begin`, so a warm-up is a ramp that
begins later, and stays at its end value after `begin + length`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from optrelax.checks import require_range

__all__ = ["ConstantSchedule", "LinearRamp", "Schedule", "SmoothRamp", "Stages", "StepDecay"]


@runtime_checkable
class Schedule(Protocol):
    """What every schedule is: a function of the position in epochs."""

    def __call__(self, epoch: float) -> float:
        """The value at a position in epochs."""


@dataclass(frozen=True, slots=True)
class ConstantSchedule:
    """The same value throughout."""

    value: float

    def __post_init__(self) -> None:
        _require_finite(self, value=self.value)

    def __call__(self, epoch: float) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class LinearRamp:
    """From `start` to `end` along a line, over `length` epochs from epoch `begin` on; length 0 is a jump."""

    start: float
    end: float
    begin: float = 0.0
    length: float = 0.0

    def __post_init__(self) -> None:
        _require_finite(self, start=self.start, end=self.end)
        _require_span(self, self.begin, self.length)

    def __call__(self, epoch: float) -> float:
        return _mix(self.start, self.end, _fraction(epoch, self.begin, self.length))


@dataclass(frozen=True, slots=True)
class SmoothRamp:
    """From `start` to `end` slowly first: a power up to the share `mid` of the way, then the line tangent to it.

    With t the share of `length` done: a t^power for t <= mid, beyond it a line of slope a power mid^(power - 1),
    and a such that t = 1 gives the end.  Source: Gowal et al. 2018 (their code's smooth schedule); Zhang et al.
    2020 use it with mid 0.25 and power 4.
    """

    start: float
    end: float
    begin: float = 0.0
    length: float = 0.0
    mid: float = 0.25
    power: float = 4.0

    def __post_init__(self) -> None:
        _require_finite(self, start=self.start, end=self.end)
        _require_span(self, self.begin, self.length)
        require_range("SmoothRamp", "in (0, 1]", mid=self.mid)
        require_range("SmoothRamp", "at least 1 and finite", power=self.power)

    def __call__(self, epoch: float) -> float:
        t, mid, power = _fraction(epoch, self.begin, self.length), self.mid, self.power
        # In units of the power's value at mid: 1 there, 1 + power (1 - mid) / mid at the end.
        whole = 1 + power * (1 - mid) / mid
        done = (t / mid) ** power if t <= mid else 1 + power * (t - mid) / mid
        return _mix(self.start, self.end, 1.0 if t == 1 else done / whole)


@dataclass(frozen=True, slots=True)
class StepDecay:
    """`start`, multiplied by `factor` at each epoch of `at`: a learning rate with milestones."""

    start: float
    factor: float = 0.1
    at: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require_finite(self, start=self.start, factor=self.factor)
        object.__setattr__(self, "at", tuple(self.at))
        if list(self.at) != sorted(self.at) or not all(0 <= epoch < math.inf for epoch in self.at):
            raise ValueError(f"StepDecay: at must be epochs in ascending order, got {self.at}")

    def __call__(self, epoch: float) -> float:
        return self.start * self.factor ** sum(epoch >= milestone for milestone in self.at)


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Stages(Generic[Value]):
    """Things that take turns: `values[i]` from epoch `begins[i]` on; the first begins at 0.

    Losses in `Training`: a cheap relaxation first, the tight one at the end.
    """

    values: tuple[Value, ...]
    begins: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "begins", tuple(self.begins))
        if len(self.values) != len(self.begins) or not self.values:
            raise ValueError(
                f"Stages: wants one begin a value, got {len(self.values)} values and {len(self.begins)} begins"
            )
        if self.begins[0] != 0 or list(self.begins) != sorted(set(self.begins)):
            raise ValueError(f"Stages: begins must ascend from epoch 0, got {self.begins}")

    def __call__(self, epoch: float) -> Value:
        """The value whose turn it is."""
        return self.values[sum(epoch >= begin for begin in self.begins) - 1]


def _fraction(epoch: float, begin: float, length: float) -> float:
    """The share of the ramp that is done, in [0, 1]."""
    if length == 0:
        return float(epoch >= begin)
    return min(max((epoch - begin) / length, 0.0), 1.0)


def _mix(start: float, end: float, share: float) -> float:
    # This form gives both ends exactly, where start + share * (end - start) may miss the end by an ulp.
    return (1 - share) * start + share * end


def _require_finite(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{type(owner).__name__}: {name} must be finite, got {value}")


def _require_span(owner: object, begin: float, length: float) -> None:
    if not 0 <= begin < math.inf or not 0 <= length < math.inf:
        raise ValueError(
            f"{type(owner).__name__}: begin and length must be >= 0 epochs, got begin {begin}, length {length}"
        )
