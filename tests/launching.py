"""Scripts run by two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

LAUNCHER = [str(Path(sys.executable).with_name("composer")), "-n", "2"]


def run_on_two_ranks(worker, folder, *arguments):
    """What each rank of ``tests/distributed/{worker}`` saved in the folder."""
    script = Path(__file__).parent / "distributed" / worker
    done = subprocess.run(
        [*LAUNCHER, str(script), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
