"""Run by two processes: selecting steps under DDP, one after the other; each rank saves its picks and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import CONV, On, loader, make_trainer, record_selections
from composer import DataSpec
from composer.core import Event
from composer.utils import dist, get_device
from launching import save_step
from selecting import factory

from composer_gradmatch import ImportanceBackprop, select_first


def make_step(folder, name, microbatch_size, shorter):
    dataset = CONV.data(24)
    if dist.get_global_rank() == 0:
        # Few distinct samples on rank 0: matching stops early there, so that the ranks' |I| differ.
        for i in range(0, 24, 2):
            dataset.tensors[0][i], dataset.tensors[1][i] = dataset.tensors[0][(i % 6)], dataset.tensors[1][i % 6]
    model = CONV.model()
    algorithm = factory(name)(start=0.0, end=1.0, keep=0.5, interrupt=0)
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
        seed=0,
    )
    trainer.fit()
    folder.mkdir(exist_ok=True)
    save_step(folder, seen, model)


def decide(folder):
    """Whether the next minibatch is looked at, after each of some steps."""
    algorithm = ImportanceBackprop(start=0.0, end=1.0, keep=0.2, interrupt=0)
    switch, decided = algorithm.rule.function.switch, []
    note = On(Event.BATCH_END, lambda state: decided.append(switch.state_dict()))
    make_trainer(CONV.model(), loader(CONV.data(96), 12), [note, algorithm], max_duration="2ep", lr=0.5).fit()
    torch.save(decided, folder / f"decided{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    dist.initialize_dist(get_device("cpu"))
    for number, case in enumerate(json.loads(sys.argv[2])):
        make_step(Path(sys.argv[1]) / str(number), *case)
    decide(Path(sys.argv[1]))
