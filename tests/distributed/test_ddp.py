"""Two processes on the CPU (gloo), against the same step computed in one."""

from __future__ import annotations

import pytest
from cases import CONV
from launching import assert_step_is_the_weighted_mean, run_on_two_ranks


@pytest.mark.parametrize(("microbatch_size", "shorter"), [(2, 0), (12, 0), (12, 2), (2, 5)])
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(tmp_path, microbatch_size, shorter):
    """Also where rank 1 has fewer samples than rank 0."""
    ranks = run_on_two_ranks("worker.py", tmp_path, microbatch_size, shorter)
    counts = [len(rank["weights"]) for rank in ranks]
    assert counts[0] != counts[1], "the ranks should have picked different numbers of samples"
    assert_step_is_the_weighted_mean(ranks, CONV.model().module)
