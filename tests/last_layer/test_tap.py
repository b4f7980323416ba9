from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BATCHNORM, STEP_CASES, Reordered
from oracles import classifier_gradients, reference_selection
from torch import nn

from composer_gradmatch import last_layer_gram, select_using_gradient_matching
from composer_gradmatch.last_layer import OutputLayerTap, find_output_layer, resolve_output_layer, watch_linears


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_the_gram_matrix_is_that_of_explicit_gradients(case):
    inputs, targets = case.data(15).tensors
    module = case.model().module.double()
    layer = resolve_output_layer(module, case.layer)
    with OutputLayerTap(layer).open() as tap:
        losses = F.cross_entropy(module(inputs.double()), targets, reduction="none")
        h, p = tap.inputs_and_grads(losses)
    gradients = classifier_gradients(module, case.layer, inputs, targets)
    gram = last_layer_gram(h, p, layer.bias is not None)
    np.testing.assert_allclose(gram.numpy(), gradients @ gradients.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(last_layer_gram(h.numpy(), p.numpy(), layer.bias is not None), gram.numpy())


def test_no_graph_of_the_backbone_is_built_and_the_grad_mode_is_restored():
    module = Reordered()
    with OutputLayerTap(module.head).open() as tap:
        outputs = module(torch.randn(4, 12))
        assert outputs.requires_grad
        tap.inputs_and_grads(outputs.square().sum(1))
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.head._forward_hooks


class LogSoftmax(Reordered):
    def forward(self, inputs):
        return super().forward(inputs).log_softmax(1)


def test_the_output_layer_is_the_one_that_produced_the_output_not_the_last_one_defined():
    module = Reordered()
    with watch_linears(module) as calls:
        outputs = module(torch.randn(4, 12))
    assert find_output_layer(module, calls, [outputs]) is module.head
    assert find_output_layer(module, calls, [outputs.view(-1)]) is module.head
    assert all(not layer._forward_hooks for layer in module.modules())


def test_an_output_that_no_linear_layer_put_out_is_an_error_that_lists_the_candidates():
    module = LogSoftmax()
    with watch_linears(module) as calls:
        outputs = module(torch.randn(4, 12))
    with pytest.raises(ValueError, match=r"output of no nn\.Linear.*head, body, unused"):
        find_output_layer(module, calls, [outputs])


@pytest.mark.parametrize(
    ("name", "message"),
    [("haed", "not a module of Sequential.*0, 2"), ("1", "must be an nn.Linear, but it is a Tanh.*0, 2")],
)
def test_a_wrong_output_layer_is_an_error_that_lists_the_candidates(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_output_layer(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), name)


def test_shapes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="same number of samples"):
        last_layer_gram(np.ones((3, 2)), np.ones((4, 2)))


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
