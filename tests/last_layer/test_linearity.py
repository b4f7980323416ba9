"""An output that is not its layer's input times its weight plus its bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composer_gradmatch.last_layer import LinearLayer
from composer_gradmatch.last_layer.linearity import linear_fault


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 300), (3, 200, 300)])
def test_rounding_is_no_fault_and_one_other_number_is(dtype, shape):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(300, 7).to(dtype), torch.randn(shape).to(dtype)
    output = layer(inputs)
    assert linear_fault(LinearLayer(layer), inputs, output) is None
    changed = output.clone()
    changed[-1, ..., 3] += 0.5
    assert linear_fault(LinearLayer(layer), inputs, changed) == "it is not in this batch"


def test_autocast_rounds_what_comes_out_in_float32_too():
    layer, inputs = nn.Linear(300, 7), torch.randn(40, 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_fault(LinearLayer(layer), inputs, layer(inputs)) is None
        assert linear_fault(LinearLayer(layer), inputs, layer(inputs).float()) is None
        assert linear_fault(LinearLayer(layer), inputs, layer(inputs).float() * 1.5) is not None


def test_a_margin_at_one_class_is_seen():
    class Margin(nn.Linear):
        def forward(self, input):
            return super().forward(input) - 0.5 * F.one_hot(torch.arange(len(input)) % 1000, 1000)

    layer, inputs = Margin(16, 1000), torch.randn(8, 16)
    for dtype in (torch.float32, torch.bfloat16):
        layer, inputs = layer.to(dtype), inputs.to(dtype)
        assert linear_fault(LinearLayer(layer), inputs, layer(inputs)) is not None


def test_a_scale_that_starts_at_one_is_seen():
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input):
            return super().forward(input) * self.scale

    layer, inputs = Scaled(16, 5), torch.randn(8, 16)
    kept = {key: value.clone() for key, value in layer.state_dict().items()}
    assert "other values of its parameters (weight, bias, scale)" in str(
        linear_fault(LinearLayer(layer), inputs, layer(inputs))
    )
    assert all(torch.equal(value, kept[key]) for key, value in layer.state_dict().items())


def test_a_weight_that_is_packed_cannot_be_compared_but_under_linears_own_forward():
    class Packed(nn.Linear):
        def forward(self, input):
            return torch.zeros(*input.shape[:-1], self.out_features)

    for kind in (Packed, nn.Linear):
        layer = kind(16, 5)
        layer.weight = nn.Parameter(torch.zeros(40, 1, dtype=torch.uint8), requires_grad=False)
        fault = linear_fault(LinearLayer(layer), torch.randn(8, 16), torch.zeros(8, 5))
        assert (fault is None) == (kind is nn.Linear)
