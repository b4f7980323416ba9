"""The rules on candidates alone, without a Trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from composer_gradmatch import Candidates, WholeBatch, gram_omp, normalize_weights
from composer_gradmatch.rules.gradient_matching import gradient_matching
from composer_gradmatch.rules.loss_percentiles import LossPercentiles
from composer_gradmatch.rules.uniform import uniform


def candidates(num_samples=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs, grads = (torch.randn(num_samples, width, generator=generator).double() for width in (7, 4))
    return Candidates(num_samples, losses=grads.norm(dim=1), inputs=inputs, output_grads=grads)


@pytest.mark.parametrize("options", [{}, {"solver": "swap"}, {"ridge": 0.5}, {"tolerance": 0.4}], ids=str)
def test_gradient_matching_is_orthogonal_matching_pursuit_on_the_gram_matrix(options):
    seen = candidates()
    picks = gradient_matching(seen, 8, **options)
    indices, weights = gram_omp(seen.gram, seen.gram.mean(1), 8, **options)
    assert torch.equal(picks.indices, indices[weights > 0])
    torch.testing.assert_close(picks.weights, normalize_weights(weights[weights > 0]))
    step = torch.zeros(20).double()
    step[picks.indices] = picks.weights / len(picks.indices)
    error = step - torch.full((20,), 1 / 20).double()
    mean = seen.gram.mean()
    assert float(picks.metrics["matching_residual"]) == pytest.approx(float(error @ seen.gram @ error / mean))


def test_a_minibatch_with_nothing_to_match_is_trained_whole():
    assert gradient_matching(Candidates(5, gram=torch.zeros(5, 5).double()), 2) == WholeBatch()
    whole = gradient_matching(Candidates(5, gram=torch.eye(5).double(), finite=False), 2)
    assert isinstance(whole, WholeBatch)
    assert "not finite" in str(whole.warning)


def test_random_picks_are_a_uniform_sample_without_replacement():
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(4000):
        picks = uniform(Candidates(10), 3)
        assert len(picks.indices.unique()) == 3
        assert picks.weights is None
        counts[picks.indices] += 1
    np.testing.assert_allclose(counts / 4000, 0.3, atol=0.03)


def test_percentiles_of_losses_default_to_the_share_that_is_kept():
    torch.manual_seed(3)
    one = LossPercentiles()(candidates(), 5).indices
    torch.manual_seed(3)
    other = LossPercentiles(beta=20 / 5 - 1)(candidates(), 5).indices
    assert torch.equal(one, other)


def test_a_history_is_remembered_reset_and_restored():
    rule = LossPercentiles(history=30)
    rule(candidates(), 5)
    rule(candidates(seed=1), 5)
    assert torch.equal(rule.recent, torch.cat([candidates().losses, candidates(seed=1).losses])[-30:])
    state = rule.state_dict()
    rule.reset()
    assert len(rule.recent) == 0
    rule.load_state_dict(state)
    assert len(rule.recent) == 30
    assert LossPercentiles().state_dict() == {}
