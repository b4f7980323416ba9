"""The store of looks, without a Trainer."""

from __future__ import annotations

import math

import pytest
import torch

from composer_gradmatch.candidates.sample_store import SampleStore, Seen
from composer_gradmatch.candidates.suspects import Suspects, margins_of
from composer_gradmatch.last_layer import last_layer_gram


def seen(numbers, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(numbers)
    inputs, grads = (torch.randn(n, w, generator=generator) for w in (width, 3))
    return Seen(torch.tensor(numbers), torch.rand(n, generator=generator), inputs, grads)


def test_what_was_put_is_there_in_half_precision_and_is_due_by_its_age():
    store = SampleStore(10, keeps_grads=True)
    now = seen([3, 7, 1])
    assert store.due(now.numbers, 0, 5).all()
    store.put(now, 4)
    torch.testing.assert_close(store.inputs[now.numbers], now.inputs.half())
    torch.testing.assert_close(store.output_grads[now.numbers], now.output_grads)
    torch.testing.assert_close(store.losses[now.numbers], now.losses)
    numbers = torch.tensor([0, 1, 3])
    assert store.due(numbers, 8, 5).tolist() == [True, False, False]
    assert store.due(numbers, 9, 5).tolist() == [True, True, True]


def test_a_look_of_the_future_is_none():
    store = SampleStore(2)
    store.put(seen([0]), 9)
    assert store.due(torch.tensor([0]), 8, 5).all()
    assert not store.due(torch.tensor([0]), 9, 5).any()


def test_of_a_sample_that_is_there_twice_the_last_counts():
    store, now = SampleStore(4), seen([2, 2, 1])
    store.put(now, 0)
    assert store.losses[2] == now.losses[1]
    torch.testing.assert_close(store.inputs[2], now.inputs[1].half())


def test_rows_that_are_not_finite_are_looked_at_again():
    store, now = SampleStore(4), seen([0, 1, 2])
    now.inputs[1, 0], now.losses[2] = math.inf, math.nan
    store.put(now, 7)
    assert not store.is_wide
    assert store.due(torch.arange(4), 7, 1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("width", [6, 3], ids=["whole", "projected"])
def test_from_a_value_that_half_precision_does_not_hold_on_rows_are_kept_in_bfloat16(width):
    store, first, now = SampleStore(4, limit=4 * 2 * width), seen([0, 1]), seen([2, 3], seed=1)
    store.put(first, 6)
    before = store.inputs[:2].clone()
    memory = store.bytes
    now.inputs[0] *= 1e6
    now.inputs[1, 2] = math.nan
    store.put(now, 7)
    assert store.is_wide
    assert store.bytes == memory
    assert store.due(torch.arange(4), 7, 2).tolist() == [False, False, False, True]
    torch.testing.assert_close(store.inputs[:2], before.bfloat16(), rtol=0, atol=0)
    expected = now.inputs[0] if width == 6 else now.inputs[0] @ store._projection
    torch.testing.assert_close(store.inputs[2].float(), expected, rtol=2**-8, atol=0)
    again = SampleStore(4, limit=4 * 2 * width)
    again.load_state_dict(store.state_dict())
    assert again.is_wide
    assert torch.equal(again.inputs[:3], store.inputs[:3])


def test_a_checkpoint_gives_the_same_store():
    store = SampleStore(6, keeps_grads=True)
    store.put(seen([5, 0]), 3)
    store.average_margins(torch.tensor([5]), torch.tensor([0.2]), 0.7)
    other = SampleStore(6, keeps_grads=True)
    other.load_state_dict(store.state_dict())
    for name, value in store.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, equal_nan=True)
    other.put(seen([1]), 3)
    assert store.stamps[1] != 3  # Which shares no memory with it.


def test_above_its_limit_it_keeps_a_projection_with_products_that_are_right_on_average():
    width, size = 512, 40
    store = SampleStore(size, limit=2 * size * 128)
    now = seen(list(range(size)), width)
    store.put(now, 0)
    assert store.projects
    assert store.inputs.shape == (size, 128)
    assert store.inputs.nbytes <= store.limit
    grads = now.output_grads.double()
    exact = last_layer_gram(now.inputs.double(), grads, True)
    found = last_layer_gram(store.inputs.double(), grads, True)
    error = float((found - exact).norm() / exact.norm())
    assert 0.01 < error < 2 / math.sqrt(128) * math.sqrt(size)
    assert float(found.diagonal().sum() / exact.diagonal().sum()) == pytest.approx(1, abs=0.05)
    again = SampleStore(size, limit=2 * size * 128)
    again.put(now, 0)
    assert torch.equal(again.inputs, store.inputs)


def test_repetitions_in_a_visit_count_each_as_one_by_one():
    numbers, margins = [2, 0, 2, 3, 2, 0], [0.5, float("nan"), -0.25, 0.125, 1.0, 0.75]
    together, alone = SampleStore(4), SampleStore(4)
    for _ in range(2):
        together.average_margins(torch.tensor(numbers), torch.tensor(margins), 0.7)
        for number, margin in zip(numbers, margins, strict=True):
            alone.average_margins(torch.tensor([number]), torch.tensor([margin]), 0.7)
    torch.testing.assert_close(together.margins, alone.margins, rtol=0, atol=0, equal_nan=True)
    assert together.margins.isnan().tolist() == [False, True, False, False]


def test_a_look_without_losses_leaves_those_that_are_known():
    store = SampleStore(4)
    store.put(Seen(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]), torch.ones(2, 3)), 0)
    store.put(Seen(torch.tensor([2, 3, 2]), None, torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3])), 4)
    assert store.losses.tolist() == [0.0, 0.5, 0.25, 0.0]
    assert store.inputs[:, 0].tolist() == [0.0, 1.0, 3.0, 2.0]
    assert store.stamps[1:].tolist() == [0, 4, 4]


def test_margins_are_averaged_over_visits():
    store = SampleStore(3)
    for value in (0.5, 1.0, math.nan, 0.0):
        store.average_margins(torch.tensor([1]), torch.tensor([value]), 0.7)
    assert float(store.margins[1]) == pytest.approx(0.7 * (0.7 * 0.5 + 0.3))
    assert math.isnan(store.margins[0])


def test_a_margin_is_the_lead_of_another_class_over_the_label():
    logits = torch.randn(50, 4)
    labels = torch.arange(50) % 4
    found = margins_of(logits, labels)
    for row, label, margin in zip(logits.softmax(1), labels, found, strict=True):
        others = [float(p) for j, p in enumerate(row) if j != label]
        assert float(margin) == pytest.approx(max(others) - float(row[label]), abs=1e-6)
    assert math.isnan(margins_of(logits, torch.full((50,), -100))[0])


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ({"margin": 1.5}, ValueError, "margin"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"after": "soon"}, ValueError, "after"),
        ({"after": "100tok"}, ValueError, "epochs"),
        ({"margn": 0.4}, TypeError, "margn"),
        ("yes", TypeError, "true, false"),
    ],
)
def test_suspects_that_cannot_be_are_refused(value, error, match):
    with pytest.raises(error, match=match):
        Suspects.of(value)


def test_suspects_may_be_left_at_their_defaults():
    assert Suspects.of(True) == Suspects(0.4, "2ep", 0.7)
    assert Suspects.of(False) is Suspects.of(None) is None
