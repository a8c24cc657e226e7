"""Random modules: what is captured is the module's function, what cannot be is refused, and nothing else changes."""

import pytest
import random_modules
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_random_modules(start):
    """Ten thousand by hand: `python -m tests.random_modules --count 10000`."""
    found = {seed: reason for seed in range(start, start + 20) if (reason := random_modules.fault(seed)) is not None}
    assert not found


@pytest.mark.parametrize("name", random_modules.BAD)
def test_each_step_that_is_no_fixed_function_is_refused(name):
    net = random_modules.Program(["module", name], 3)
    assert random_modules.verdict(net, taken=False) is None


def test_random_numbers_that_do_not_show_in_the_output_are_refused_all_the_same():
    """The clamp at the end hides them from every probe."""
    assert random_modules.fault(1459) is None


@given(names=st.lists(st.sampled_from(sorted(set(random_modules.GOOD) - {"spectral norm"})), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_programs_drawn_by_hypothesis(names):
    assert random_modules.verdict(random_modules.Program(names, len(names)), taken=True) is None
