"""With unit weights the weighted loss is the model's own, in value and gradient, whatever its reduction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from composer_gradmatch.losses import check_unit_weights, per_sample_losses, weighted_loss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0, 1, -100])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 2.0, 0.1])
CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "class_weights": {"weight": CLASS_WEIGHTS},
    "label_smoothing": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("num_samples", [7, 8])  # The eighth is an ignored one.
def test_unit_weights_give_the_models_own_loss(options, num_samples):
    leaf = LOGITS[:num_samples].clone().requires_grad_()
    own = F.cross_entropy(leaf, TARGETS[:num_samples], **options)
    losses = F.cross_entropy(leaf, TARGETS[:num_samples], **{**options, "reduction": "none"})
    unit = weighted_loss(losses, torch.ones(num_samples), own)
    torch.testing.assert_close(unit, own, rtol=1e-6, atol=0)
    (own_grad,) = torch.autograd.grad(own, leaf, retain_graph=True)
    (unit_grad,) = torch.autograd.grad(unit, leaf, retain_graph=True)
    torch.testing.assert_close(unit_grad, own_grad, rtol=1e-5, atol=1e-8)
    check_unit_weights(losses, own, leaf)


def test_weights_weigh_the_mean():
    losses = torch.tensor([1.0, 2.0, 4.0])
    weights = torch.tensor([2.0, 0.5, 0.5])
    assert weighted_loss(losses, weights, losses.mean()) == pytest.approx((2.0 + 1.0 + 2.0) / 3)


def test_losses_that_are_all_zero_stay_finite():
    leaf = torch.zeros(3, requires_grad=True)
    loss = weighted_loss(leaf * 2, torch.ones(3), (leaf * 2).mean())
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == 0
    torch.testing.assert_close(grad, torch.full((3,), 2 / 3))


def test_another_objective_is_told_from_the_models_own():
    leaf = LOGITS[:7].clone().requires_grad_()
    losses = F.cross_entropy(leaf, TARGETS[:7], reduction="none")
    with pytest.raises(ValueError, match="do not add up to the model's own loss"):
        check_unit_weights(losses, F.multi_margin_loss(leaf, TARGETS[:7]), leaf)
    with pytest.raises(TypeError, match="must be one tensor"):
        check_unit_weights(losses, {"total": losses.mean()}, leaf)


def test_losses_of_positions_are_summed_for_each_sample():
    class Model:
        def loss(self, outputs, batch, reduction="mean"):
            return outputs if reduction == "none" else outputs.mean()

    outputs = torch.arange(6.0).reshape(2, 3)
    assert per_sample_losses(Model(), outputs, None, 2).tolist() == [3.0, 12.0]
