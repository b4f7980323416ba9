"""Which parameters the gradients at an output layer are made with."""

from __future__ import annotations

import torch
from cases import Reordered
from torch import nn

from composer_gradmatch.last_layer import LinearLayer, OutputLayerTap
from composer_gradmatch.last_layer.graph import learned_behind


def behind(loss, module=None):
    module = Reordered() if module is None else module
    with OutputLayerTap(LinearLayer(module.head)).open() as tap:
        losses = loss(module, module(torch.randn(4, 12)))
        return learned_behind(losses, tap.leaf, module)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * weight.sum(), torch.zeros_like(weight)


def test_parameters_behind_are_those_that_gradients_at_the_output_are_made_with():
    assert behind(lambda module, z: z.square().sum(1)) == []
    assert behind(lambda module, z: module.unused(z @ torch.ones(5, 16)).square().sum(1)) == [
        "unused.bias",
        "unused.weight",
    ]
    assert behind(lambda module, z: (z + module.unused.bias).logsumexp(1)) == ["unused.bias"]
    # Of no sample's own: a penalty.
    assert behind(lambda module, z: z.square().sum(1) + module.body.weight.square().sum()) == []
    assert behind(lambda module, z: Once.apply(z, module.body.bias).sum(1)) == ["body.bias"]
    other = nn.Parameter(torch.ones(5))
    assert behind(lambda module, z: (z * other).square().sum(1)) == ["one of shape (5,) that is not the model's"]
