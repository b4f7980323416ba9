"""Numbers of samples: through collate functions, workers and containers, and out of the batch again."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from composer_gradmatch import number_samples
from composer_gradmatch.batches.numbering import Numbering
from composer_gradmatch.batches.sample_numbers import NUMBER_KEY, take_numbers

Pair = namedtuple("Pair", "x y")
FORMS = {
    "tuple": lambda i: (torch.tensor(float(i)), i % 3),
    "list": lambda i: [torch.tensor(float(i)), i % 3],
    "dict": lambda i: {"x": torch.tensor(float(i)), "y": i % 3},
    "named tuple": lambda i: Pair(torch.tensor(float(i)), i % 3),
    "tensor": lambda i: torch.tensor(float(i)),
}


class Samples:
    classes = ("a", "b")

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.form(int(index))


def first(batch):
    if isinstance(batch, dict):
        return batch["x"]
    return batch if isinstance(batch, torch.Tensor) else batch[0]


@pytest.mark.parametrize("own_collate", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_each_sample_has_its_number_and_the_batch_is_as_it_was(name, own_collate):
    dataset = Samples(FORMS[name])
    numbered = number_samples(dataset)
    collate = {"collate_fn": numbered.collate_fn} if own_collate else {}
    order = [7, 2, 9, 0]
    (batch,) = DataLoader(numbered, 4, sampler=order, **collate)
    (plain,) = DataLoader(dataset, 4, sampler=order)
    numbering = Numbering()
    numbering.find(DataLoader(numbered, 4))
    bare, numbers = numbering.take(batch)
    assert numbers.tolist() == order
    assert numbering.size == 10
    assert type(bare) is type(plain)
    torch.testing.assert_close(first(bare), first(plain))
    assert not isinstance(batch, dict) or NUMBER_KEY in batch  # Which is not changed itself.
    assert numbered.classes == ("a", "b")


def test_workers_and_a_subset_keep_the_numbers_of_the_whole():
    numbered = number_samples(
        Samples(FORMS["dict"]), collate_fn=lambda items: {"x": torch.stack([i["x"] for i in items])}
    )
    loader = DataLoader(Subset(numbered, [8, 1, 5]), 3, collate_fn=numbered.collate_fn, num_workers=1)
    numbering = Numbering()
    numbering.find(loader)
    (batch,) = loader
    bare, numbers = numbering.take(batch)
    assert numbers.tolist() == bare["x"].int().tolist() == [8, 1, 5]
    assert numbering.size == 10


def test_many_at_once():
    class AtOnce(Samples):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    (batch,) = DataLoader(number_samples(AtOnce(FORMS["tuple"])), 3, sampler=[4, 2, 0])
    assert batch[-1][NUMBER_KEY].tolist() == [4, 2, 0]


def test_numbers_that_batches_already_have():
    loader = DataLoader(TensorDataset(torch.randn(6, 2), torch.arange(6)), 3)
    for key, batch in (
        ("id", {"x": torch.randn(3), "id": torch.tensor([4, 0, 4])}),
        (1, [torch.randn(3), [4, 0, 4]]),
        (1, [torch.randn(3), torch.tensor([[4], [0], [4]])]),
    ):
        numbering = Numbering(key)
        numbering.find(loader)
        bare, numbers = numbering.take(batch)
        assert numbers.tolist() == [4, 0, 4]
        assert len(bare) == 1


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": torch.zeros(3)}, "no sample numbers at 'id'"),
        ({"id": torch.tensor([0, 6])}, "from 0 to 6, but the data set has 6"),
        ({"id": torch.tensor([-1, 2])}, "from -1 to 2"),
        ({"id": torch.tensor([0.5, 2])}, "must be integers"),
        ({"id": torch.zeros(2, 2).long()}, "of shape"),
        ({"id": ["n01440764", "n01440767"]}, "got a list at 'id'.*number_samples"),
        ({"id": torch.tensor([1, 6])}, "counted from another"),
    ],
)
def test_numbers_that_are_none_are_refused(batch, match):
    numbering = Numbering("id")
    numbering.find(DataLoader(TensorDataset(torch.randn(6, 2)), 3))
    with pytest.raises(ValueError, match=match):
        numbering.take(batch)


def test_data_that_cannot_be_numbered_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(TypeError, match=r"map-style.*Stream.*sample_id_key"):
        number_samples(Stream())
    with pytest.raises(ValueError, match="number_samples"):
        Numbering().find(DataLoader(TensorDataset(torch.randn(3, 1))))
    with pytest.raises(ValueError, match=NUMBER_KEY):
        number_samples([{NUMBER_KEY: 1}])[0]


def test_other_data_than_in_the_last_fit_are_noticed():
    numbering = Numbering()
    numbered = number_samples(Samples(FORMS["tuple"]))
    for loader, changed in ((DataLoader(numbered), False), (DataLoader(numbered, 2), False)):
        numbering.find(loader)
        assert numbering.has_changed == changed
    numbering.find(DataLoader(number_samples(numbered.dataset)))
    assert not numbering.has_changed, "they are the same samples"
    numbering.find(DataLoader(number_samples(Samples(FORMS["tuple"]))))
    assert numbering.has_changed


def test_samples_that_are_fetched_together_and_from_the_end_have_their_numbers_too():
    class Fetched(Samples):
        def __getitems__(self, indices):
            return [self[index % 10] for index in indices]

    numbered = number_samples(Fetched(FORMS["tensor"]))
    items = numbered.__getitems__([-1, 3, -10])
    assert [int(take_numbers(item)[1]) for item in items] == [9, 3, 0]
    assert [float(take_numbers(item)[0]) for item in items] == [9.0, 3.0, 0.0]
