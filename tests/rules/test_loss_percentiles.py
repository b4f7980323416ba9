"""Sampling in favour of high losses, beside Composer's own and numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import MLP, ON, fit
from composer.algorithms.selective_backprop import select_using_loss

from composer_gradmatch import Candidates, LossBackprop
from composer_gradmatch.rules.loss_percentiles import LossPercentiles, loss_percentiles, select_by_percentile


def test_loss_backprop_picks_what_select_using_loss_picks_for_the_same_draws(monkeypatch):
    inputs, targets = MLP.data(40).tensors
    module = MLP.model().module
    losses = F.cross_entropy(module(inputs), targets, reduction="none").detach()
    percentiles = torch.arange(0.5, 40, dtype=torch.float64) / 40
    torch.manual_seed(5)
    draws = select_by_percentile(percentiles, 12, 1 / 0.3 - 1)

    def choice(n, size, replace, p):
        assert (n, size, replace) == (40, 12, False)
        np.testing.assert_allclose(p, (percentiles ** (1 / 0.3 - 1) / (percentiles ** (1 / 0.3 - 1)).sum()).numpy())
        return draws.numpy()

    monkeypatch.setattr(np.random, "choice", choice)
    theirs, their_targets = select_using_loss(inputs, targets, module, F.cross_entropy, keep=0.3)

    torch.manual_seed(5)
    picks = LossPercentiles(beta=1 / 0.3 - 1)(Candidates(40, losses=losses), 12).indices
    assert torch.equal(inputs[picks], theirs)
    assert torch.equal(targets[picks], their_targets)


def test_draws_follow_numpys_sequential_sampling_without_replacement():
    percentiles = torch.arange(0.5, 6, dtype=torch.float64) / 6
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    p = (percentiles**2 / (percentiles**2).sum()).numpy()
    ours, theirs = np.zeros(6), np.zeros(6)
    for _ in range(4000):
        ours[select_by_percentile(percentiles, 2, 2.0).numpy()] += 1
        theirs[rng.choice(6, 2, replace=False, p=p)] += 1
    np.testing.assert_allclose(ours / 4000, theirs / 4000, atol=0.04)


def test_large_beta_does_not_underflow():
    assert select_by_percentile(torch.arange(0.5, 128) / 128, 100, 10_000.0).unique().numel() == 100


def test_percentiles_of_a_history():
    losses = torch.tensor([3.0, 1.0, 2.0])
    assert loss_percentiles(losses, losses).tolist() == pytest.approx([2.5 / 3, 0.5 / 3, 1.5 / 3])
    history = torch.tensor([0.0, 1.0, 1.0, 4.0])
    assert loss_percentiles(torch.tensor([1.0, 5.0]), history).tolist() == [0.5, 1.0]


def test_a_history_remembers_the_most_recent_losses():
    algorithm = LossBackprop(keep=0.3, history=50, **ON)
    fit([algorithm], max_duration="2ep")
    assert len(algorithm.rule.function.recent) == 50
