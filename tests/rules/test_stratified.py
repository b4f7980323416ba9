"""Stratified selection: exact shares, exact probabilities, and no bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_gradmatch import Candidates
from composer_gradmatch.rules import stratified as module
from composer_gradmatch.rules.stratified import allocate, stratified


def with_counts(*counts):
    labels = torch.cat([torch.full((count,), 7 * label - 3) for label, count in enumerate(counts)])
    return Candidates(len(labels), labels=labels[torch.randperm(len(labels))])


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.data())
def test_shares_are_the_quotas_rounded_down_or_up(counts, data):
    m = data.draw(st.integers(1, sum(counts)))
    shares = allocate(torch.tensor(counts), m)
    quotas = [m * count / sum(counts) for count in counts]
    assert int(shares.sum()) == m
    for share, quota, count in zip(shares.tolist(), quotas, counts, strict=True):
        assert int(quota) <= share <= min(count, int(quota) + 1)
        assert quota < 1 or share >= 1


def test_remainders_go_to_the_largest_first():
    shares = {tuple(allocate(torch.tensor([40, 33, 27]), 10).tolist()) for _ in range(20)}
    assert shares == {(4, 3, 3)}  # Quotas 4, 3.3 and 2.7.
    torch.manual_seed(0)
    shares = {tuple(allocate(torch.tensor([5, 5, 5]), 7).tolist()) for _ in range(60)}
    assert shares == {(3, 2, 2), (2, 3, 2), (2, 2, 3)}


@pytest.mark.parametrize(
    ("counts", "m"), [((1, 2, 3), 2), ((9, 1, 2), 4), ((1, 1, 1, 1), 3), ((6, 2, 1, 3), 5)], ids=str
)
def test_a_class_of_a_quota_below_one_is_picked_with_exactly_that_probability(counts, m, monkeypatch):
    """Over all offsets of systematic sampling and many orders of classes."""
    total = sum(counts)
    for seed in range(5):
        given = torch.zeros(len(counts), dtype=torch.int64)
        for offset in range(total):
            torch.manual_seed(seed)
            monkeypatch.setattr(module.torch, "randint", lambda high, size, at=offset: torch.tensor(at))
            given += allocate(torch.tensor(counts), m)
        monkeypatch.undo()
        for count, times in zip(counts, given.tolist(), strict=True):
            if m * count < total:
                assert times == m * count


@pytest.mark.parametrize(
    ("counts", "m"), [((8, 4, 4), 4), ((7, 2, 1), 3), ((1,) * 6, 2), ((3, 2, 2), 2), ((5, 5), 10)], ids=str
)
def test_the_estimate_of_the_mean_is_unbiased(counts, m):
    """Each sample's mean coefficient wᵢ/n is 1/M, within its own standard error."""
    torch.manual_seed(1)
    seen, draws = with_counts(*counts), 2500
    coefficients = torch.zeros(draws, sum(counts)).double()
    for row in coefficients:
        picks = stratified(seen, m)
        assert len(picks.indices) == m
        row[picks.indices] = picks.weights / m
    error = (coefficients.std(0) / draws**0.5).clamp(min=1e-12)
    assert float(((coefficients.mean(0) - 1 / sum(counts)).abs() / error).max()) < 4


def test_weights_make_each_class_count_as_in_the_minibatch():
    torch.manual_seed(0)
    seen = with_counts(10, 6, 4)
    picks = stratified(seen, 7)
    for label, count in zip(*seen.labels.unique(return_counts=True), strict=True):
        of_class = seen.labels[picks.indices] == label
        assert float(picks.weights[of_class].sum() / 7) == pytest.approx(int(count) / 20)


def test_of_samples_all_of_one_class_any_are_picked():
    picks = stratified(with_counts(9), 4)
    assert len(set(picks.indices.tolist())) == 4
    assert picks.weights.tolist() == pytest.approx([1.0] * 4)


def test_what_cannot_be_picked_is_refused():
    with pytest.raises(ValueError, match="m must be between 1 and the number of samples, 3; got 4"):
        stratified(with_counts(2, 1), 4)
    with pytest.raises(ValueError, match="asks for the samples' classes"):
        stratified(Candidates(3), 1)
