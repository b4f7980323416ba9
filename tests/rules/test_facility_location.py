"""Facility location, against a plain greedy loop and the best of all sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from explicit import gradients, having

from composer_gradmatch import WholeBatch
from composer_gradmatch.rules.facility_location import facility_location, gradient_distances, lazy_greedy


def distances_of(rows):
    return np.linalg.norm(rows[:, None] - rows, axis=2)


def covered(distances, picks):
    """The sum of similarities: the largest distance less that to the nearest pick."""
    return (distances.max() - distances[list(picks)].min(0)).sum()


def plainly_greedy(distances, m):
    picks: list[int] = []
    while len(picks) < m:
        others = [j for j in range(len(distances)) if j not in picks]
        picks.append(max(others, key=lambda j: covered(distances, [*picks, j])))
    return picks


@pytest.mark.parametrize("seed", range(4))
def test_lazy_picks_are_the_greedy_ones_and_nearly_the_best(seed):
    rows = gradients(11, 3, seed)
    distances = distances_of(rows)
    np.testing.assert_allclose(gradient_distances(rows @ rows.T), distances, atol=1e-7)
    for m in (1, 2, 4, 7):
        picks = lazy_greedy(distances, m)
        assert picks == plainly_greedy(distances, m)
        best = max(covered(distances, each) for each in combinations(range(11), m))
        assert covered(distances, picks) >= (1 - 1 / np.e) * best


def test_many_samples_are_picked_as_by_a_plain_greedy_loop():
    distances = distances_of(gradients(60, 5, 7))
    assert lazy_greedy(distances, 25) == plainly_greedy(distances, 25)


def test_weights_are_the_sizes_of_clusters():
    rows = gradients(20, 3)
    picks = facility_location(having(rows), 6)
    nearest = distances_of(rows)[picks.indices].argmin(0)
    sizes = np.array([(nearest == each).sum() for each in range(6)])
    np.testing.assert_allclose(picks.weights, 6 * sizes / 20)
    assert float(picks.weights.sum()) == pytest.approx(6)
    estimate = picks.weights.numpy() @ rows[picks.indices] / 6
    np.testing.assert_allclose(estimate, rows[picks.indices.numpy()[nearest]].mean(0))
    bound = distances_of(rows)[picks.indices].min(0).mean()
    assert np.linalg.norm(estimate - rows.mean(0)) <= bound


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e8])
def test_duplicates_are_picked_once_and_stand_for_each_other(scale):
    rows = scale * np.repeat(gradients(3, 4), [5, 2, 1], 0)
    picks = facility_location(having(rows), 6)
    assert {int(i) for i in torch.searchsorted(torch.tensor([5, 7, 8]), picks.indices, right=True)} == {0, 1, 2}
    assert sorted(picks.weights.tolist()) == pytest.approx([3 / 8, 6 / 8, 15 / 8])
    estimate = picks.weights.numpy() @ rows[picks.indices] / 3
    np.testing.assert_allclose(estimate, rows.mean(0))


def test_samples_alike_are_one_pick_and_those_of_zero_none():
    picks = facility_location(having(np.repeat(gradients(1, 4), 5, 0)), 3)
    assert (len(picks.indices), picks.weights.tolist()) == (1, [1.0])
    assert facility_location(having(np.zeros((5, 2))), 3) == WholeBatch()
    with pytest.raises(ValueError, match="m must be between 1 and the number of samples, 5; got 6"):
        facility_location(having(gradients(5)), 6)


def test_all_samples_are_a_plain_mean():
    picks = facility_location(having(gradients(9)), 9)
    assert sorted(picks.indices.tolist()) == list(range(9))
    assert picks.weights.tolist() == pytest.approx([1.0] * 9)
