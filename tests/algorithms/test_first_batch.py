"""What cannot work is told on the first batch or before, and an algorithm is new in each Trainer."""

from __future__ import annotations

import pytest
import torch
from cases import MLP, On, loader, make_trainer
from composer import Event
from composer.algorithms import LabelSmoothing
from composer.models import ComposerModel
from selecting import SELECTING
from torch import nn
from torch.utils.data import DataLoader

from composer_gradmatch import GradMatch, select_first

LATE = {"start": 0.5, "end": 1.0, "interrupt": 0}


class Keyed(ComposerModel):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, batch):
        return self.head(batch["x"])

    def loss(self, outputs, batch, reduction="mean"):
        return nn.functional.cross_entropy(outputs, batch["y"], reduction=reduction)


def steps_until(error, match, trainer):
    with pytest.raises(error, match=match):
        trainer.fit()
    return int(trainer.state.timestamp.batch)


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_an_algorithm_that_is_not_the_trainers_says_so(algorithm_class):
    trainer = make_trainer(MLP.model(), loader(MLP.data(8), 4), [])
    algorithm = algorithm_class(**LATE)
    with pytest.raises(ValueError, match=f"This {type(algorithm).__name__} is not among the Trainer's algorithms"):
        algorithm.apply(Event.FIT_START, trainer.state, trainer.logger)


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_a_key_that_is_not_in_the_batch_is_named_at_once(algorithm_class):
    data = [{"x": torch.randn(12), "y": torch.tensor(1)} for _ in range(8)]
    algorithm = algorithm_class(**LATE, input_key="x", target_key="z")
    trainer = make_trainer(Keyed(), DataLoader(data, 4), [algorithm], max_duration="2ba")
    assert steps_until(ValueError, "target_key='z' names nothing in the batch, a dict with the keys", trainer) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda batch: tuple(torch.cat([t, t]) for t in batch), "then made them 8"),
        (lambda batch: (torch.randn(4, 12), torch.randint(5, (4,))), "which of the picked samples"),
    ],
    ids=["more samples", "other samples"],
)
def test_what_weights_cannot_reach_is_told_before_the_first_step(change, match):
    other = On(Event.AFTER_DATALOADER, lambda state: setattr(state, "batch", change(state.batch)))
    trainer = make_trainer(
        MLP.model(),
        loader(MLP.data(8), 4),
        [GradMatch(**LATE), other],
        max_duration="4ba",
        algorithm_passes=[select_first],
        seed=0,  # Labels that are drawn anew could else tell rows by chance.
    )
    assert steps_until(ValueError, match, trainer) == 0


def test_what_begins_later_costs_those_steps_their_weights_and_not_the_run():
    def change(state):
        if int(state.timestamp.batch) == 2:
            state.batch = (torch.randn_like(state.batch[0]), torch.randint(5, (len(state.batch[1]),)))

    trainer = make_trainer(
        MLP.model(),
        loader(MLP.data(32), 8),
        [GradMatch(start=0.0, end=1.0, interrupt=0), On(Event.AFTER_DATALOADER, change)],
        max_duration="4ba",
        algorithm_passes=[select_first],
        seed=0,  # Labels that are drawn anew could else tell rows by chance.
    )
    with pytest.warns(UserWarning, match="picks of some steps are trained with weights one"):
        trainer.fit()
    assert int(trainer.state.timestamp.batch) == 4


def test_an_order_that_is_refused_is_refused_in_a_second_trainer_too():
    algorithm = GradMatch(start=0.0, end=1.0, interrupt=0)
    make_trainer(MLP.model(), loader(MLP.data(8), 4), [algorithm], algorithm_passes=[select_first]).fit()
    with pytest.raises(ValueError, match="List GradMatch after it"):
        make_trainer(MLP.model(), loader(MLP.data(8), 4), [algorithm, LabelSmoothing(0.2)]).fit()


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_a_second_trainer_counts_and_warns_anew(algorithm_class):
    algorithm = algorithm_class(start=0.5, end=0.9, interrupt=0)
    algorithm.batches_trained_whole = 3
    for _ in range(2):
        with pytest.warns(UserWarning, match="no batch at all"):
            make_trainer(MLP.model(), loader(MLP.data(8), 4), [algorithm], max_duration="1ep").fit()
    assert algorithm.batches_trained_whole == 0


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_the_last_selection_is_public(algorithm_class):
    algorithm = algorithm_class(start=0.0, end=1.0, keep=0.5, interrupt=0)
    make_trainer(MLP.model(), loader(MLP.data(8), 8), [algorithm], algorithm_passes=[select_first]).fit()
    selection = algorithm.last_selection
    assert len(selection.indices) <= 4
    if algorithm_class is GradMatch:
        assert float(selection.weights.sum()) == pytest.approx(len(selection.indices))
        assert "matching_residual" in selection.metrics
    elif not algorithm.rule.weighs:
        assert selection.weights is None
