"""Two processes on the CPU (gloo), against the same step computed in one."""

from __future__ import annotations

import pytest
import torch
from cases import CONV
from launching import run_on_two_ranks
from oracles import weighted_gradient


@pytest.mark.parametrize(("microbatch_size", "shorter"), [(2, 0), (12, 0), (12, 2), (2, 5)])
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(tmp_path, microbatch_size, shorter):
    """Also where rank 1 has fewer samples than rank 0."""
    ranks = run_on_two_ranks("worker.py", tmp_path, microbatch_size, shorter)
    counts = [len(rank["weights"]) for rank in ranks]
    assert counts[0] != counts[1], "the ranks should have picked different numbers of samples"
    inputs, targets, weights = (torch.cat([rank[key] for rank in ranks]) for key in ("inputs", "targets", "weights"))
    module = CONV.model().module
    gradients = weighted_gradient(module, inputs, targets, weights)
    for rank in ranks:
        steps = [after - before.detach() for after, before in zip(rank["parameters"], module.parameters(), strict=True)]
        flat = torch.cat([s.flatten().double() for s in steps])
        expected = torch.cat([-0.1 * g.flatten() for g in gradients])
        assert (flat - expected).norm() <= 1e-4 * expected.norm()
