"""Run by two processes: one selecting step of a model sharded by ``fully_shard``, with unequal batches."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import CONV, On, make_trainer, record_selections
from composer import DataSpec
from composer.core import Event
from composer.trainer import trainer as composer_trainer
from composer.utils import dist, get_device
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from composer_gradmatch import GradMatch, LossBackprop, select_first


class Numbered(list):
    """Batches of a data set of 48 samples."""

    dataset = range(48)


def stored_looks(model, rank):
    """How many samples each step looks at, where the ranks' batches have other numbers of samples that are due."""
    inputs, targets = CONV.data(12, seed=rank).tensors
    own = torch.arange(12) + 24 * rank
    numbers = [own, own, own + 12 if rank else own, own]
    batches = Numbered((inputs, targets, each) for each in numbers)
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.5, interrupt=0, refresh="9ba", sample_id_key=2)
    looked = On(Event.BATCH_START, lambda state: counts.append(algorithm.selector.store._looked_at))
    counts = []
    spec = DataSpec(batches, get_num_samples_in_batch=lambda batch: len(batch[0]))
    arguments = {"algorithm_passes": [select_first], "max_duration": "4ba", "device_train_microbatch_size": 12}
    make_trainer(model, spec, [algorithm, looked], **arguments).fit()
    return {"looked": counts, "store": algorithm.selector.store.store.state_dict()}


if __name__ == "__main__":
    folder, algorithm_name = Path(sys.argv[1]), sys.argv[2]
    dist.initialize_dist(get_device("cpu"))
    rank = dist.get_global_rank()
    model = CONV.model()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.module[0], model.module[4], model):
        fully_shard(module, mesh=mesh)
    # Composer's own FSDP needs a GPU; its Trainer would wrap a model that it has not sharded itself in DDP.
    composer_trainer.prepare_ddp_module = lambda module, *args: module

    rows = slice(0, 12) if rank == 0 else slice(12, 12 + int(sys.argv[3]))
    batch = tuple(tensor[rows] for tensor in CONV.data(24).tensors)
    microbatch_size = int(sys.argv[4])
    if rank == 0 and microbatch_size < 12:
        # Few distinct samples: matching stops early, with fewer microbatches of picks than rank 1 has.
        batch = tuple(tensor[torch.arange(12) % 3] for tensor in batch)
    # In microbatches of at most 4 that is three forward passes on rank 0, but fewer on rank 1.
    picks = (batch, torch.arange(len(batch[0])), None)
    algorithms, seen = [], []
    if algorithm_name != "full":
        algorithm_class = {"gradmatch": GradMatch, "loss_backprop": LossBackprop}[algorithm_name]
        algorithms = [algorithm_class(start=0.0, end=1.0, keep=0.5, interrupt=0, selection_microbatch_size=4)]
        seen = record_selections(algorithms[0])
    spec = DataSpec([batch], get_num_samples_in_batch=lambda batch: len(batch[0]))
    make_trainer(
        model, spec, algorithms, algorithm_passes=[select_first], device_train_microbatch_size=microbatch_size
    ).fit()
    for _, selection in seen:
        picks = (batch, selection.indices, selection.weights)
    saved = {
        "parameters": [
            p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.module.parameters()
        ]
    }
    torch.save(
        {
            **saved,
            **dict(zip(("batch", "indices", "weights"), picks, strict=True)),
            "whole": [algorithm.batches_trained_whole for algorithm in algorithms],
            "stored": stored_looks(model, rank) if microbatch_size < 12 else None,
        },
        folder / f"rank{rank}.pt",
    )
