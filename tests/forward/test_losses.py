"""The weighted loss is the model's own with its samples weighted, whatever its reduction and its other terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from composer_gradmatch.forward.loss_scale import LossScale
from composer_gradmatch.forward.losses import check_objective, per_sample_losses, weighted_loss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0, 1, -100])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 2.0, 0.1])
CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "class_weights": {"weight": CLASS_WEIGHTS},
    "label_smoothing": {"label_smoothing": 0.2},
}


def expected_scale(options, n):
    counted = TARGETS[:n][TARGETS[:n] >= 0]
    if options.get("reduction") == "sum":
        return 1.0
    return 1 / float(CLASS_WEIGHTS[counted].sum() if "weight" in options else len(counted))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("num_samples", [7, 8])  # The eighth is an ignored one.
def test_the_weighted_loss_is_the_sum_by_hand(options, num_samples):
    leaf = LOGITS[:num_samples].double().requires_grad_()
    weights = torch.linspace(0, 2, num_samples).double()
    options = {key: value.double() if key == "weight" else value for key, value in options.items()}
    own = F.cross_entropy(leaf, TARGETS[:num_samples], **options)
    losses = F.cross_entropy(leaf, TARGETS[:num_samples], **{**options, "reduction": "none"})
    scale = LossScale().read(losses, own, [leaf])
    assert float(scale) == pytest.approx(expected_scale(options, num_samples), rel=1e-6)
    found = weighted_loss(losses, weights, own, scale)
    by_hand = expected_scale(options, num_samples) * (weights * losses).sum()
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (found, by_hand)))
    check_objective(losses, own, [leaf], LossScale())


def test_with_weights_one_the_loss_is_the_models_own_to_the_last_bit():
    leaf = LOGITS[:7].clone().requires_grad_()
    losses, own = F.cross_entropy(leaf, TARGETS[:7], reduction="none"), F.cross_entropy(leaf, TARGETS[:7])
    assert weighted_loss(losses, torch.ones(7), own, 1 / 7).equal(own)


def test_a_penalty_keeps_its_gradient_and_does_not_scale_the_samples():
    leaf, parameter = LOGITS[:7].clone().requires_grad_(), torch.tensor([3.0], requires_grad=True)
    losses = F.cross_entropy(leaf, TARGETS[:7], reduction="none")
    own = losses.mean() + 100 * parameter.square().sum()
    loss = weighted_loss(losses, torch.zeros(7), own, LossScale().read(losses, own, [leaf]))
    of_leaf, of_parameter = torch.autograd.grad(loss, [leaf, parameter])
    assert of_parameter.item() == pytest.approx(600)
    assert of_leaf.abs().max() < 1e-6  # All samples have weight zero.


def test_losses_that_cancel_have_the_scale_of_the_mean():
    leaf = LOGITS.clone().requires_grad_()
    advantage = torch.tensor([1.0, -1.0] * 4)
    losses = leaf.log_softmax(1)[:, 0] * 0 + advantage * leaf.log_softmax(1)[:, 0].exp()
    losses = losses - losses.detach()  # All values are zero; the gradients are not.
    assert float(LossScale().read(losses, losses.mean(), [leaf])) == 1 / 8


def test_a_term_that_comes_later_does_not_change_the_scale_and_is_seen():
    scale, consistency = LossScale(), lambda leaf: leaf.log_softmax(1).mul(leaf.detach().roll(1, 0).softmax(1)).mean()
    for n in (8, 6, 7, 5):
        leaf = LOGITS[:n].clone().requires_grad_()
        losses = F.cross_entropy(leaf, TARGETS[:n].clamp(min=0), reduction="none")
        own = losses.mean() + (0.7 * consistency(leaf) if n < 7 else 0.0)
        assert float(scale.read(losses, own, [leaf])) == pytest.approx(1 / n, rel=1e-6)
        assert bool(scale.other_terms) == (n != 8)


def test_a_scale_that_varies_is_read_anew_each_time():
    scale = LossScale()
    for first in (0, 3, 5):
        leaf, targets = LOGITS[first:].clone().requires_grad_(), TARGETS[first:]
        own = F.cross_entropy(leaf, targets)  # The last sample is ignored.
        losses = F.cross_entropy(leaf, targets, reduction="none")
        assert float(scale.read(losses, own, [leaf])) == pytest.approx(1 / (7 - first), rel=1e-6)


def test_a_single_row_that_may_hold_another_term_is_not_believed():
    scale = LossScale()
    leaf = LOGITS[:4].clone().requires_grad_()
    losses = F.cross_entropy(leaf, TARGETS[:4], reduction="none")
    scale.read(losses, losses.mean(), [leaf])
    one = torch.zeros(1, 1, requires_grad=True)
    each = (one * 3).flatten()
    assert float(scale.read(each, each.mean() + one.sum(), [one])) == 1.0
    assert float(scale.read(each, each.mean() + one.sum(), [one], trusted=True)) == pytest.approx(4 / 3)


def test_where_nothing_has_a_gradient_the_scale_is_that_of_before():
    scale = LossScale()
    leaf = LOGITS[:4].clone().requires_grad_()
    assert float(scale.read((leaf * 0).sum(1), (leaf * 0).sum(), [leaf])) == 1 / 4
    losses = F.cross_entropy(leaf, TARGETS[:4], reduction="none")
    scale = LossScale()
    scale.read(losses, losses.sum() * 2, [leaf])
    assert float(scale.read((leaf * 0).sum(1), (leaf * 0).sum(), [leaf])) == pytest.approx(2.0)


def test_a_loss_that_does_not_depend_on_the_outputs_is_read_elsewhere():
    leaf = LOGITS[:4].clone().requires_grad_()
    losses = F.cross_entropy(leaf, TARGETS[:4], reduction="none")
    apart = torch.tensor(5.0, requires_grad=True)
    assert float(LossScale().read(losses, apart * 1, [leaf], iter([losses.sum() / 9]))) == pytest.approx(1 / 9)


def test_the_scale_resumes():
    scale, leaf = LossScale(), LOGITS[:4].clone().requires_grad_()
    losses = F.cross_entropy(leaf, TARGETS[:4], reduction="none")
    scale.read(losses, losses.sum() * 3, [leaf])
    resumed = LossScale()
    resumed.load_state_dict(scale.state_dict())
    assert resumed.state_dict() == scale.state_dict()
    assert resumed.state_dict()["usual"] == pytest.approx(12.0)


def test_another_objective_is_told_from_the_models_own():
    leaf = LOGITS[:7].clone().requires_grad_()
    losses = F.cross_entropy(leaf, TARGETS[:7], reduction="none")
    with pytest.raises(ValueError, match="do not add up to the model's own loss"):
        check_objective(losses, F.multi_margin_loss(leaf, TARGETS[:7]), [leaf], LossScale())
    with pytest.raises(ValueError, match="does not depend on the output layer's output"):
        check_objective(losses, torch.tensor(1.0, requires_grad=True) * 1, [leaf], LossScale())
    with pytest.raises(TypeError, match="must be one tensor"):
        check_objective(losses, {"total": losses.mean()}, [leaf], LossScale())


def test_losses_of_positions_are_summed_for_each_sample():
    class Model:
        def loss(self, outputs, batch, reduction="mean"):
            return outputs if reduction == "none" else outputs.mean()

    outputs = torch.arange(6.0).reshape(2, 3)
    assert per_sample_losses(Model(), outputs, None, 2).tolist() == [3.0, 12.0]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda outputs: outputs, r"failed: .*unexpected keyword argument 'reduction'.*\. Pass loss_fn="),
        (
            lambda outputs, **kwargs: F.mse_loss(outputs, outputs, reduction="mean", **kwargs),
            r"failed: .*multiple values for keyword argument 'reduction'.*\. Pass loss_fn=",
        ),
        (lambda outputs, **kwargs: outputs + {}, "^unsupported operand"),
    ],
    ids=["unexpected", "twice", "another"],
)
def test_a_loss_that_takes_no_reduction_after_all_is_told_from_other_errors(function, error):
    class Model:
        def loss(self, outputs, batch, **kwargs):
            return function(outputs, **kwargs)

    with pytest.raises(TypeError, match=error):
        per_sample_losses(Model(), torch.ones(2), None, 2)
