"""K = HHᵀ∘PPᵀ + PPᵀ against explicit gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch.nn.functional as F
from cases import STEP_CASES
from oracles import classifier_gradients

from composer_gradmatch import last_layer_gram
from composer_gradmatch.last_layer import OutputLayerTap, resolve_output_layer


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


def test_shapes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="same number of samples"):
        last_layer_gram(np.ones((3, 2)), np.ones((4, 2)))
