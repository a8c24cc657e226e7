"""Schedules: their ends, their shape against an independent statement, and what they refuse."""

import itertools

import numpy as np
import pytest

from optrelax.training.schedules import ConstantSchedule, LinearRamp, SmoothRamp, StepDecay

pytestmark = pytest.mark.smoke
RAMPS = [LinearRamp, SmoothRamp]


def test_constant_stays():
    assert [ConstantSchedule(0.3)(epoch) for epoch in (0.0, 1.5, 1000.0)] == [0.3] * 3


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (1.0, 0.5), (1.0, 0.0), (0.1, 0.3)])
def test_ramp_stands_still_before_and_after(ramp, start, end):
    schedule = ramp(start, end, begin=10.0, length=7.0)
    assert [schedule(epoch) for epoch in (0.0, 3.5, 10.0)] == [start] * 3
    assert [schedule(epoch) for epoch in (17.0, 17.5, 200.0)] == [end] * 3


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_is_monotone_and_never_jumps(ramp):
    values = [ramp(0.0, 1.0, begin=2.0, length=10.0)(2 + 10 * i / 1000) for i in range(1001)]
    steps = np.diff(values)
    assert (steps >= 0).all()
    assert steps.max() < 2e-3


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_of_no_length_jumps_at_its_begin(ramp):
    schedule = ramp(0.0, 0.1, begin=5.0)
    assert schedule(4.999) == 0
    assert schedule(5.0) == 0.1


def test_linear_is_a_line():
    schedule = LinearRamp(1.0, 0.5, begin=10.0, length=50.0)
    for epoch in (10.0, 20.25, 35.0, 59.0):
        assert schedule(epoch) == pytest.approx(1 - 0.5 * (epoch - 10) / 50, abs=1e-15)


def test_smooth_is_a_power_and_its_tangent():
    """The form of the published code: steps, alpha and a mid step."""
    start, end, first, last, mid, power = 0.0, 0.3, 20.0, 100.0, 0.25, 4.0
    middle = first + (last - first) * mid
    t = (middle - first) ** (power - 1)
    alpha = (end - start) / ((last - middle) * power * t + (middle - first) * t)
    value = start + alpha * (middle - first) ** power
    schedule = SmoothRamp(start, end, begin=first, length=last - first)
    for epoch in np.linspace(first, last, 33):
        expected = start + alpha * (epoch - first) ** power
        if epoch > middle:
            expected = value + (end - value) * (epoch - middle) / (last - middle)
        assert schedule(float(epoch)) == pytest.approx(expected, abs=1e-14)


def test_smooth_has_no_kink_where_the_line_begins():
    schedule = SmoothRamp(0.0, 1.0, length=1.0, mid=0.3, power=3.0)
    h = 1e-6
    left, right = (schedule(0.3 + side + h) - schedule(0.3 + side) for side in (-h, 0.0))
    assert left == pytest.approx(right, rel=1e-4)


def test_smooth_with_mid_1_is_the_power():
    schedule = SmoothRamp(0.0, 2.0, length=10.0, mid=1.0, power=2.0)
    assert schedule(5.0) == pytest.approx(0.5)
    assert schedule(10.0) == 2


def test_steps_multiply_at_each_milestone():
    schedule = StepDecay(5e-4, 0.1, at=(130.0, 190.0))
    values = [schedule(epoch) for epoch in (0.0, 129.99, 130.0, 189.0, 190.0, 500.0)]
    assert values == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantSchedule(float("nan")), "value must be finite"),
        (lambda: LinearRamp(0.0, float("inf")), "end must be finite"),
        (lambda: LinearRamp(0.0, 1.0, begin=-1.0), "begin and length must be >= 0"),
        (lambda: SmoothRamp(0.0, 1.0, length=-2.0), "begin and length must be >= 0"),
        (lambda: SmoothRamp(0.0, 1.0, mid=0.0), r"mid must lie in \(0, 1\], got 0.0"),
        (lambda: SmoothRamp(0.0, 1.0, power=0.5), "power must be at least 1"),
        (lambda: StepDecay(1.0, at=(5.0, 2.0)), r"ascending order, got \(5.0, 2.0\)"),
        (lambda: StepDecay(1.0, at=(-1.0,)), "ascending"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_values():
    schedules = [ConstantSchedule(1.0), LinearRamp(0.0, 1.0), SmoothRamp(0.0, 1.0), StepDecay(1.0)]
    for a, b in itertools.combinations(schedules, 2):
        assert a != b
    assert hash(LinearRamp(0.0, 1.0)) == hash(LinearRamp(0.0, 1.0))
