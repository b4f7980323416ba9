"""H and P as a tap sees them, and which of their dimensions is the samples'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import MLP, Reordered
from oracles import classifier_gradients

from composer_gradmatch import last_layer_gram
from composer_gradmatch.last_layer import CheckedTap, LinearLayer, OutputLayerTap, sample_dim


def test_no_graph_of_the_backbone_is_built_and_the_grad_mode_is_restored():
    module = Reordered()
    with OutputLayerTap(LinearLayer(module.head)).open() as tap:
        outputs = module(torch.randn(4, 12))
        assert outputs.requires_grad
        tap.inputs_and_grads(outputs.square().sum(1))
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.head._forward_hooks


def test_a_layer_called_by_keyword_is_tapped():
    class Keyword(Reordered):
        def forward(self, inputs):
            return self.head(input=torch.relu(self.body(inputs)))

    inputs, targets = MLP.data(9).tensors
    model = Keyword().double()
    with CheckedTap(model, LinearLayer(model.head), chosen=False).open() as tap:
        h, p = tap.inputs_and_grads(F.cross_entropy(model(inputs.double()), targets, reduction="none"))
    gradients = torch.from_numpy(classifier_gradients(model, "head", inputs, targets))
    torch.testing.assert_close(last_layer_gram(h, p), gradients @ gradients.T)


def test_losses_that_do_not_depend_on_the_layer_are_told():
    model = Reordered()
    with OutputLayerTap(LinearLayer(model.head)).open() as tap:
        model(torch.randn(4, 12))
        with pytest.raises(ValueError, match="do not depend on the output layer's output"):
            tap.inputs_and_grads(model.body.bias.square().sum().expand(4))


def sample_grads(dim, shape, samples):
    def grads_of(sample):
        grads = torch.zeros(shape)
        grads.select(dim, sample)[:] = 1.0
        return grads * samples

    return grads_of


@pytest.mark.parametrize(
    ("shape", "m", "dim"),
    [((5, 3), 5, 0), ((5, 7, 3), 5, 0), ((7, 5, 3), 5, 1), ((7, 2, 5, 3), 5, 2), ((1, 7, 3), 1, 0)],
)
def test_the_samples_dimension_is_the_one_of_their_number(shape, m, dim):
    assert sample_dim(shape, m) == dim


@pytest.mark.parametrize(("shape", "m"), [((4, 5), 5), ((4, 6, 5), 5), ((35, 3), 5)])
def test_no_dimension_of_their_number_is_none(shape, m):
    assert sample_dim(shape, m) is None


@pytest.mark.parametrize("dim", [0, 1])
def test_where_lengths_agree_one_samples_gradient_decides(dim):
    assert sample_dim((5, 5, 3), 5, sample_grads(dim, (5, 5, 3), 1.0)) == dim
    only_first = torch.zeros(5, 5, 1)
    only_first.select(1 - dim, 0)[:] = 1.0  # The first position only.
    assert sample_dim((5, 5, 3), 5, sample_grads(dim, (5, 5, 3), only_first)) == dim


def test_a_sample_that_is_masked_or_not_finite_decides_nothing():
    assert sample_dim((5, 5, 3), 5, lambda sample: torch.zeros(5, 5, 3)) == 0
    assert sample_dim((5, 5, 3), 5, lambda sample: torch.full((5, 5, 3), torch.nan)) == 0
    real = sample_grads(1, (5, 5, 3), 1.0)
    assert sample_dim((5, 5, 3), 5, lambda sample: real(sample) * (sample > 2)) == 1


def test_losses_that_mix_samples_have_no_dimension():
    with pytest.raises(ValueError, match="more than one index of each dimension"):
        sample_dim((5, 5, 3), 5, lambda sample: torch.ones(5, 5, 3))
