"""Importance sampling: exact inclusion probabilities, unbiased means, and the decision whether to look."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_gradmatch import Candidates, WholeBatch
from composer_gradmatch.rules.cost_switch import CostSwitch, excess_variance
from composer_gradmatch.rules.importance import ImportanceSampling, inclusion_probabilities, systematic_sample
from composer_gradmatch.rules.step_quality import gradient_noise

scores_of = st.lists(st.floats(0, 1e6), min_size=2, max_size=30)


def heavy_tailed(m=24, seed=0):
    """Candidates with H, P and explicit gradients, some of which are much larger."""
    generator = torch.Generator().manual_seed(seed)
    inputs, grads = (torch.randn(m, width, generator=generator).double() for width in (5, 3))
    grads *= torch.linspace(-2, 2, m).double().exp()[:, None]
    explicit = torch.cat([(grads[:, :, None] * inputs[:, None]).flatten(1), grads], 1)
    return Candidates(m, losses=grads.square().sum(1), inputs=inputs, output_grads=grads), explicit


@settings(max_examples=60, deadline=None)
@given(scores_of, st.data())
def test_inclusion_probabilities_are_capped_multiples_of_the_scores_that_sum_to_m(scores, data):
    scores = torch.tensor(scores).double()
    m = data.draw(st.integers(1, len(scores)))
    q = inclusion_probabilities(scores, m)
    assert ((q >= 0) & (q <= 1)).all()
    if int((scores > 0).sum()) <= m:
        assert torch.equal(q, (scores > 0).double())
        return
    assert float(q.sum()) == pytest.approx(m)
    free = q < 1
    ratios = (q / scores)[free & (scores > 1e-200)]
    assert float(ratios.max() / ratios.min()) == pytest.approx(1)
    # What is capped would else be above one.
    assert (ratios.max() * scores[~free] >= 1 - 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(scores_of, st.data())
def test_a_systematic_sample_has_a_fixed_size_and_no_sample_twice(scores, data):
    scores = torch.tensor(scores).double()
    q = inclusion_probabilities(scores, data.draw(st.integers(1, len(scores))))
    picks = systematic_sample(q)
    assert len(picks) == round(float(q.sum()))
    assert len(picks.unique()) == len(picks)
    assert (q[picks] > 0).all()
    assert torch.isin((q == 1).nonzero().flatten(), picks).all()


def test_samples_are_drawn_as_often_as_their_inclusion_probabilities_say():
    torch.manual_seed(0)
    q = inclusion_probabilities(torch.arange(12.0) ** 2, 5)
    counts = torch.zeros(12).double()
    draws = 20000
    for _ in range(draws):
        counts[systematic_sample(q)] += 1
    errors = (q * (1 - q) / draws).sqrt()
    assert ((counts / draws - q).abs() <= 4.5 * errors + 1e-12).all()


@pytest.mark.parametrize("score", ["gradient_norm", "output_gradient", "loss"])
def test_the_weighted_mean_is_unbiased(score):
    torch.manual_seed(1)
    candidates, gradients = heavy_tailed()
    rule = ImportanceSampling(score=score, switch="always")
    draws = 20000
    total, squares = torch.zeros(2, gradients.shape[1]).double()
    for _ in range(draws):
        picks = rule(candidates, 6)
        step = (picks.weights[:, None] * gradients[picks.indices]).mean(0)
        total, squares = total + step, squares + step**2
    mean = total / draws
    errors = (squares / draws - mean**2).sqrt() / math.sqrt(draws)
    assert ((mean - gradients.mean(0)).abs() <= 4.5 * errors).all()
    assert len(picks.indices) == 6


def test_scores_are_what_they_are_called():
    candidates, gradients = heavy_tailed()
    norms = {
        "gradient_norm": gradients.norm(dim=1),
        "output_gradient": candidates.output_grads.norm(dim=1),
        "loss": candidates.losses.sqrt(),
    }
    for score, expected in norms.items():
        picks = ImportanceSampling(score=score, switch="always")(candidates, 5)
        q = inclusion_probabilities(expected, 5)[picks.indices]
        torch.testing.assert_close(picks.weights, 5 / (24 * q))


def test_positions_of_a_sample_count_together():
    candidates, _ = heavy_tailed(8)
    counts = torch.tensor([3, 1, 4])
    of_positions = Candidates(
        3, inputs=candidates.inputs, output_grads=candidates.output_grads, gram=torch.eye(3).double(), counts=counts
    )
    rule = ImportanceSampling(score="output_gradient", switch="always")
    parts = candidates.output_grads.split(counts.tolist())
    q = inclusion_probabilities(torch.stack([part.norm() for part in parts]), 2)
    picks = rule(of_positions, 2)
    torch.testing.assert_close(picks.weights, 2 / (3 * q[picks.indices]))


@pytest.mark.parametrize(("m", "scores"), [(0, [1.0, 2.0]), (3, [1.0, 2.0]), (1, [1.0, -2.0]), (1, [1.0, math.nan])])
def test_what_cannot_be_drawn_from_is_refused(m, scores):
    with pytest.raises(ValueError, match=r"got|finite numbers"):
        inclusion_probabilities(torch.tensor(scores), m)


@pytest.mark.parametrize("options", [{"score": "norm"}, {"switch": "on"}])
def test_other_options_are_refused(options):
    with pytest.raises(ValueError, match="must be one of"):
        ImportanceSampling(**options)


def test_batches_without_scores_are_trained_whole():
    zero = Candidates(6, losses=torch.zeros(6), gram=torch.zeros(6, 6).double())
    assert "score zero" in str(ImportanceSampling()(zero, 2).warning)
    negative = Candidates(3, losses=torch.tensor([1.0, -1.0, 2.0]), gram=torch.eye(3).double())
    whole = ImportanceSampling(score="loss")(negative, 2)
    assert isinstance(whole, WholeBatch)
    assert "negative losses" in str(whole.warning)


def test_the_predicted_variance_is_that_of_independent_draws():
    _, gradients = heavy_tailed(8)
    gram = gradients @ gradients.T
    q = inclusion_probabilities(gram.diagonal().sqrt(), 3)
    # Poisson sampling: every subset, each sample in it by its own coin.
    mean, variance = gradients.mean(0), 0.0
    for drawn in itertools.product([0.0, 1.0], repeat=8):
        drawn = torch.tensor(drawn).double()
        probability = torch.where(drawn > 0, q, 1 - q).prod()
        step = (torch.where(q > 0, drawn / q, 0.0)[:, None] * gradients).mean(0)
        variance += float(probability * (step - mean).square().sum())
    noise = gradient_noise(gram)[1]
    assert excess_variance(gram.diagonal(), q, noise) == pytest.approx(variance / float(noise / 8))
    assert excess_variance(gram.diagonal(), torch.zeros(8), noise) is None
    assert excess_variance(gram.diagonal(), q, torch.tensor(0.0)) is None


def test_the_switch_goes_by_cost_and_remembers_in_checkpoints():
    switch = CostSwitch("cost")
    assert switch.is_on
    for seen, expected in ((0.4, True), (3.0, False), (0.0, False), (None, False)):
        switch.see(seen)
        switch.decide(switch.findings(), 0.7)
        assert switch.is_on == expected
    other = CostSwitch("cost")
    other.load_state_dict(switch.state_dict())
    for each in (switch, other):
        for _ in range(40):
            each.see(0.1)
            each.decide(each.findings(), 0.7)
    assert switch.is_on
    assert switch.state_dict() == other.state_dict()
    always = CostSwitch("always")
    always.see(9.0)
    always.decide(always.findings(), 0.9)
    assert always.is_on


def test_ranks_decide_by_the_mean_of_what_they_see():
    ranks = [CostSwitch("cost") for _ in range(2)]
    for rank, seen in zip(ranks, (0.2, None), strict=True):
        rank.see(seen)
    findings = tuple(np.sum([rank.findings() for rank in ranks], axis=0))
    for rank in ranks:
        rank.decide(findings, 0.7)
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_a_switch_that_sees_nothing_looks_again():
    switch = CostSwitch("cost")
    switch.see(5.0)
    switch.decide(switch.findings(), 0.7)
    on = []
    for _ in range(45):
        switch.decide(switch.findings(), 0.7)
        on.append(switch.is_on)
        if switch.is_on:
            switch.see(5.0)
    assert [i for i, each in enumerate(on) if each] == [19, 40]


def test_an_off_step_picks_at_random_and_says_so():
    candidates, _ = heavy_tailed()
    rule = ImportanceSampling()
    torch.manual_seed(2)
    assert rule(candidates, 5).metrics["looked"] == 1
    rule.decide((30.0, 1.0), 0.6)
    assert not rule.looks
    picks = rule(Candidates(24), 11)
    assert picks.weights is None
    assert len(picks.indices.unique()) == 11
    assert picks.metrics == {"looked": 0.0, "share_of_steps_on": 0.5, "excess_variance": 30.0}
