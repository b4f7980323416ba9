"""One forward pass instead of two on two processes (gloo), against the same step computed in one."""

from __future__ import annotations

import pytest
import torch
from cases import CONV
from launching import run_on_two_ranks
from oracles import weighted_gradient


@pytest.mark.parametrize(("microbatch_size", "alone"), [(2, False), (12, False), (12, True)])
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(tmp_path, microbatch_size, alone):
    """Also where one rank makes two passes, as after a fallback there."""
    ranks = run_on_two_ranks("reuse_worker.py", tmp_path, microbatch_size, alone)
    for i, rank in enumerate(ranks):
        assert sum(rank["served"]) == (0 if alone and i else len(rank["weights"]))
    inputs, targets, weights = (torch.cat([rank[key] for rank in ranks]) for key in ("inputs", "targets", "weights"))
    module = CONV.model().module
    gradients = weighted_gradient(module, inputs, targets, weights)
    expected = torch.cat([-0.1 * g.flatten() for g in gradients])
    for rank in ranks:
        steps = [after - before.detach() for after, before in zip(rank["parameters"], module.parameters(), strict=True)]
        flat = torch.cat([s.flatten().double() for s in steps])
        assert (flat - expected).norm() <= 1e-4 * expected.norm()
