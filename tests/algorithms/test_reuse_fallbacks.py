"""Where one forward pass cannot be made, two are, and it is said why."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from cases import (
    IN_PLACE,
    MLP,
    Case,
    loader,
)
from composer import Callback
from composer.algorithms import MixUp
from composer.core import Algorithm
from one_pass import KEEP, M, always, assert_same_parameters, trained
from torch import nn

from composer_gradmatch import LossBackprop


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return self.head(hidden.relu() if hidden.sum() > 0 else hidden.tanh())


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return self.head((hidden - hidden.mean(0)).relu())


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("branching", Branching, "head", (12,)), "cannot be captured as one graph"),
        (Case("mixing", Mixing, "head", (12,)), "layers mix samples"),
        (IN_PLACE, "does not return its output layer's output as it is"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_not_supported_falls_back_to_two_passes_and_says_why_once(case, why, served):
    reference = case.model()
    trained(reference, loader(case.data(M), M), [always(reuse=False)], max_duration="3ba")
    model = case.model()
    with pytest.warns(UserWarning, match=why) as caught:
        trained(model, loader(case.data(M), M), [always()], max_duration="3ba")
    assert sum("two forward passes" in str(each.message) for each in caught) == 1
    assert not any(served)
    assert_same_parameters(reference, model, tolerance=1e-6)


def test_a_torch_without_the_interfaces_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "composer_gradmatch.reuse.single_pass", None)
    with pytest.warns(UserWarning, match=r"two forward passes are made: torch \S+ is not a version"):
        trained(MLP.model(), loader(MLP.data(M), M), [always()])


def test_falling_back_leaves_no_trace_in_buffers_and_generators():
    """Under dropout and batch normalisation: what two passes make, bit for bit."""

    class MixingBatchNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

        def forward(self, inputs):
            hidden = nn.functional.dropout(self.norm(self.body(inputs)), 0.3, self.training)
            return self.head(hidden - hidden.flip(0))

    case = Case("mixing", MixingBatchNorm, "head", (12,))
    models = [case.model(), case.model()]
    for model, reuse in zip(models, (False, True), strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "GradMatch: the activations")
            trained(model, loader(case.data(M), M), [always(reuse=reuse)], max_duration="2ba", seed=1)
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_pass_that_another_algorithm_makes_useless_is_given_up():
    with pytest.warns(UserWarning, match="not those that were picked"):
        trained(MLP.model(), loader(MLP.data(M), M), [always(), MixUp()], max_duration="2ba")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_backward_pass_is_left_to_two_passes(served):
    class Differentiating(Algorithm):
        @property
        def backwards_create_graph(self):
            return True

        def match(self, event, state):
            return False

        def apply(self, event, state, logger):
            raise AssertionError

    with pytest.warns(UserWarning, match="wants the graph of the backward pass"):
        trained(MLP.model(), loader(MLP.data(M), M), [always(), Differentiating()])
    assert not served


def test_a_forward_pass_that_counts_itself_falls_back(served):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.calls = nn.Linear(12, 5), 0

        def forward(self, inputs):
            self.calls += 1
            return self.head(inputs + 0 * self.calls)

    case = Case("counting", Counting, "head", (12,))
    with pytest.warns(UserWarning, match="captured anew whenever it runs"):
        trained(case.model(), loader(case.data(M), M), [always(LossBackprop)])
    assert not served


def test_a_number_that_changes_between_steps_falls_back(served, monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.scale = nn.Linear(12, 5), 1.0

        def forward(self, inputs):
            return self.head(inputs * self.scale)

    class Schedule(Callback):
        def batch_end(self, state, logger):
            state.model.module.scale *= 0.9

    case = Case("scaled", Scaled, "head", (12,))
    monkeypatch.setattr("composer_gradmatch.reuse.capture._CAPTURES", 4)
    with pytest.warns(UserWarning, match="captured more than 4 times: sizes, or numbers that its forward pass reads"):
        trained(case.model(), loader(case.data(M), M), [always()], max_duration="6ba", callbacks=[Schedule()])
    assert served == [9] * 4


@pytest.mark.parametrize(
    "kwargs", [{"scale_factor": 0.5}, {"selection_microbatch_size": 4}, {"selection_precision": "amp_bf16"}]
)
def test_a_selection_pass_of_its_own_is_refused(kwargs):
    with pytest.raises(ValueError, match="the training step's own forward pass"):
        always(**kwargs)


def dead(inputs):
    """Nothing gets through the ReLU: all gradients are zero."""
    return -inputs.abs()


@pytest.mark.parametrize(
    ("spoil", "why"), [(torch.zeros_like, "alike"), (dead, "the gradients .* not finite, or zero")]
)
def test_a_minibatch_that_shows_nothing_is_trained_in_two_passes_and_the_next_in_one(spoil, why, served):
    layers = [nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)]
    with torch.no_grad():
        layers[0].weight.abs_()
    case = Case("unbiased", lambda: nn.Sequential(*layers), "2", (12,))
    dataset = case.data(2 * M)
    dataset.tensors[0][:M] = spoil(dataset.tensors[0][:M])
    with pytest.warns(UserWarning, match=f"until one can be verified: .*{why}") as caught:
        trained(case.model(), loader(dataset, M), [always(LossBackprop)], max_duration="2ba")
    assert not any("cannot be used" in str(each.message) for each in caught)
    assert served == [int(KEEP * M)]
