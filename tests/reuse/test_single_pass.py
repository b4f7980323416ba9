"""A pass that is verified outside of a Trainer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from composer_gradmatch.reuse.single_pass import SinglePass
from composer_gradmatch.reuse.unsupported import UnsupportedError

M, CLASSES = 16, 5
PICKS = torch.tensor([9, 0, 2, 13])


def deep():
    """Rounding makes a quarter of its gradient in bfloat16, with batch normalisation on few samples."""
    torch.manual_seed(0)
    return resnet18(num_classes=CLASSES)


def served(model, precision):
    torch.manual_seed(1)
    inputs, targets = torch.randn(M, 3, 32, 32), torch.randint(CLASSES, (M,))
    single = SinglePass(model, precision)

    def losses(outputs, batch):
        return F.cross_entropy(outputs.float(), targets[PICKS], reduction="none")

    single.forward(inputs, M)
    single.serve(PICKS, inputs[PICKS], None, losses)
    try:
        with precision():
            return torch.autograd.grad(losses(model(inputs[PICKS]), None).sum(), list(model.parameters()))
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
    original = SinglePass._own
    monkeypatch.setattr(SinglePass, "_own", lambda self, batch: original(self, batch.flip(0)))
    with pytest.raises(UnsupportedError, match="differs"):
        served(deep(), bf16)
