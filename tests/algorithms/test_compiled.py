"""Training steps of compiled models stay compiled, and selection with two passes takes no part of that away."""

from __future__ import annotations

import logging

import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from cases import ON, On, loader, make_trainer
from composer.core import Event
from composer.models import ComposerModel
from head_models import LENGTH, VOCABULARY, WIDTH, SharedEmbedding
from one_pass import assert_same_parameters
from torch import nn
from torch.utils.data import TensorDataset

from composer_gradmatch import (
    GradMatch,
    ImportanceBackprop,
    LossBackprop,
    RandomBackprop,
    RuleBackprop,
    number_samples,
    select_first,
)
from composer_gradmatch.forward.compiled import is_compiled


class Model(ComposerModel):
    """A language model in small, or a classifier of its first position, with a head of its own or the embedding's."""

    def __init__(self, tied, positions=True):
        super().__init__()
        torch.manual_seed(0)
        self.positions = positions
        self.wte, self.body = SharedEmbedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = None if tied else nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch):
        hidden = torch.tanh(self.body(self.wte(batch[0])))
        hidden = hidden if self.positions else hidden[:, 0]
        return self.wte(hidden, unembed=True) if self.head is None else self.head(hidden)

    def loss(self, outputs, batch, reduction="mean"):
        targets = batch[1] if self.positions else batch[1][:, 0]
        return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction=reduction)


def data():
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (53, LENGTH + 1))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


class Graphs:
    """A backend of ``torch.compile`` that counts the graphs that it makes, and their calls."""

    def __init__(self):
        self.made = self.calls = 0

    def __call__(self, module, inputs):
        self.made += 1

        def run(*args):
            self.calls += 1
            return module(*args)

        return run


def train(model, algorithm, train_loader, graphs=None, epochs=6):
    """Trains; returns the calls of graphs in each microbatch's and each selection's passes, and graphs by step."""
    in_training, in_selection, made, at = [], [], [], [0]

    def begin(_):
        at[0] = graphs.calls

    notes = []
    if graphs is not None:
        notes = [
            On(Event.BEFORE_FORWARD, begin),
            On(Event.AFTER_FORWARD, lambda _: in_training.append(graphs.calls - at[0])),
            On(Event.BEFORE_DATALOADER, begin),
            On(Event.BATCH_START, lambda _: in_selection.append(graphs.calls - at[0])),
            On(Event.BATCH_END, lambda _: made.append(graphs.made)),
        ]
    make_trainer(
        model,
        train_loader,
        [algorithm, *notes],
        algorithm_passes=[select_first],
        max_duration=f"{epochs}ep",
        device_train_microbatch_size=5,
        compile_config=None if graphs is None else {"backend": graphs},
    ).fit()
    return in_training, in_selection, made


STRATEGIES = {
    "gradmatch": lambda: GradMatch(keep=0.4, **ON),
    "importance": lambda: ImportanceBackprop(keep=0.5, **ON),  # Which looks at few minibatches.
    "loss": lambda: LossBackprop(keep=0.4, **ON),
    "random": lambda: RandomBackprop(keep=0.4, **ON),
    "rule": lambda: RuleBackprop("grand", keep=0.4, **ON),
    "every third whole": lambda: GradMatch(keep=0.4, **{**ON, "interrupt": 3}),
}


@pytest.mark.parametrize("tied", [True, False], ids=["product", "linear"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_stays_compiled(strategy, tied, caplog):
    """With minibatches, picks and microbatches of sizes that change, and passes with and without gradients."""
    dynamo.reset()
    graphs, model = Graphs(), Model(tied)
    with caplog.at_level(logging.WARNING, "torch._dynamo"):
        in_training, in_selection, made = train(model, STRATEGIES[strategy](), loader(data(), 20), graphs)
    assert "recompile_limit" not in caplog.text
    assert set(in_training) == {1}, "a microbatch was trained uncompiled, or in parts"
    assert made[-1] == made[5], "graphs were made after two epochs"
    assert made[-1] <= (4 if strategy == "loss" else 3)
    # Looks at losses are compiled; those at gradients watch a layer, which would compile it anew each time.
    assert {calls > 0 for calls in in_selection[3:]} == {strategy == "loss"}


@pytest.mark.parametrize("tied", [True, False], ids=["product", "linear"])
def test_steps_are_those_of_the_uncompiled_model(tied):
    dynamo.reset()
    models = [Model(tied), Model(tied)]
    train(models[0], STRATEGIES["gradmatch"](), loader(data(), 20))
    train(models[1], STRATEGIES["gradmatch"](), loader(data(), 20), Graphs())
    assert_same_parameters(*models, tolerance=1e-5)


def test_training_stays_compiled_with_stored_looks():
    """Its steps are no looks, since they are not watched: samples are looked at again as they grow old."""
    dynamo.reset()
    numbered, graphs = number_samples(data()), Graphs()
    batches = torch.utils.data.DataLoader(numbered, 20, collate_fn=numbered.collate_fn)
    in_training, in_selection, _ = train(
        Model(False, positions=False), GradMatch(keep=0.4, **ON, refresh="2ep"), batches, graphs
    )
    assert set(in_training) == {1}
    assert set(in_selection[3:]) == {0}
    assert graphs.made <= 3


def test_a_model_is_compiled_if_a_part_of_it_is():
    dynamo.reset()
    model = Model(False)
    assert not is_compiled(model)
    model.body.compile(backend="eager")
    assert is_compiled(model)
    model = Model(False)
    model.forward = torch.compile(model.forward, backend="eager")
    assert is_compiled(model)
    assert is_compiled(nn.Sequential(model))
