"""The functional step, ``select_using_gradient_matching``."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BATCHNORM, MLP, NUM_CLASSES, STEP_CASES, Reordered
from oracles import reference_selection
from torch import nn

from composer_gradmatch import select_using_gradient_matching


class LogSoftmax(Reordered):
    def forward(self, inputs):
        return super().forward(inputs).log_softmax(1)


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_the_functional_step_picks_what_the_reference_picks(case):
    inputs, targets = case.data(23).tensors
    module = case.model().module
    picks, weights = reference_selection(module, case.layer, inputs, targets, 0.4)
    new_inputs, new_targets, new_weights = select_using_gradient_matching(
        inputs, targets, module, F.cross_entropy, keep=0.4
    )
    assert torch.equal(new_inputs, inputs[picks])
    assert torch.equal(new_targets, targets[picks])
    np.testing.assert_allclose(new_weights.numpy(), weights, rtol=1e-3, atol=1e-4)
    assert new_weights.sum() == pytest.approx(len(picks), rel=1e-5)


def test_the_functional_step_takes_a_layer_under_a_log_softmax_and_leaves_no_trace():
    inputs, targets = BATCHNORM.data(23).tensors
    module = BATCHNORM.model().module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    rng = torch.get_rng_state()
    select_using_gradient_matching(inputs, targets, module, F.cross_entropy, keep=0.4)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())

    log_softmax, plain = LogSoftmax(), Reordered()
    plain.load_state_dict(log_softmax.state_dict())
    features = torch.randn(23, 12)
    through_nll = select_using_gradient_matching(features, targets, log_softmax, F.nll_loss, 0.4, output_layer="head")
    through_ce = select_using_gradient_matching(features, targets, plain, F.cross_entropy, 0.4)
    assert torch.equal(through_nll[0], through_ce[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"scale_factor": 2.0}, "scale_factor"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "same number of samples"),
    ],
)
def test_the_functional_step_refuses_bad_input(change, message):
    inputs, targets = STEP_CASES[0].data(8).tensors
    arguments = {"input": inputs, "target": targets, "model": STEP_CASES[0].module(), "loss_fun": F.cross_entropy}
    with pytest.raises(ValueError, match=message):
        select_using_gradient_matching(**{**arguments, **change})


def without_reduction(outputs, target):
    return F.cross_entropy(outputs, target)


@pytest.mark.parametrize("loss", [without_reduction, nn.CrossEntropyLoss(reduction="none"), "cross_entropy"])
def test_a_loss_that_takes_no_reduction_is_explained(loss):
    inputs, targets = MLP.data(9).tensors
    with pytest.raises(
        TypeError, match=r"loss_fun (takes no keyword argument 'reduction'|must be a function).*F\.cross"
    ):
        select_using_gradient_matching(inputs, targets, MLP.module(), loss)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda outputs, target, **kwargs: F.cross_entropy(outputs, target, **kwargs),
    ],
)
def test_a_loss_that_takes_it_in_another_way_is_taken(loss):
    inputs, targets = MLP.data(9).tensors
    assert len(select_using_gradient_matching(inputs, targets, MLP.module(), loss, 0.5)[0]) <= 4


def test_keep_of_one_keeps_all_as_they_are():
    inputs, targets = MLP.data(9).tensors
    picked, picked_targets, weights = select_using_gradient_matching(
        inputs, targets, MLP.module(), F.cross_entropy, 1.0
    )
    assert torch.equal(picked, inputs)
    assert torch.equal(picked_targets, targets)
    assert weights.tolist() == [1.0] * 9


def test_the_functional_step_refuses_and_warns_as_the_algorithm_does():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(NUM_CLASSES, 8), nn.Linear(12, 8)

        def forward(self, inputs):
            return F.linear(self.body(inputs), F.normalize(self.embedding.weight))

    class Normalised(nn.Linear):
        def forward(self, input):
            return super().forward(F.normalize(input, dim=-1))

    inputs, targets = MLP.data(9).tensors
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        select_using_gradient_matching(inputs, targets, Tied(), F.cross_entropy)
    with pytest.warns(UserWarning, match=r"output_layer='body' is not what.*embedding\.weight"):
        select_using_gradient_matching(inputs, targets, Tied(), F.cross_entropy, output_layer="body")
    with pytest.raises(ValueError, match="does not put out its input times"):
        select_using_gradient_matching(inputs, targets, nn.Sequential(Normalised(12, 5)), F.cross_entropy)
