"""The calibrated random subset, against penalised least squares on explicit gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from explicit import gradients, having

from composer_gradmatch import WholeBatch
from composer_gradmatch.rules.calibrated import Calibrated

M, m = 12, 5


def by_least_squares(rows, picked, ridge):
    """The weights n·w of the smallest ‖Σwg − ḡ‖² + λΣ(w − d)²/d, as one system of equations in w."""
    d = 1 / len(picked)
    penalty = np.sqrt(ridge * (rows**2).sum(1).mean() * d / d)  # λ/d, of the mean of d·‖g‖².
    system = np.vstack([rows[picked].T, penalty * np.eye(len(picked))])
    target = np.concatenate([rows.mean(0), np.full(len(picked), penalty * d)])
    return len(picked) * np.linalg.lstsq(system, target, rcond=None)[0]


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("width", [3, 40])
def test_weights_are_those_of_penalised_least_squares(ridge, width):
    rows = gradients(M, width)
    for seed in range(3):
        torch.manual_seed(seed)
        picks = Calibrated(ridge=ridge)(having(rows), m)
        assert len(set(picks.indices.tolist())) == m
        np.testing.assert_allclose(picks.weights, by_least_squares(rows, picks.indices.numpy(), ridge), rtol=1e-8)


def test_weights_do_not_depend_on_the_gradients_scale():
    rows = gradients(M)
    for scale in (1e-8, 1e6):
        torch.manual_seed(0)
        one = Calibrated()(having(rows), m)
        torch.manual_seed(0)
        other = Calibrated()(having(scale * rows), m)
        torch.testing.assert_close(other.weights, one.weights)


def error(rows, picks):
    return np.linalg.norm(picks.weights.numpy() @ rows[picks.indices] / len(picks.indices) - rows.mean(0))


def test_a_small_ridge_meets_the_mean_gradient_and_a_large_one_leaves_a_plain_mean():
    rows = gradients(M, 3)  # Which five picks span.
    assert error(rows, Calibrated(ridge=1e-9)(having(rows), m)) < 1e-7
    picks = Calibrated(ridge=1e9)(having(rows), m)
    assert picks.weights.tolist() == pytest.approx([1.0] * m)


def test_all_samples_are_a_plain_mean():
    picks = Calibrated(ridge=0.01)(having(gradients(M)), M)
    assert picks.weights.tolist() == pytest.approx([1.0] * M)


def test_it_errs_less_than_a_plain_mean_and_its_bias_falls_with_the_number_of_picks():
    rows = gradients(60, 4)
    torch.manual_seed(0)
    seen, bias, variance = having(rows), [], []
    for number in (6, 30):
        estimates = []
        for _ in range(600):
            picks = Calibrated()(seen, number)
            estimates.append(picks.weights.numpy() @ rows[picks.indices] / number)
        bias.append(np.linalg.norm(np.mean(estimates, 0) - rows.mean(0)))
        variance.append(np.var(estimates, 0).sum())
        plain = rows.var(0, ddof=1).sum() * (1 / number - 1 / 60)
        assert variance[-1] + bias[-1] ** 2 < 0.5 * plain
    assert bias[1] < 0.3 * bias[0]


def test_duplicates_share_what_one_of_them_would_get():
    rows = np.repeat(gradients(4, 3), 3, 0)
    picks = Calibrated()(having(rows), 8)
    for row in range(4):
        of_row = picks.weights[picks.indices // 3 == row]
        torch.testing.assert_close(of_row, of_row[:1].expand(len(of_row)))


def test_gradients_of_zero_and_bad_values():
    assert Calibrated()(having(np.zeros((4, 2))), 2) == WholeBatch()
    with pytest.raises(ValueError, match="m must be between 1 and the number of samples, 4; got 5"):
        Calibrated()(having(gradients(4)), 5)
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge must be a positive number"):
            Calibrated(ridge=ridge)
