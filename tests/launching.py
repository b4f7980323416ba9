"""Scripts run by two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from composer.utils import dist
from oracles import weighted_gradient

LAUNCHER = [str(Path(sys.executable).with_name("composer")), "-n", "2"]


def launch(worker, folder, *arguments):
    """Runs ``tests/distributed/{worker}`` in two processes."""
    script = Path(__file__).parent / "distributed" / worker
    done = subprocess.run(
        [*LAUNCHER, str(script), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read_ranks(folder):
    """What each of two ranks saved in a folder."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def run_on_two_ranks(worker, folder, *arguments):
    """What each rank of ``tests/distributed/{worker}`` saved in the folder."""
    launch(worker, folder, *arguments)
    return read_ranks(folder)


def save_step(folder, seen, model, **more):
    """In a worker: saves the picks of its only selecting step, their weights, and the model's new parameters."""
    (((inputs, targets), selection),) = seen
    torch.save(
        {
            "inputs": inputs[selection.indices],
            "targets": targets[selection.indices],
            "weights": torch.ones(len(selection.indices)) if selection.weights is None else selection.weights,
            "parameters": [p.detach().clone() for p in model.module.parameters()],
            **more,
        },
        folder / f"rank{dist.get_global_rank()}.pt",
    )


def assert_step_is_the_weighted_mean(ranks, module, lr=0.1):
    """Each rank's step is along the weighted mean gradient of all ranks' picks, at the weights of ``module``."""
    inputs, targets, weights = (torch.cat([rank[key] for rank in ranks]) for key in ("inputs", "targets", "weights"))
    expected = torch.cat([-lr * g.flatten() for g in weighted_gradient(module, inputs, targets, weights)])
    for rank in ranks:
        steps = [after - before.detach() for after, before in zip(rank["parameters"], module.parameters(), strict=True)]
        flat = torch.cat([s.flatten().double() for s in steps])
        assert (flat - expected).norm() <= 1e-4 * expected.norm()
