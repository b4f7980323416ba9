"""Run by two processes: selecting steps of one forward pass under DDP; each rank saves picks and new weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import CONV, loader, make_trainer, record_selections
from composer.utils import dist, get_device
from launching import save_step

from composer_gradmatch import GradMatch, select_first
from composer_gradmatch.reuse.single_pass import SinglePass

SERVED: list[int] = []
_original = SinglePass._rows


def _rows(self: SinglePass, batch: object) -> torch.Tensor | None:
    found = _original(self, batch)
    SERVED.append(-1 if found is None else len(found))
    return found


def make_step(folder, microbatch_size, alone):
    SERVED.clear()
    model = CONV.model()
    algorithm = GradMatch(
        # With alone, rank 1 makes two passes.
        start=0.0,
        end=1.0,
        keep=0.5,
        interrupt=0,
        reuse_activations=not (alone and dist.get_global_rank() == 1),
    )
    seen = record_selections(algorithm)
    trainer = make_trainer(
        model,
        loader(CONV.data(24), 12),
        [algorithm],
        algorithm_passes=[select_first],
        device_train_microbatch_size=microbatch_size,
    )
    trainer.fit()
    folder.mkdir(exist_ok=True)
    save_step(folder, seen, model, served=list(SERVED))


if __name__ == "__main__":
    SinglePass._rows = _rows
    dist.initialize_dist(get_device("cpu"))
    for number, case in enumerate(json.loads(sys.argv[2])):
        make_step(Path(sys.argv[1]) / str(number), *case)
