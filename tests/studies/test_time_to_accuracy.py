"""When runs first reach an accuracy, against a plain loop."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_gradmatch.studies.time_to_accuracy import first_reached, time_to_accuracy

RUNS = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6)
COSTS = [0.2, 0.5, 0.9]


@given(RUNS, st.floats(0, 1))
def test_the_first_evaluation_at_the_target_counts(runs, target):
    found = time_to_accuracy([(run, COSTS) for run in runs], target)
    expected = []
    for run in runs:
        place = 0
        while place < 3 and run[place] < target:
            place += 1
        expected.append(COSTS[place] if place < 3 else float("inf"))
    reached = [each for each in expected if each < float("inf")]
    assert (found.reached, found.runs) == (len(reached), len(runs))
    assert (found.cost or float("inf")) == median(expected)
    assert found.low == min(reached, default=None)
    assert found.high == (max(reached) if len(reached) == len(runs) else None)


def test_in_words():
    assert first_reached([0.5, 0.9, 0.8], COSTS, 0.8) == 0.5
    assert str(time_to_accuracy([([0.5, 0.9, 0.9], COSTS), ([0.9, 0.9, 0.9], COSTS)], 0.8)) == "0.35 (0.20 to 0.50)"
    assert str(time_to_accuracy([([0.9], [0.2]), ([0.9], [0.3]), ([0.1], [1.0])], 0.8)) == "0.30 (0.20 to never)"
    assert str(time_to_accuracy([([0.1], [1.0])], 0.8)) == "reached by 0 of 1 runs"
    with pytest.raises(ValueError, match="zip"):
        first_reached([0.1], [], 0.8)
