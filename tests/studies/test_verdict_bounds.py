"""Looking several times: intervals that all hold together, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from composer_gradmatch.studies.statistics import compare_paired
from composer_gradmatch.studies.verdict.bounds import LOOKS, further_seeds, nominal_level


def missed(alpha, draw, paths, rng):
    """The share of paths on which the interval of any look misses the mean 0; a plain loop over looks."""
    values = draw(rng, (paths, LOOKS[-1]))
    misses = np.zeros(paths, dtype=bool)
    for n in LOOKS:
        own = values[:, :n]
        half = stats.t.isf(nominal_level(alpha, n) / 2, n - 1) * own.std(axis=1, ddof=1) / n**0.5
        misses |= np.abs(own.mean(axis=1)) > half
    return misses.mean()


@pytest.mark.parametrize("alpha", [0.05, 0.004])
def test_over_all_looks_the_interval_misses_as_often_as_it_may(alpha):
    paths = 20_000
    found = missed(alpha, lambda rng, shape: rng.normal(0, 0.003, shape), paths, np.random.default_rng(1))
    deviation = (alpha * (1 - alpha) / paths) ** 0.5
    assert alpha - 5 * deviation < found < alpha + 3 * deviation


def test_looking_several_times_at_one_level_would_miss_more():
    values = np.random.default_rng(2).normal(size=(4000, LOOKS[-1]))
    p_values = np.array([stats.ttest_1samp(values[:, :n], 0, axis=1).pvalue for n in LOOKS])
    assert (p_values.min(axis=0) < 0.05).mean() > 0.12


def test_differences_counted_in_test_samples_are_no_less_safe():
    # Two networks that are each right on some 355 of 360 samples.
    def draw(rng, shape):
        return (rng.binomial(360, 0.987, shape) - rng.binomial(360, 0.987, shape)) / 360

    assert missed(0.05, draw, 10_000, np.random.default_rng(3)) < 0.06


def test_levels_rise_from_look_to_look_and_between_looks_the_next_one_counts():
    levels = [nominal_level(0.05, n) for n in LOOKS]
    assert levels == sorted(levels)
    assert 0.05 / len(LOOKS) < levels[-1] < 0.05
    assert nominal_level(0.05, LOOKS[1] - 1) == levels[1]
    assert nominal_level(0.05, 10 * LOOKS[-1]) == levels[-1]
    assert nominal_level(0.05, 2, (2,)) == pytest.approx(0.05, rel=0.03)


def test_a_tiny_error_is_divided_among_the_looks():
    levels = [nominal_level(1e-6, n) for n in LOOKS]
    assert sum(levels) == pytest.approx(1e-6)


def test_further_seeds_are_those_that_narrow_the_interval_enough():
    more = further_seeds(0.005, 0.01, 12, 0.004)
    assert more is not None
    n = 12 + more
    assert stats.t.isf(nominal_level(0.004, n) / 2, n - 1) * 0.01 / n**0.5 < 0.005
    earlier = [look for look in LOOKS if 12 < look < n]
    assert all(stats.t.isf(nominal_level(0.004, look) / 2, look - 1) * 0.01 / look**0.5 >= 0.005 for look in earlier)
    assert further_seeds(0.0, 0.01, 12, 0.004) is None
    assert further_seeds(1e-6, 0.01, 12, 0.004) is None


def test_a_least_spread_gives_pairs_that_are_all_the_same_an_interval():
    assert np.isnan(compare_paired([0.0] * 5).low)
    same = compare_paired([0.0] * 5, 0.05, 0.001)
    half = stats.t.isf(0.025, 4) * 0.001 / 5**0.5
    assert (same.low, same.high) == pytest.approx((-half, half))
    wide = [0.01, -0.01, 0.02, 0.0, 0.01]
    assert compare_paired(wide, 0.05, 0.001) == compare_paired(wide)
    assert compare_paired(wide, 0.01).low < compare_paired(wide).low
