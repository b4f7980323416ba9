"""Rows that are not the samples, and losses that depend on other samples, are told from those that are right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composer_gradmatch.forward.sample_checks import (
    check_independence,
    check_rows,
    find_dependence_on_batch,
    normalised_by_running_statistics,
)

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def plain(x):
    return x @ WEIGHT


def normalised(x):
    return (x - x.mean(0)) / x.std(0) @ WEIGHT


def attends(x):
    return (x @ x.T / 6).softmax(1) @ x + 2 * x


def with_missing(x):
    return torch.where(torch.arange(6) == 2, torch.nan, x)


def positions_first(x):
    return torch.stack([x.roll(t, 1)[:, :4] for t in range(8)])  # (T, M, D) with T = M.


def sorts(x):
    return (x @ WEIGHT)[x[:, 0].argsort()]


def reverses(x):
    return (x @ WEIGHT).flip(0)


def rows(function):
    return lambda samples: {"the inputs": function(INPUTS[samples])}


@pytest.mark.parametrize("function", [plain, normalised, attends, with_missing])
def test_rows_that_are_the_samples_pass(function):
    check_rows(rows(function), 8, True, "")


@pytest.mark.parametrize("function", [positions_first, sorts, reverses])
@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_that_are_not_the_samples_are_told(function, deterministic):
    with pytest.raises(ValueError, match=r"inputs .*Put them first\."):
        check_rows(rows(function), 8, deterministic, "Put them first.")


def test_dropout_whose_masks_stay_with_the_rows_passes():
    def dropped(samples):
        generator = torch.Generator().manual_seed(3)
        return {"the inputs": plain(INPUTS[samples]) * torch.bernoulli(torch.full((8, 4), 0.5), generator=generator)}

    check_rows(dropped, 8, False, "")


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_few_samples_are_enough(num_samples):
    check_rows(rows(plain), num_samples, True, "")


def test_samples_that_are_padded_to_the_longest_say_nothing_of_other_lengths():
    lengths = torch.tensor([2, 3, 4, 5])

    def padded(samples):
        return {"the inputs": F.pad(INPUTS[samples][:, : int(lengths[samples].max())], (0, 0))}

    check_rows(padded, 4, True, "")


@pytest.mark.parametrize("loss", [lambda o: F.cross_entropy(o, torch.arange(8) % 4, reduction="none")])
def test_losses_of_each_sample_on_its_own_are_independent(loss):
    leaf = plain(INPUTS).requires_grad_()
    assert check_independence(loss(leaf), leaf) is None


def contrastive(outputs):
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(8).roll(1), reduction="none")


def centred(outputs):
    return ((outputs - outputs.mean(0)) ** 2).sum(1)


@pytest.mark.parametrize("loss", [contrastive, centred, lambda o: o.sum(1) * o.detach().mean() + o.flip(0).sum(1)])
def test_losses_that_depend_on_other_samples_are_told(loss):
    leaf = plain(INPUTS).requires_grad_()
    assert check_independence(loss(leaf), leaf) is not None


def test_batch_normalisation_is_in_training_again_afterwards():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval())
    with normalised_by_running_statistics(model):
        assert [layer.training for layer in model] == [False, False, False]
    assert [layer.training for layer in model] == [True, True, False]


CLASSES = torch.tensor([0, 1, 1, 2, 0, 3, 2, 1])
ADVANTAGES = torch.randn(8, generator=torch.Generator().manual_seed(2)) + 3


def cross_entropies(x, classes, _):
    return F.cross_entropy(plain(x), classes, reduction="none")


def centres_advantages(x, classes, advantages):
    return (advantages - advantages.mean()) * cross_entropies(x, classes, advantages)


def counts_classes(x, classes, advantages):
    return cross_entropies(x, classes, advantages) / torch.bincount(classes, minlength=4)[classes]


def scales_by_the_mean(x, classes, advantages):
    losses = cross_entropies(x, classes, advantages)
    return losses / losses.mean()


def masks_some(x, classes, advantages):
    return torch.where(classes == 1, 0.0, cross_entropies(x, classes, advantages))


@pytest.mark.parametrize(
    ("loss", "depends"),
    [
        (cross_entropies, False),
        (masks_some, False),
        (scales_by_the_mean, False),
        (centres_advantages, True),
        (counts_classes, True),
    ],
)
def test_losses_that_depend_on_the_batch_without_a_gradient_are_found(loss, depends):
    def losses_of(samples):
        return {"the losses": loss(INPUTS[samples], CLASSES[samples], ADVANTAGES[samples])}

    assert (find_dependence_on_batch(losses_of, 8) is not None) == depends


def test_where_the_model_mixes_samples_the_loss_is_not_blamed():
    def losses_of(samples):
        mixed = normalised(INPUTS[samples])
        return {"the layer's inputs": mixed, "the losses": F.cross_entropy(mixed, CLASSES[samples], reduction="none")}

    assert find_dependence_on_batch(losses_of, 8) is None


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_without_running_statistics_mixes_no_samples_meanwhile(affine):
    layer = nn.BatchNorm1d(6, affine=affine, track_running_stats=False)
    before = layer(INPUTS)
    with normalised_by_running_statistics(layer):
        assert torch.equal(layer(INPUTS)[:2], layer(INPUTS[:2]))
    assert layer.training
    assert layer.running_mean is None
    assert layer.running_var is None
    assert torch.equal(layer(INPUTS), before)
