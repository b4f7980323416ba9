"""Intervals against scipy and by hand; verdicts in words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from composer_gradmatch.studies.statistics import compare_at_cost, compare_paired, interval_of_median

FLOATS = st.floats(-1, 1, allow_subnormal=False).map(lambda value: round(value, 6))


@given(st.lists(FLOATS, min_size=2, max_size=20))
def test_paired_intervals_are_students(values):
    found = compare_paired(values)
    assert found.mean == pytest.approx(np.mean(values))
    if np.ptp(values) == 0:
        assert np.isnan(found.low)
        assert found.verdict == "not distinguishable"
    else:
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        significant = stats.ttest_1samp(values, 0).pvalue < 0.05
        assert (found.verdict != "not distinguishable") == significant


def test_verdicts_follow_the_interval():
    assert compare_paired([0.1, 0.11, 0.12]).verdict == "better"
    assert compare_paired([-0.1, -0.11, -0.12]).verdict == "worse"
    assert compare_paired([0.1, -0.11, 0.12]).verdict == "not distinguishable"


@pytest.mark.parametrize("values", [[], [0.3], [0.2, 0.2, 0.2]])
def test_without_a_spread_there_is_no_interval(values):
    found = compare_paired(values)
    assert found.verdict == "not distinguishable"
    assert np.isnan(found.low)
    assert found.pairs == len(values)


@given(st.lists(FLOATS, min_size=1, max_size=60))
def test_the_medians_interval_holds_the_median(values):
    low, high = interval_of_median(values)
    assert min(values) <= low <= np.median(values) <= high <= max(values)


def test_the_medians_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [interval_of_median(rng.exponential(size=15)) for _ in range(2000)]
    covered = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert 0.95 <= covered <= 0.975


def test_at_equal_cost_the_curve_is_read_between_its_points():
    curves = [[0.5, 0.7, 0.9], [0.52, 0.72, 0.92], [0.5, 0.72, 0.91]]
    costs = [0.1, 0.3, 1.0]
    exact = compare_at_cost([0.7, 0.72, 0.72], (0.3, 0.3, 0.3), costs, curves)
    assert exact.mean == pytest.approx(0)
    accuracies = np.array([0.62, 0.6, 0.63])
    found = compare_at_cost(accuracies, (0.2, 0.2, 0.2), costs, curves)
    linear = compare_paired(accuracies - [0.6, 0.62, 0.61])
    assert found.mean == pytest.approx(linear.mean)
    # Between the points the logarithm reads higher, so the interval reaches lower than the linear one's.
    share = np.log(2) / np.log(3)
    logarithmic = compare_paired(accuracies - [low + share * (high - low) for low, high, _ in curves])
    assert (found.low, found.high) == pytest.approx((logarithmic.low, linear.high))


def test_an_uncertain_cost_widens_the_interval():
    curves, costs = [[0.5, 0.9], [0.52, 0.9], [0.48, 0.91]], [0.1, 1.0]
    sure = compare_at_cost([0.8, 0.81, 0.79], (0.5, 0.5, 0.5), costs, curves)
    unsure = compare_at_cost([0.8, 0.81, 0.79], (0.5, 0.4, 0.7), costs, curves)
    assert unsure.low < sure.low < sure.high < unsure.high
    assert unsure.mean == sure.mean


def test_beyond_the_curve():
    curves, costs = [[0.5, 0.9], [0.52, 0.9], [0.48, 0.91]], [0.1, 1.0]
    assert compare_at_cost([0.9, 0.9, 0.9], (0.05, 0.05, 0.05), costs, curves).pairs == 0
    dear = compare_at_cost([0.8, 0.8, 0.8], (1.3, 1.2, 1.4), costs, curves)
    assert dear.mean == pytest.approx(0.8 - np.mean([0.9, 0.9, 0.91]))
