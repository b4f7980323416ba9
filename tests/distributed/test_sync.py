"""Ranks that make as many microbatches where each synchronises gradients, and that fail together on a first batch."""

from __future__ import annotations

import json

import pytest
import torch
from launching import launch, read_ranks

IN_STEP = [("freezing", "gradmatch"), ("explicit", "gradmatch"), ("freezing", "loss_backprop")]
BAD = ("bad", "gradmatch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sync")
    launch("sync_worker.py", made, json.dumps([*IN_STEP, BAD]))
    return made


@pytest.mark.parametrize("case", IN_STEP, ids="-".join)
def test_ranks_that_pick_other_numbers_of_samples_stay_in_step(folder, case):
    ranks = read_ranks(folder / "-".join(case))
    assert [rank["steps"] for rank in ranks] == [3, 3]
    assert [rank["whole"] for rank in ranks] == [0, 0]
    for one, other in zip(*(rank["parameters"] for rank in ranks), strict=True):
        torch.testing.assert_close(one, other)


def test_what_one_rank_cannot_train_on_is_told_on_both(folder):
    ranks = read_ranks(folder / "-".join(BAD))
    assert [rank["steps"] for rank in ranks] == [0, 0]
    assert "with values from 99 to 99" in ranks[1]["error"]
    assert ranks[0]["error"].startswith("GradMatch failed on rank 1: ")
