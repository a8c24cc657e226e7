"""Random programs of every kind: what the layers say of them is so."""

from __future__ import annotations

from collections import Counter

import pytest
import random_programs


@pytest.mark.parametrize("faults", random_programs.KINDS, ids=lambda faults: faults.__name__)
def test_random_programs(faults: random_programs.Faults) -> None:
    """Twenty thousand by hand: `python -m tests.random_programs --count 20000`."""
    counts: Counter[str] = Counter()
    assert [fault for seed in range(6) for fault in faults(seed, counts)] == []
    assert {"OPTIMAL", "INFEASIBLE"} <= {said.split()[-1] for said in counts}
