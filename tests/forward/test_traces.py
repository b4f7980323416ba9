"""What a forward pass changes in a model is put back: buffers, parameters, attributes of modules."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch import nn

from composer_gradmatch.forward.traceless import no_trace
from composer_gradmatch.forward.traces import ParameterContents


class Leaves(nn.Module):
    """Changes all kinds of things in its forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.embedding = nn.Embedding(4, 3, max_norm=0.1)
        self.register_buffer("code", torch.zeros(3))
        self.calls, self.temperature, self.started = 0, 1.0, False
        self.gathered, self.by_name, self.seen, self.recent = [], {"first": 1}, {1}, deque([1], maxlen=2)
        self.average = torch.zeros(3)
        self.replaced = torch.zeros(3)

    def forward(self, inputs):
        self.calls += 1
        self.temperature *= 0.9
        self.started = True
        self.gathered.append(inputs.mean())
        self.by_name["second"] = 2
        self.seen.add(2)
        self.recent.append(2)
        self.average.add_(1)
        self.replaced = self.replaced + 1
        self.later = inputs
        with torch.no_grad():
            self.code.add_(1)
            self.code = self.code * 2
        return self.layer(inputs)


def attributes(module):
    return {
        name: copy.deepcopy(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "later"
    }


def test_attributes_and_buffers_are_put_back():
    model = Leaves()
    before, buffer, held = attributes(model), model.code, (model.gathered, model.by_name, model.average)
    with no_trace(model):
        model(torch.ones(2, 3))
        model(torch.ones(2, 3))
        assert model.calls == 2
    after = attributes(model)
    assert {k: v for k, v in before.items() if not isinstance(v, torch.Tensor)} == {
        k: v for k, v in after.items() if not isinstance(v, torch.Tensor)
    }
    assert not model.average.any()
    assert not model.replaced.any()
    assert model.code is buffer
    assert not model.code.any()
    assert all(one is other for one, other in zip(held, (model.gathered, model.by_name, model.average), strict=True))


def by_data(layer):
    layer.weight.data.mul_(0.5)


def by_assignment(layer):
    layer.weight.data = layer.weight.data * 0.5


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(0.5)


@pytest.mark.parametrize("change", [by_data, by_assignment, in_place])
def test_parameters_that_were_changed_are_found_and_put_back(change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    contents, pointer = ParameterContents(model.parameters()), model[0].weight.data_ptr()
    change(model[0])
    assert contents.changed() == [model[0].weight]
    contents.restore()
    assert model[0].weight.equal(before)
    assert model[0].weight.data_ptr() == pointer
    assert contents.changed() == []


@pytest.mark.parametrize(("change", "told"), [(by_data, False), (by_assignment, True), (in_place, True)])
def test_changes_are_told_for_nothing_but_those_behind_torchs_back(change, told):
    model = nn.Sequential(nn.Linear(3, 3))
    with no_trace(model) as traces:
        change(model[0])
        assert (traces.changed_parameters() == [model[0].weight]) is told


def test_what_puts_parameters_back_leaves_graphs_that_saved_them_valid():
    layer = nn.Linear(3, 1)
    inputs = torch.ones(2, 3, requires_grad=True)
    outputs = layer(inputs).sum()
    contents = ParameterContents(layer.parameters())
    contents.restore()
    outputs.backward()
    assert inputs.grad is not None


def test_attributes_that_came_before_torchs_own_are_put_back():
    class Early(nn.Module):
        def __init__(self):
            self.gathered = []
            super().__init__()
            self.calls = 0

        def forward(self, inputs):
            self.gathered.append(inputs)
            self.calls += 1
            return inputs

    model = nn.Sequential(Early(), Early())
    with no_trace(model):
        model(torch.ones(2))
    assert [(each.gathered, each.calls) for each in model] == [([], 0), ([], 0)]


def test_a_module_that_is_there_twice_or_missing_is_put_back_once():
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Sequential(shared))
    model.register_module("none", None)
    mean = shared.running_mean.clone()
    with no_trace(model) as traces:
        shared(torch.randn(4, 3))
        assert not torch.equal(shared.running_mean, mean)
    assert torch.equal(shared.running_mean, mean)
    assert len(traces._buffers) == 3
