"""Run by two processes: DDP that synchronises in each microbatch, or a first batch that one rank cannot train on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import CONV, loader, make_trainer
from composer.algorithms import LayerFreezing
from composer.utils import dist, get_device
from selecting import factory

from composer_gradmatch import select_first


def train(folder, what, name):
    rank = dist.get_global_rank()
    dataset = CONV.data(72)
    inputs, targets = dataset.tensors
    # Rank 1 has every second sample: three, many times, so that matching stops early there.
    inputs[1::2], targets[1::2] = inputs[:3].repeat(12, 1, 1, 1), targets[:3].repeat(12)
    if what == "bad" and rank == 1:
        targets.fill_(99)
    options = {"ddp_sync_strategy": "multi_auto_sync"} if what == "explicit" else {}
    freezing = [LayerFreezing()] if what == "freezing" else []
    model, error = CONV.model(), ""
    algorithm = factory(name)(start=0.0, end=1.0, keep=0.5, interrupt=0)
    trainer = make_trainer(
        model,
        loader(dataset, 12),
        [algorithm, *freezing],
        max_duration="3ba",
        algorithm_passes=[select_first],
        device_train_microbatch_size=2,
        seed=0,
        **options,
    )
    try:
        trainer.fit()
    except Exception as caught:
        if what != "bad":
            raise
        error = str(caught)
    folder.mkdir(exist_ok=True)
    torch.save(
        {
            "steps": int(trainer.state.timestamp.batch),
            "whole": algorithm.batches_trained_whole,
            "error": error,
            "parameters": [p.detach().clone() for p in model.module.parameters()],
        },
        folder / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    dist.initialize_dist(get_device("cpu"), timeout=60.0)
    for case in json.loads(sys.argv[2]):
        train(Path(sys.argv[1]) / "-".join(case), *case)
