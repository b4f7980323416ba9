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
from torch.utils.data import DataLoader

from composer_gradmatch import (
    GradMatch,
    ImportanceBackprop,
    SelectionImages,
    SelectionLog,
    number_samples,
    select_first,
)


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


def store(folder):
    """What is stored after some epochs, in which samples move between the ranks; nothing is learned."""
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.2, interrupt=0, refresh="2ep", suspects={"after": "9ep"})
    data = number_samples(CONV.data(48))
    sampler = dist.get_sampler(data, shuffle=True)
    train = DataLoader(data, 12, sampler=sampler, collate_fn=data.collate_fn)
    make_trainer(CONV.model(), train, [algorithm], algorithm_passes=[select_first], max_duration="3ep", lr=0.0).fit()
    torch.save(algorithm.selector.store.store.state_dict(), folder / f"store{dist.get_global_rank()}.pt")


class Capped(torch.nn.Module):
    """Caps logits that only rank 1's first samples have."""

    def __init__(self, module):
        super().__init__()
        self.module, self.caps = module, dist.get_global_rank() == 1

    def forward(self, inputs):
        logits = self.module(inputs)
        return logits * 0.5 if self.caps else logits


def disagree(folder):
    """What is stored where one rank's samples alone show that losses do not follow from the output layer's output."""
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.2, interrupt=0, refresh="2ep", output_layer="module.module.4")
    model, data = CONV.model(), number_samples(CONV.data(48))
    model.module = Capped(model.module)
    train = DataLoader(data, 12, sampler=dist.get_sampler(data, shuffle=True), collate_fn=data.collate_fn)
    after_first_look = On(Event.BEFORE_TRAIN_BATCH, lambda state: setattr(model.module, "caps", False))
    make_trainer(model, train, [algorithm, after_first_look], max_duration="3ep", lr=0.0).fit()
    torch.save(algorithm.selector.store.store.state_dict(), folder / f"disagreed{dist.get_global_rank()}.pt")


def log_picks(folder):
    """The log of two epochs, pictures, and what each rank has trained on: a sample's first input, and its weight."""
    dataset, trained = number_samples(CONV.data(25)), []  # One sample is there twice, to fill the ranks up.
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.5, interrupt=2, refresh="1ep")

    def note(state):
        picks, n = algorithm.last_selection, len(state.batch[0])
        weights = torch.ones(n) if picks is None or n >= 5 else picks.weights
        trained.append((int(state.timestamp.epoch), state.batch[0][:, 0, 0, 0], weights))

    train = DataLoader(dataset, 5, sampler=dist.get_sampler(dataset, shuffle=True), collate_fn=dataset.collate_fn)
    images = SelectionImages(folder=str(folder / f"selection_images{dist.get_global_rank()}"))
    callbacks = [SelectionLog(str(folder / "selection_log")), images]
    make_trainer(
        CONV.model(), train, [algorithm, On(Event.BEFORE_TRAIN_BATCH, note)], max_duration="2ep", callbacks=callbacks
    ).fit()
    torch.save(trained, folder / f"trained{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    dist.initialize_dist(get_device("cpu"))
    for number, case in enumerate(json.loads(sys.argv[2])):
        make_step(Path(sys.argv[1]) / str(number), *case)
    decide(Path(sys.argv[1]))
    store(Path(sys.argv[1]))
    disagree(Path(sys.argv[1]))
    log_picks(Path(sys.argv[1]))
