"""One forward pass instead of two on two processes (gloo), against the same step computed in one."""

from __future__ import annotations

import pytest
from cases import CONV
from launching import assert_step_is_the_weighted_mean, run_on_two_ranks


@pytest.mark.parametrize(("microbatch_size", "alone"), [(2, False), (12, False), (12, True)])
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(tmp_path, microbatch_size, alone):
    """Also where one rank makes two passes, as after a fallback there."""
    ranks = run_on_two_ranks("reuse_worker.py", tmp_path, microbatch_size, alone)
    for i, rank in enumerate(ranks):
        assert sum(rank["served"]) == (0 if alone and i else len(rank["weights"]))
    assert_step_is_the_weighted_mean(ranks, CONV.model().module)
