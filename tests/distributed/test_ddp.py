"""Two processes on the CPU (gloo), against the same step computed in one."""

from __future__ import annotations

import json

import pytest
import torch
from cases import CONV
from launching import assert_step_is_the_weighted_mean, launch, read_ranks
from selecting import REPRESENTATIVES

from composer_gradmatch.rules.table import RULES

#: Algorithm, microbatch size, and the samples of rank 1 where it has fewer than rank 0. All in one launch.
CASES = [
    *[("gradmatch", microbatch_size, shorter) for microbatch_size, shorter in [(2, 0), (12, 0), (12, 2), (2, 5)]],
    *[(name, 2, 0) for name in RULES if name in REPRESENTATIVES and name != "gradmatch"],
]
OTHERS = [(name, 2, 0) for name in RULES if name not in REPRESENTATIVES]


def _launched(tmp_path_factory, cases):
    made = tmp_path_factory.mktemp("ddp")
    launch("worker.py", made, json.dumps(cases))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _launched(tmp_path_factory, CASES)


@pytest.fixture(scope="module")
def folder_of_others(tmp_path_factory):
    return _launched(tmp_path_factory, OTHERS)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])))
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(folder, number):
    """Also where rank 1 has fewer samples than rank 0."""
    ranks = read_ranks(folder / str(number))
    assert_step_is_the_weighted_mean(ranks, CONV.model().module)
    if CASES[number][0] == "gradmatch":
        counts = [len(rank["weights"]) for rank in ranks]
        assert counts[0] != counts[1], "the ranks should have picked different numbers of samples"


def test_ranks_that_see_other_samples_decide_alike_whether_to_look(folder):
    one, other = (torch.load(folder / f"decided{rank}.pt") for rank in range(2))
    assert one == other
    assert len({step["is_on"] for step in one}) == 2, "it should have been on and off"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OTHERS)), ids=lambda number: OTHERS[number][0])
def test_so_is_that_of_every_other_rule(folder_of_others, number):
    assert_step_is_the_weighted_mean(read_ranks(folder_of_others / str(number)), CONV.model().module)
