"""Checks of options: what lies where a message says, and what does not."""

import math
import re

import numpy as np
import pytest

from optrelax.checks import is_number, require_choice, require_range

RANGES = {
    "> 0": ((1e-300, math.inf), (0.0, -1.0, math.nan)),
    ">= 1 and finite": ((1, 1e300), (0.999, math.inf, math.nan)),
    "at least 2 epochs": ((2, math.inf), (1, math.nan)),
    "positive, in seconds": ((0.5,), (0, math.nan)),
    "a finite number >= 0": ((0.0, 3), (-1e-9, math.inf)),
    "in (0, 1]": ((1e-9, 1), (0, 1.1, math.nan)),
    "in [0, 1) (of all)": ((0, 0.999), (1, -0.1, math.nan)),
}


@pytest.mark.parametrize("wanted", RANGES)
def test_ranges_are_what_their_words_say(wanted):
    inside, outside = RANGES[wanted]
    require_range("Owner", wanted, optional=True, size=None, **{f"n{i}": value for i, value in enumerate(inside)})
    verb = "lie" if wanted.startswith("in ") else "be"
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"Owner: size must {verb} {wanted}, got {value}")):
            require_range("Owner", wanted, size=value)
    with pytest.raises(TypeError):
        require_range("Owner", wanted, size=None)


def test_choices_are_named():
    require_choice("Owner", "way", None, "up", "down", None)
    with pytest.raises(ValueError, match="Owner: way must be 'up', 'down' or None, got 'left'"):
        require_choice("Owner", "way", "left", "up", "down", None)


def test_a_bool_is_no_number():
    assert all(map(is_number, (1, np.float32(1), math.nan)))
    assert not any(map(is_number, (True, "1", None)))
