"""One forward pass instead of two on two processes (gloo), against the same step computed in one."""

from __future__ import annotations

import json

import pytest
from cases import CONV
from launching import assert_step_is_the_weighted_mean, launch, read_ranks

#: Microbatch size, and whether rank 1 makes two passes.
CASES = [(2, False), (12, False), (12, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("reuse")
    launch("reuse_worker.py", made, json.dumps(CASES))
    return made


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(folder, number):
    """Also where one rank makes two passes, as after a fallback there."""
    ranks, alone = read_ranks(folder / str(number)), CASES[number][1]
    for i, rank in enumerate(ranks):
        assert sum(rank["served"]) == (0 if alone and i else len(rank["weights"]))
    assert_step_is_the_weighted_mean(ranks, CONV.model().module)
