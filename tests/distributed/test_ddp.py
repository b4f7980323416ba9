"""Two processes on the CPU (gloo), against the same step computed in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CONV
from oracles import weighted_gradient

LAUNCHER = [str(Path(sys.executable).with_name("composer")), "-n", "2"]


@pytest.mark.parametrize(("microbatch_size", "shorter"), [(2, 0), (12, 0), (12, 2), (2, 5)])
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(tmp_path, microbatch_size, shorter):
    """Also where rank 1 has fewer samples than rank 0."""
    worker = Path(__file__).with_name("worker.py")
    done = subprocess.run(
        [*LAUNCHER, str(worker), str(tmp_path), str(microbatch_size), str(shorter)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
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
