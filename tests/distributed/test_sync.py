"""Ranks that make as many microbatches where each synchronises gradients, and that fail together on a first batch."""

from __future__ import annotations

import pytest
import torch
from launching import run_on_two_ranks


@pytest.mark.parametrize(("what", "name"), [("freezing", "gradmatch"), ("explicit", "gradmatch"), ("freezing", "loss")])
def test_ranks_that_pick_other_numbers_of_samples_stay_in_step(tmp_path, what, name):
    ranks = run_on_two_ranks("sync_worker.py", tmp_path, what, name)
    assert [rank["steps"] for rank in ranks] == [3, 3]
    assert [rank["whole"] for rank in ranks] == [0, 0]
    for one, other in zip(*(rank["parameters"] for rank in ranks), strict=True):
        torch.testing.assert_close(one, other)


def test_what_one_rank_cannot_train_on_is_told_on_both(tmp_path):
    ranks = run_on_two_ranks("sync_worker.py", tmp_path, "bad", "gradmatch")
    assert [rank["steps"] for rank in ranks] == [0, 0]
    assert "with values from 99 to 99" in ranks[1]["error"]
    assert ranks[0]["error"].startswith("GradMatch failed on rank 1: ")
