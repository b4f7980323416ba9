"""Run by two processes: one selecting step under DDP; rank 0 saves the new weights, each rank its picks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import CONV, loader, make_trainer, record_selections
from composer import DataSpec
from composer.utils import dist, get_device
from launching import save_step

from composer_gradmatch import GradMatch, select_first

if __name__ == "__main__":
    folder, microbatch_size, shorter = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.initialize_dist(get_device("cpu"))
    dataset = CONV.data(24)
    if dist.get_global_rank() == 0:
        # Few distinct samples on rank 0: matching stops early there, so that the ranks' |I| differ.
        for i in range(0, 24, 2):
            dataset.tensors[0][i], dataset.tensors[1][i] = dataset.tensors[0][(i % 6)], dataset.tensors[1][i % 6]
    model = CONV.model()
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.5, interrupt=0)
    seen = record_selections(algorithm)
    train = loader(dataset, 12)
    if shorter and dist.get_global_rank() == 1:
        # As at the end of a rank's data.
        train = DataSpec([tuple(tensor[:shorter] for tensor in next(iter(train)))])
    trainer = make_trainer(
        model,
        train,
        [algorithm],
        algorithm_passes=[select_first],
        device_train_microbatch_size=microbatch_size,
    )
    trainer.fit()
    save_step(folder, seen, model)
