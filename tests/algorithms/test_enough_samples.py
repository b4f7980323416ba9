"""Picks are filled up where a step needs more samples than were picked; the weighted mean stays what it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from composer_gradmatch.algorithms.enough_samples import (
    enough_samples,
    fill_up,
    num_microbatches,
    smallest_microbatch,
)
from composer_gradmatch.forward.batch_norm import fewest_in_a_microbatch
from composer_gradmatch.rules.picks import Picks


def state(size):
    return SimpleNamespace(device_train_microbatch_size=size)


@given(n=st.integers(1, 60), size=st.one_of(st.none(), st.integers(1, 60)))
def test_microbatches_are_counted_as_they_are_split(n, size):
    parts = torch.arange(n).split(size or n)
    assert num_microbatches(n, size) == len(parts)
    assert smallest_microbatch(n, size) == min(map(len, parts))


@given(
    n=st.integers(1, 30),
    more=st.integers(0, 30),
    size=st.one_of(st.none(), st.integers(1, 40)),
    fewest=st.integers(1, 8),
    microbatches=st.integers(1, 5),
)
def test_the_number_is_the_smallest_that_is_enough(n, more, size, fewest, microbatches):
    found = enough_samples(n, n + more, state(size), fewest, microbatches)
    fits = [
        k
        for k in range(n, n + more + 1)
        if min(map(len, torch.arange(k).split(size or k))) >= fewest
        and len(torch.arange(k).split(size or k)) >= microbatches
    ]
    assert found == (fits[0] if fits else n)


@given(n=st.integers(1, 10), more=st.integers(0, 10))
def test_filling_up_keeps_the_weighted_mean(n, more):
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(25, generator=generator).double()
    indices, weights = torch.randperm(25, generator=generator)[:n], torch.rand(n, generator=generator).double()
    filled = fill_up(Picks(indices, weights), 25, n + more)
    assert len(set(filled.indices.tolist())) == n + more
    torch.testing.assert_close((filled.weights * values[filled.indices]).mean(), (weights * values[indices]).mean())


@given(n=st.integers(1, 10), more=st.integers(0, 10))
def test_picks_without_weights_are_filled_up_with_more_of_them(n, more):
    filled = fill_up(Picks(torch.arange(25)[-n:]), 25, n + more)
    assert filled.weights is None
    assert len(set(filled.indices.tolist())) == n + more


@pytest.mark.parametrize("weights", [None, torch.ones(2)])
def test_what_is_to_come_last_is_added_where_nothing_else_is_left(weights):
    picks, last = Picks(torch.tensor([4, 2]), weights), torch.tensor([0, 1, 3])
    assert fill_up(picks, 8, 5, last=last).indices.tolist() == [4, 2, 5, 6, 7]
    assert fill_up(picks, 8, 7, last=last).indices.tolist() == [4, 2, 5, 6, 7, 0, 1]


def test_weights_grow_by_what_the_mean_over_all_ranks_asks_for():
    filled = fill_up(Picks(torch.tensor([3]), torch.ones(1).double()), 5, 1, growth=1.5)
    assert filled.weights.tolist() == [1.5]


@pytest.mark.parametrize(
    ("layer", "fewest"), [(nn.BatchNorm1d(3), 2), (nn.BatchNorm2d(3).eval(), 1), (nn.GroupNorm(1, 3), 1)]
)
def test_batch_normalisation_takes_two(layer, fewest):
    assert fewest_in_a_microbatch(nn.Sequential(nn.Linear(3, 3), layer)) == fewest
