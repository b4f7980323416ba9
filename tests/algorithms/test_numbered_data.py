"""Numbered data in a Trainer: the numbers are gone before anything but a store could meet them."""

from __future__ import annotations

import pytest
import torch
from cases import MLP, ON, On, make_trainer
from composer import DataSpec, Event
from composer.algorithms import SelectiveBackprop
from composer.core import Evaluator
from composer.utils import dist
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, WeightedRandomSampler

from composer_gradmatch import (
    GradMatch,
    LossBackprop,
    RandomBackprop,
    beside_numbers,
    number_samples,
    select_first,
    without_numbers,
)

N, BATCH = 60, 20


def loader_of(data, **kwargs):
    arguments = {"sampler": dist.get_sampler(data, shuffle=True), **kwargs}
    return DataLoader(data, BATCH, collate_fn=data.collate_fn, **arguments)


def fitted(algorithms, loader, **kwargs):
    arguments = {"max_duration": "2ep", "algorithm_passes": [select_first], "seed": 5, **kwargs}
    trainer = make_trainer(MLP.model(), loader, algorithms, **arguments)
    trainer.fit()
    return trainer.state.model.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradMatch(**ON, keep=0.3),
        lambda: RandomBackprop(**ON, keep=0.3),
        lambda: GradMatch(start=0.5, end=1.0, interrupt=2, keep=0.3),
        lambda: GradMatch(**ON, keep=1.0),
        lambda: GradMatch(**ON, keep=0.3, reuse_activations=True),
    ],
    ids=["gradmatch", "random", "late", "all", "one pass"],
)
def test_without_a_store_numbered_data_train_as_others_do(make):
    data = MLP.data(N)
    plain = fitted([make()], DataLoader(data, BATCH, sampler=dist.get_sampler(data, shuffle=True)))
    found = fitted([make()], loader_of(number_samples(data)))
    for key in plain:
        assert torch.equal(plain[key], found[key]), key


def test_without_a_selecting_algorithm_a_data_spec_takes_them_out():
    loader = loader_of(number_samples(MLP.data(N)))
    fitted([SelectiveBackprop(**ON)], DataSpec(loader, batch_transforms=without_numbers))


@pytest.mark.parametrize("refresh", [None, "1ep"])
def test_they_are_gone_in_evaluation_and_prediction_too(refresh):
    loader, evaluated = loader_of(number_samples(MLP.data(N))), loader_of(number_samples(MLP.data(N, seed=1)))
    algorithm = GradMatch(**ON, keep=0.3, refresh=refresh)
    trainer = make_trainer(
        MLP.model(), loader, [algorithm], eval_dataloader=Evaluator(label="e", dataloader=evaluated),
        eval_interval="1ba", max_duration="1ep",
    )  # fmt: skip
    trainer.fit()
    assert sum(len(each) for each in trainer.predict(evaluated)) == N
    assert 0 <= float(trainer.state.eval_metrics["e"]["MulticlassAccuracy"].compute()) <= 1


def doubled(batch):
    inputs, targets = batch
    return 2 * inputs, targets


def test_transforms_of_a_data_spec_see_batches_without_them():
    data, seen = number_samples(MLP.data(N)), []
    algorithm = GradMatch(**ON, keep=0.3, refresh="1ep")
    note = On(Event.BATCH_START, lambda state: seen.append((algorithm.selector.store.numbers, state.batch[0])))
    spec = DataSpec(
        loader_of(data),
        batch_transforms=beside_numbers(doubled),
        get_num_samples_in_batch=lambda batch: len(without_numbers(batch)[1]),
    )
    fitted([algorithm, note], spec)
    assert len(seen) == 6
    for numbers, inputs in seen:
        picked = numbers[algorithm.last_selection.indices] if inputs is seen[-1][1] else numbers
        rows = 2 * MLP.data(N).tensors[0][picked]
        assert all(bool((rows == row).all(1).any()) for row in inputs)


def test_a_transform_that_drops_them_is_told_of():
    """Its targets are integers, too, and in range."""
    spec = DataSpec(loader_of(number_samples(MLP.data(N))), batch_transforms=lambda batch: (batch[0], batch[1]))
    with pytest.raises(ValueError, match=r"no sample numbers.*beside_numbers"):
        fitted([GradMatch(**ON, keep=0.3, refresh="1ep")], spec)


def test_data_are_numbered_once():
    data = number_samples(MLP.data(N))
    assert number_samples(data) is data
    other = number_samples(data, collate_fn=lambda items: (torch.stack([x for x, _ in items]), torch.zeros(len(items))))
    assert other[3][0].equal(data[3][0])
    assert len(without_numbers(other[3])) == 2
    assert without_numbers(other.collate_fn([other[3], other[1]]))[1].tolist() == [0, 0]
    for outer in (Subset(data, [1, 2]), ConcatDataset([MLP.data(3), data]), Subset(Subset(data, [1, 2]), [0])):
        with pytest.raises(ValueError, match="numbered samples in it already"):
            number_samples(outer)


@pytest.mark.parametrize("refresh", [None, "1ep"])
def test_data_of_numbered_parts_are_refused(refresh):
    """Each part counts from 0."""
    parts = [number_samples(MLP.data(N)) for _ in range(2)]
    train = DataLoader(ConcatDataset(parts), BATCH, collate_fn=parts[0].collate_fn)
    with pytest.raises(ValueError, match="Number the outermost one"):
        fitted([GradMatch(**ON, keep=0.3, refresh=refresh)], train)


def test_two_that_read_numbers_at_other_places_are_refused():
    early, late = {"start": 0.0, "end": 0.5}, {"start": 0.5, "end": 1.0}
    algorithms = [
        LossBackprop(**early, interrupt=0, keep=0.3, refresh="2ep", sample_id_key=2),
        GradMatch(**late, interrupt=0, keep=0.3, refresh="2ep", sample_id_key=-1),
    ]
    data = Identified(lambda i: i)
    with pytest.raises(ValueError, match="name different items of a batch by their place"):
        fitted(algorithms, DataLoader(data, BATCH))


class Identified(TensorDataset):
    """Samples with numbers of their own, made by a function of their places."""

    def __init__(self, number):
        super().__init__(*MLP.data(200).tensors, torch.tensor([number(i) for i in range(200)]))


OWN = {"refresh": "2ep", "sample_id_key": 2, "keep": 0.3}


@pytest.mark.parametrize("number", [lambda i: 0, lambda i: i % 10, lambda i: i // 2], ids=["same", "few", "pairs"])
def test_numbers_that_are_not_each_samples_own_are_told_of_once(number):
    data = Identified(number)
    loader = DataLoader(data, BATCH, sampler=dist.get_sampler(data, shuffle=True))
    with pytest.warns(UserWarning, match=r"different numbers at sample_id_key=2.*number_samples") as warned:
        fitted([LossBackprop(**ON, **OWN)], loader)
    assert sum("different numbers" in str(each.message) for each in warned) == 1


def test_a_constant_is_told_of_with_any_sampler():
    data = Identified(lambda i: 7)
    loader = DataLoader(data, BATCH, sampler=WeightedRandomSampler([1.0] * 200, 200))
    with pytest.warns(UserWarning, match="20 samples of an epoch have 1 different"):
        fitted([LossBackprop(**ON, **OWN)], loader, max_duration="1ba")


@pytest.mark.parametrize("weights", [[1.0] * 200, [3.0] * 100 + [0.3] * 100], ids=["even", "uneven"])
def test_samples_that_are_drawn_several_times_are_not_told_of(weights):
    data = Identified(lambda i: i)
    fitted([LossBackprop(**ON, **OWN)], DataLoader(data, BATCH, sampler=WeightedRandomSampler(weights, 400)))
    fitted([LossBackprop(**ON, **OWN)], DataLoader(data, BATCH, sampler=dist.get_sampler(data, shuffle=True)))
