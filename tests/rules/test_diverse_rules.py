"""DivBS and the k-DPP, against explicit gradients and the probabilities of all sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from explicit import gradients, having

from composer_gradmatch import WholeBatch
from composer_gradmatch.rules.divbs import divbs
from composer_gradmatch.rules.k_dpp import k_dpp, log_elementary_polynomials, sample_k_dpp


@pytest.mark.parametrize(("width", "m"), [(6, 5), (30, 9), (3, 3)])
def test_divbs_draws_by_products_with_what_picks_leave_of_the_mean(width, m, monkeypatch):
    """Every draw's probabilities are those of a plain loop over explicit gradients that are made orthogonal."""
    rows = gradients(10, width, seed=width)
    drawn, multinomial = [], torch.multinomial

    def recorded(chances, number):
        drawn.append(chances.numpy())
        return multinomial(chances, number)

    monkeypatch.setattr(torch, "multinomial", recorded)
    torch.manual_seed(0)
    picks = divbs(having(rows), m)
    assert picks.weights is None
    assert len(set(picks.indices.tolist())) == m
    residual, basis = rows.mean(0), []
    for chances, pick in zip(drawn, picks.indices.tolist(), strict=True):
        np.testing.assert_allclose(chances, np.abs(rows @ residual), rtol=1e-7, atol=1e-10)
        part = rows[pick] - sum((rows[pick] @ q) * q for q in basis)
        basis.append(part / np.linalg.norm(part))
        residual = residual - (residual @ basis[-1]) * basis[-1]


def test_divbs_fills_up_at_random_where_nothing_is_left_to_span():
    rows = gradients(12, 3)
    torch.manual_seed(0)
    drawn = [divbs(having(rows), 7).indices for _ in range(300)]
    assert all(len(picks.unique()) == 7 for picks in drawn)
    counts = torch.zeros(12)
    for picks in drawn:
        counts[picks[3:]] += 1  # Three picks span all.
    assert float(counts.min()) > 0


def test_divbs_takes_what_a_mean_gradient_of_zero_is_made_of_whole():
    assert divbs(having(np.zeros((4, 2))), 2) == WholeBatch()
    rows = gradients(5, 7)
    assert divbs(having(np.vstack([rows, -rows])), 4) == WholeBatch()
    with pytest.raises(ValueError, match="m must be between 1 and the number of samples, 5; got 6"):
        divbs(having(rows), 6)


def test_divbs_draws_no_duplicate_while_something_else_is_left():
    rows = np.repeat(gradients(4, 6), 3, 0)
    torch.manual_seed(0)
    for _ in range(30):
        picks = divbs(having(rows), 6).indices
        assert set((picks[:4] // 3).tolist()) == {0, 1, 2, 3}


def test_elementary_polynomials_are_sums_over_all_sets():
    values = torch.tensor([0.5, 2.0, 1e-3, 7.0, 0.1]).double()
    table = log_elementary_polynomials(values.log(), 3).exp()
    for n in range(6):
        for degree in range(4):
            exact = sum(np.prod(each) for each in combinations(values[:n].tolist(), degree))
            assert float(table[n, degree]) == pytest.approx(float(exact))


def test_polynomials_of_values_of_any_size_stay_in_range():
    log_values = torch.linspace(-40, 60, 400).double()
    table = log_elementary_polynomials(log_values, 200)
    assert bool(table[-1].isfinite().all())
    assert float(table[-1, 1]) == pytest.approx(float(log_values.logsumexp(0)))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_k_dpp_draws_each_set_by_the_volume_of_its_gradients(k):
    """Of all sets, within their standard errors, and by the chi-square of all together."""
    rows = gradients(6, 8, seed=k)
    gram = torch.from_numpy(rows @ rows.T)
    sets = list(combinations(range(6), k))
    volumes = np.array([float(torch.linalg.det(gram[list(each)][:, list(each)])) for each in sets])
    exact = volumes / volumes.sum()
    torch.manual_seed(0)
    counts, draws = dict.fromkeys(sets, 0), 2500
    for _ in range(draws):
        counts[tuple(sorted(sample_k_dpp(gram, k).tolist()))] += 1
    found = np.array([counts[each] for each in sets])
    errors = np.sqrt(draws * exact * (1 - exact))
    assert np.abs((found - draws * exact) / errors).max() < 4
    chi_square = ((found - draws * exact) ** 2 / (draws * exact)).sum()
    assert chi_square < len(sets) - 1 + 4 * np.sqrt(2 * (len(sets) - 1))


def test_the_k_dpp_of_a_rank_below_m_is_filled_up_at_random():
    rows = gradients(10, 3)
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(200):
        picks = k_dpp(having(rows), 6).indices
        assert len(picks.unique()) == 6
        counts[picks[3:]] += 1
    assert float(counts.min()) > 0
    assert len(sample_k_dpp(torch.from_numpy(rows @ rows.T), 6)) == 3


def test_the_k_dpp_never_draws_two_of_a_kind_within_the_rank():
    rows = np.repeat(gradients(5, 8), 2, 0)
    torch.manual_seed(0)
    for _ in range(30):
        assert len({int(i) // 2 for i in k_dpp(having(rows), 5).indices}) == 5


@pytest.mark.parametrize("scale", [1e-160, 1e-6, 1e8])
def test_the_k_dpp_does_not_depend_on_the_gradients_scale(scale):
    rows = gradients(40, 60)
    torch.manual_seed(3)
    one = k_dpp(having(rows), 20).indices
    torch.manual_seed(3)
    other = k_dpp(having(scale * rows), 20).indices
    assert len(set(other.tolist())) == 20
    if scale > 1e-100:
        assert one.tolist() == other.tolist()


def test_the_k_dpp_of_gradients_of_zero_and_of_all_samples():
    assert k_dpp(having(np.zeros((4, 2))), 2) == WholeBatch()
    assert sorted(k_dpp(having(gradients(7, 9)), 7).indices.tolist()) == list(range(7))
    with pytest.raises(ValueError, match="m must be between 1 and the number of samples, 5; got 6"):
        k_dpp(having(gradients(5)), 6)
