"""A pass that is verified outside of a Trainer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.single_pass import SinglePass
from composer_gradmatch.reuse.unsupported import UnsupportedError

M, CLASSES = 16, 5
PICKS = torch.tensor([9, 0, 2, 13])


def deep():
    """Rounding makes a quarter of its gradient in bfloat16, with batch normalisation on few samples."""
    torch.manual_seed(0)
    return resnet18(num_classes=CLASSES)


class PartlyInFull(nn.Module):
    """A part of it is in full precision, whatever autocast is on."""

    def __init__(self):
        super().__init__()
        self.body, self.full, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.body(inputs))
        with torch.autocast("cpu", enabled=False):
            hidden = torch.tanh(self.full(hidden.float()))
        return self.head(hidden)


def gradients(model, precision, inputs, losses):
    """Backward outside of autocast, as in Composer's Trainer."""
    with precision():
        loss = losses(model(inputs), None).sum()
    return torch.autograd.grad(loss, list(model.parameters()))


def data(*shape):
    torch.manual_seed(1)
    inputs, targets = torch.randn(M, *shape), torch.randint(CLASSES, (M,))
    return inputs, lambda outputs, batch: F.cross_entropy(outputs.float(), targets[PICKS], reduction="none")


def served(model, precision, shape=(3, 32, 32)):
    inputs, losses = data(*shape)
    single = SinglePass(model, precision)
    single.forward(inputs, M)
    single.serve(PICKS, inputs[PICKS], None, losses)
    try:
        return gradients(model, precision, inputs[PICKS], losses)
    finally:
        single.release()


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("precision", [nullcontext, bf16])
def test_rounding_in_a_deep_network_is_no_reason_to_fall_back(precision):
    found = served(deep(), precision)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in found)


def test_what_runs_in_another_way_is_found_in_low_precision(monkeypatch):
    """As a slice of other samples would be."""
    original = ModelForward.own
    monkeypatch.setattr(ModelForward, "own", lambda self, batch: original(self, batch.flip(0)))
    with pytest.raises(UnsupportedError, match="differs"):
        served(deep(), bf16)


def test_what_is_in_full_precision_stays_so_backward():
    """In the graphs, as in the model itself, whose gradients are the same to the last bit."""
    torch.manual_seed(0)
    model = PartlyInFull()
    inputs, losses = data(12)
    expected = gradients(model, bf16, inputs[PICKS], losses)
    found = served(model, bf16, (12,))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
