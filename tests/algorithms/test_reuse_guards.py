"""What changes in a model during a run that is made in one forward pass: each step is that of the model as it is."""

from __future__ import annotations

import os
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from cases import On
from changing_runs import KEEP, M, Net, batches, checked, dicts, fit, lists, tuples
from composer.core import Event
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop


def unfreeze(model):
    model.a.requires_grad_(True)


def freeze(model):
    model.a.requires_grad_(False)


def replace_module(model):
    model.norm = nn.LayerNorm(16)


def replace_by_the_same_kind(model):
    model.a = nn.Linear(12, 16)


def replace_parameter(model):
    model.a.weight = nn.Parameter(torch.randn(16, 12))


def change_attribute(model):
    model.scale = 3.0


def change_buffer(model):
    model.offset.add_(1.0)


def change_buffer_without_a_version(model):
    model.offset.data.add_(1.0)


def replace_buffer(model):
    model.offset = torch.ones(16)


def change_parameter(model):
    with torch.no_grad():
        model.a.weight.mul_(-2.0)


def change_parameter_without_a_version(model):
    model.a.weight.data.mul_(-2.0)


def replace_data(model):
    model.a.weight.data = model.a.weight.data * -2.0


def replace_forward(model):
    model.a.forward = MethodType(lambda self, x: F.linear(x, self.weight, self.bias) * 2.0, model.a)


CHANGES = [
    freeze,
    replace_module,
    replace_by_the_same_kind,
    replace_parameter,
    change_attribute,
    change_buffer,
    change_buffer_without_a_version,
    replace_buffer,
    change_parameter,
    change_parameter_without_a_version,
    replace_data,
    replace_forward,
]


@pytest.mark.parametrize("event", [Event.BATCH_CHECKPOINT, Event.BATCH_START])
@pytest.mark.parametrize("change", [*CHANGES, unfreeze], ids=lambda change: change.__name__)
def test_a_model_that_is_changed_between_steps_or_after_the_selection(change, event, served):
    torch.manual_seed(0)
    model = Net()
    if change is unfreeze:
        freeze(model)

    def at_third(state):
        if int(state.timestamp.batch) == 2:
            change(state.model)

    said = checked(model, others=[On(event, at_third)], microbatch_size=3)
    assert not said, "once is no reason to give up"
    assert served.count(3) >= 2 * 3, "other steps are served"


@pytest.mark.parametrize("kind", [tuples, lists, dicts])
@pytest.mark.parametrize("select", [GradMatch, LossBackprop])
def test_a_parameter_that_is_always_changed_after_the_selection(kind, select, served):
    torch.manual_seed(0)
    said = checked(Net(), kind, 6, select, [On(Event.BATCH_START, lambda state: change_parameter(state.model))])
    assert not any(served)
    assert len(said) == 1
    assert "a parameter or a buffer was changed" in said[0]


class Settings:
    scale = 1.0


class Many(Net):
    """Reads numbers from outside of itself."""

    table = {"scale": 1.0}  # noqa: RUF012

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, batch):
        x = self.items(batch)[0]
        if self.source == "class":
            scale = Settings.scale
        elif self.source == "environment":
            scale = float(os.environ.get("A_SCALE_OF_THE_TESTS", "1"))
        elif self.source == "own class":
            scale = self.factor
        elif self.source == "dict":
            scale = self.table["scale"]
        elif self.source == "missing key":
            try:
                scale = self.table["other"]
            except KeyError:
                scale = 1.0
        else:
            scale = NUMBER
        return self.head(torch.tanh(self.hidden(x) * scale))

    factor = 1.0


NUMBER = 1.0


@pytest.mark.parametrize("source", ["class", "environment", "own class", "dict", "missing key", "global"])
@pytest.mark.parametrize("event", [Event.BATCH_CHECKPOINT, Event.BATCH_START])
def test_numbers_from_outside_of_the_model(source, event, served, monkeypatch):
    monkeypatch.setattr(Settings, "scale", 1.0)
    monkeypatch.setattr(Many, "factor", 1.0)
    monkeypatch.setattr(Many, "table", {"scale": 1.0})
    monkeypatch.setitem(globals(), "NUMBER", 1.0)
    monkeypatch.delenv("A_SCALE_OF_THE_TESTS", raising=False)

    def change(state):
        scale = 1.0 + int(state.timestamp.batch)
        Settings.scale = Many.factor = Many.table["scale"] = Many.table["other"] = scale
        monkeypatch.setenv("A_SCALE_OF_THE_TESTS", str(scale))
        globals()["NUMBER"] = scale

    torch.manual_seed(0)
    checked(Many(source), steps=3, others=[On(event, change)])
    assert served


class Centred(Net):
    """Mixes samples through features that are constant at first; with dropout or not."""

    def __init__(self, dropout, normalised):
        super().__init__()
        self.dropout, self.context = dropout, nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16) if normalised else nn.Identity()

    def hidden(self, x):
        context = self.context(x[:, 8:])
        hidden = F.dropout(self.a(x), self.dropout, self.training) if self.dropout else self.a(x)
        return hidden + context - context.mean(0)


@pytest.mark.parametrize(("dropout", "normalised"), [(0.0, False), (0.3, False), (0.0, True)])
@pytest.mark.parametrize("first", [1, 5])
def test_samples_that_are_mixed_later(dropout, normalised, first, served):
    data = batches(tuples, first + 2)
    for x, _ in data[:first]:
        x[:, 8:] = 0.0
    torch.manual_seed(0)
    algorithm = GradMatch(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True)
    said = fit(Centred(dropout, normalised), data, algorithm)
    assert served == [M // 2] * first
    assert len(said) == 1
    assert "mix samples" in said[0]
