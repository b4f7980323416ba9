"""What a rule may return, and what is said of what it may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from composer_gradmatch import Picks, WholeBatch
from composer_gradmatch.rules.picks import as_picks


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
@pytest.mark.parametrize("weights", [None, [0.5, 1.5]])
def test_a_pair_becomes_picks(kind, weights):
    picks = as_picks((kind([3, 1]), None if weights is None else kind(weights)), 5, "mine", weighs=True)
    assert picks.indices.tolist() == [3, 1]
    assert picks.indices.dtype == torch.int64
    assert (picks.weights is None) if weights is None else picks.weights.tolist() == weights
    assert picks.found is None


def test_picks_and_the_whole_batch_pass_as_they_are():
    picks = Picks(torch.tensor([2]), torch.tensor([1.0]), {"surprise": 2.0})
    assert as_picks(picks, 3, "mine", weighs=True) is picks
    whole = WholeBatch("not today")
    assert as_picks(whole, 3, "mine", weighs=True) is whole


def test_small_integers_become_indices():
    picks = as_picks(Picks(torch.tensor([2, 0], dtype=torch.uint8), metrics={"a": 1.0}), 3, "mine", weighs=False)
    assert picks.indices.dtype == torch.int64
    assert picks.metrics == {"a": 1.0}


@pytest.mark.parametrize(
    ("result", "kind", "says"),
    [
        (None, TypeError, "must return Picks or a pair"),
        ([1, 2], TypeError, "must return Picks or a pair"),
        ((torch.tensor([1]),), TypeError, "must return Picks or a pair"),
        ((torch.tensor([]), None), ValueError, "at least one index"),
        ((torch.tensor([1.0]), None), ValueError, "as integers; got"),
        ((torch.tensor([True, False]), None), ValueError, "as integers; got"),
        ((torch.tensor([[1, 2]]), None), ValueError, "in one dimension"),
        ((torch.tensor(1), None), ValueError, "in one dimension"),
        ((torch.tensor([5]), None), ValueError, "indices from 5 to 5; expected samples of the minibatch, 0 to 4"),
        ((torch.tensor([-1]), None), ValueError, "indices from -1 to -1"),
        ((torch.tensor([1, 2, 1]), None), ValueError, "picked a sample twice"),
        ((torch.tensor([1, 2]), torch.ones(3)), ValueError, r"weights of shape \(3,\) for 2 indices"),
        ((torch.tensor([1]), torch.tensor([float("nan")])), ValueError, "not finite"),
    ],
    ids=str,
)
def test_anything_else_is_told_with_the_rules_name(result, kind, says):
    with pytest.raises(kind, match=f"(?s)'mine'.*{says}"):
        as_picks(result, 5, "mine", weighs=True)


def test_weights_that_were_not_announced_are_refused():
    with pytest.raises(ValueError, match="weighs=False"):
        as_picks((torch.tensor([1]), torch.ones(1)), 5, "mine", weighs=False)


def test_values_that_a_device_chose_are_not_asked_for():
    picks = Picks(torch.tensor([7, 7]), torch.ones(2), found=torch.tensor(True))
    assert as_picks(picks, 5, "mine", weighs=True) is picks
