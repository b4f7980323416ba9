"""Run by two processes: selecting steps of one forward pass under DDP; each rank saves picks and new weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import CONV, loader, make_trainer, record_selections
from composer.utils import dist, get_device
from launching import save_step

from composer_gradmatch import GradMatch, select_first
from composer_gradmatch.reuse.single_pass import SinglePass

if __name__ == "__main__":
    folder, microbatch_size, alone = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
    dist.initialize_dist(get_device("cpu"))
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
    served: list[int] = []
    original = SinglePass._rows

    def rows(self: SinglePass, batch: object) -> torch.Tensor | None:
        found = original(self, batch)
        served.append(-1 if found is None else len(found))
        return found

    SinglePass._rows = rows
    trainer = make_trainer(
        model,
        loader(CONV.data(24), 12),
        [algorithm],
        algorithm_passes=[select_first],
        device_train_microbatch_size=microbatch_size,
    )
    trainer.fit()
    save_step(folder, seen, model, served=served)
