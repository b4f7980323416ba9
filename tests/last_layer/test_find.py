"""Finding the layer whose output a model returns, or that was named."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Reordered
from torch import nn

from composer_gradmatch.last_layer import LinearLayer, resolve_output_layer
from composer_gradmatch.last_layer.find import as_linear, as_returned, cannot_find, watch_modules


class LogSoftmax(Reordered):
    def forward(self, inputs):
        return super().forward(inputs).log_softmax(1)


def test_the_output_layer_is_the_one_that_produced_the_output_not_the_last_one_defined():
    module = Reordered()
    with watch_modules(module, as_linear) as calls:
        outputs = module(torch.randn(4, 12))
    assert as_returned(calls, [outputs]) == [LinearLayer(module.head)]
    assert as_returned(calls, [outputs.view(-1)]) == [LinearLayer(module.head)]
    assert all(not layer._forward_hooks for layer in module.modules())


def test_of_an_output_that_no_linear_layer_put_out_the_candidates_are_listed():
    module = LogSoftmax()
    with watch_modules(module, as_linear) as calls:
        outputs = module(torch.randn(4, 12))
    assert as_returned(calls, [outputs]) == []
    assert re.search(r"output of no nn\.Linear.*head, body, unused", cannot_find(module, 0))


@pytest.mark.parametrize(
    ("name", "message"),
    [("haed", "not a module of Sequential.*0, 2"), ("1", "must be an nn.Linear, .*, but it is a Tanh.*0, 2")],
)
def test_a_wrong_output_layer_is_an_error_that_lists_the_candidates(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_output_layer(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), name)
