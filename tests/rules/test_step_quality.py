"""Step length, error and gradient noise against gradients that are formed explicitly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_gradmatch import Picks
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import break_even, step_cost
from composer_gradmatch.rules.gradient_matching import gradient_matching
from composer_gradmatch.rules.step_quality import StepQuality, gradient_noise, step_error


def gradients(m=12, seed=0, mean=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 30, generator=generator).double() + mean


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 99), st.booleans())
def test_length_and_error_of_a_step_are_those_of_its_gradients(n, seed, weighted):
    g = gradients(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(12, generator=generator)[:n]
    weights = torch.rand(n, generator=generator).double() if weighted else None
    step = (g[indices] * (1 if weights is None else weights[:, None])).mean(0)
    length, error = step_error(g @ g.T, indices, weights)
    assert float(length) == pytest.approx(float(step @ g.mean(0) / g.mean(0).square().sum()))
    assert float(error) == pytest.approx(float((step - g.mean(0)).square().sum()), abs=1e-9)


def test_the_noise_of_gradients_is_estimated_without_bias():
    mean, spread = torch.full((30,), 0.3).double(), torch.linspace(0.5, 2, 30).double()
    found = []
    for seed in range(4000):
        noise = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed)).double()
        g = mean + noise * spread
        found.append(torch.stack(gradient_noise(g @ g.T)))
    found = torch.stack(found)
    true = torch.stack([mean.square().sum(), spread.square().sum()])
    errors = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - true).abs() < 4 * errors).all()


def test_as_many_random_picks_have_a_relative_error_of_one():
    g = gradients(20)
    gram, quality, steps = g @ g.T, StepQuality(), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(4000):
        quality.reset()
        picks = Picks(torch.randperm(20, generator=generator)[:5])
        steps.append(float(quality.see(gram, picks)["relative_error"]))
    errors = torch.tensor(steps)
    assert abs(float(errors.mean()) - 1) < 4 * float(errors.std()) / math.sqrt(len(steps))


def test_averages_go_on_from_a_checkpoint_and_leave_out_what_is_not_finite():
    g = gradients(8)
    gram, picks = g @ g.T, Picks(torch.tensor([0, 3, 5]))
    one, other = StepQuality(), StepQuality()
    first = one.see(gram, picks)
    other.load_state_dict(one.state_dict())
    assert one.see(gram * 2, picks) == other.see(gram * 2, picks)
    poisoned = gram.clone()
    poisoned[2, 2] = math.nan
    one.see(poisoned, picks)
    assert one.state_dict() == other.state_dict()
    assert float(first["gradient_noise_scale"]) == pytest.approx(
        float(gradient_noise(gram)[1] / gradient_noise(gram)[0])
    )
    # Opposite gradients: the mean gradient is zero, and nothing can be said of a scale.
    opposite = torch.cat([g, -g])
    assert math.isnan(StepQuality().see(opposite @ opposite.T, picks)["gradient_noise_scale"])


def test_matched_weights_make_a_step_of_the_right_length_where_normalised_ones_make_a_long_one():
    # A few samples carry the gradient, as late in training.
    g = gradients(40, mean=0.0) * 0.01
    g[:4] = gradients(4, seed=1, mean=2.0)
    gram = g @ g.T
    lengths = {}
    for kind in ("normalized", "matched"):
        picks = gradient_matching(Candidates(40, gram=gram), 4, weights=kind)
        lengths[kind], error = step_error(gram, picks.indices, picks.weights)
        assert float(picks.metrics["matching_residual"]) == pytest.approx(float(error / gram.mean()))
    assert float(lengths["matched"]) == pytest.approx(1, abs=0.02)
    assert float(lengths["normalized"]) > 5


def test_break_even_is_where_random_picks_of_the_same_cost_have_the_same_error():
    for passes, row in {2: (0.15, 0.25, 0.20, 0), 1: (0.17, 0.38, 0.50, 0.58)}.items():
        found = [break_even(step_cost(passes, keep), keep) for keep in (0.1, 0.3, 0.5, 0.7)]
        assert found == pytest.approx(row, abs=0.006)
    assert break_even(0.3, 0.3) == 1  # At no cost but the step's.
    for keep, cost in ((1.0, 1.0), (0.0, 0.5), (0.3, 0.0)):
        with pytest.raises(ValueError, match="0 < keep < 1"):
            break_even(cost, keep)
