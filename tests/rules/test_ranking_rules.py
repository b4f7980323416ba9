"""Rules that rank samples by a score: largest losses, EL2N, GraNd, and Loshchilov and Hutter's draws."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import MLP, NO_BIAS
from oracles import classifier_gradients

from composer_gradmatch import Candidates, WholeBatch
from composer_gradmatch.rules.el2n import el2n
from composer_gradmatch.rules.grand import grand
from composer_gradmatch.rules.rank_based import RankBased
from composer_gradmatch.rules.top_loss import top_loss

M = 12


def seen_of(case, seed=0):
    """Candidates of a small classifier, its outputs, and its data."""
    inputs, targets = case.data(M, seed).tensors
    module = case.model().module.double()
    layer = module.get_submodule(case.layer)
    held = []
    handle = layer.register_forward_hook(lambda module, args, output: held.append(args[0].detach()))
    outputs = module(inputs.double())
    handle.remove()
    losses = F.cross_entropy(outputs, targets, reduction="none")
    (grads,) = torch.autograd.grad(losses.sum(), outputs)
    seen = Candidates(
        M, losses=losses.detach(), inputs=held[0], output_grads=grads, labels=targets, bias=layer.bias is not None
    )
    return seen, outputs.detach(), inputs, targets


def test_top_loss_picks_the_largest_losses():
    seen, outputs, _, targets = seen_of(MLP)
    losses = [-float(torch.log_softmax(row, 0)[target]) for row, target in zip(outputs, targets, strict=True)]
    assert top_loss(seen, 5).indices.tolist() == sorted(range(M), key=lambda i: -losses[i])[:5]
    assert top_loss(seen, 5).weights is None


def test_el2n_is_the_norm_of_the_error_vector():
    seen, outputs, _, targets = seen_of(MLP)
    errors = [
        np.linalg.norm(np.exp(row - row.max()) / np.exp(row - row.max()).sum() - np.eye(5)[target])
        for row, target in zip(outputs.numpy(), targets.tolist(), strict=True)
    ]
    assert el2n(seen, 5).indices.tolist() == sorted(range(M), key=lambda i: -errors[i])[:5]


def test_el2n_of_positions_is_over_those_of_the_sample():
    counts = torch.tensor([2, 0, 3, 1])
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [6.0, 0.0]])
    seen = Candidates(4, output_grads=rows, counts=counts)
    assert el2n(seen, 4).indices.tolist() == [3, 0, 2, 1]  # Of norms 6, 5, √6 and 0.


@pytest.mark.parametrize("case", [MLP, NO_BIAS], ids=lambda case: case.name)
def test_grand_is_the_norm_of_the_last_layers_gradient(case):
    seen, _, inputs, targets = seen_of(case)
    norms = np.linalg.norm(classifier_gradients(case.model().module, case.layer, inputs, targets), axis=1)
    assert grand(seen, 5).indices.tolist() == np.argsort(-norms)[:5].tolist()


def given(rule, scores):
    """Candidates that have these scores, by any of the rules."""
    scores = torch.as_tensor(scores).double()
    return rule, Candidates(len(scores), losses=scores, output_grads=scores[:, None], gram=scores.square().diag())


@pytest.mark.parametrize("rule", [top_loss, el2n, grand], ids=lambda rule: rule.__name__)
def test_scores_of_zero_pick_nothing_and_equal_ones_are_drawn(rule):
    rule, zero = given(rule, [0.0] * 4)
    assert rule(zero, 2) == WholeBatch()
    rule, equal = given(rule, [1.0, 3.0, 1.0, 1.0])
    torch.manual_seed(0)
    drawn = [rule(equal, 2).indices.tolist() for _ in range(50)]
    assert {first for first, _ in drawn} == {1}
    assert {second for _, second in drawn} == {0, 2, 3}
    rule, all_equal = given(rule, [2.0] * 5)
    assert len(set(rule(all_equal, 3).indices.tolist())) == 3


@pytest.mark.parametrize("rule", [top_loss, el2n, grand, RankBased()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("m", [0, 5])
def test_more_picks_than_samples_are_refused(rule, m):
    rule, seen = given(rule, [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match=f"m must be between 1 and the number of samples, 4; got {m}"):
        rule(seen, m)
    assert sorted(rule(seen, 4).indices.tolist()) == [0, 1, 2, 3]


def sequential(probabilities, m):
    """The probability of each set of draws, one after the other without replacement, by enumeration."""
    exact = dict.fromkeys(combinations(range(len(probabilities)), m), 0.0)
    for order in permutations(range(len(probabilities)), m):
        left, probability = 1.0, 1.0
        for i in order:
            probability *= probabilities[i] / left
            left -= probabilities[i]
        exact[tuple(sorted(order))] += probability
    return exact


@pytest.mark.parametrize("pressure", [1.0, 20.0])
def test_rank_based_draws_follow_the_papers_probabilities(pressure):
    losses = torch.tensor([0.3, 2.0, 0.1, 1.0])  # Of ranks 3, 1, 4 and 2.
    weights = np.array([1 / np.exp(np.log(pressure) / 4) ** rank for rank in (3, 1, 4, 2)])
    exact = sequential(weights / weights.sum(), 2)
    torch.manual_seed(0)
    rule, counts, draws = RankBased(pressure=pressure), dict.fromkeys(exact, 0), 3000
    for _ in range(draws):
        picks = rule(Candidates(4, losses=losses), 2)
        assert picks.weights is None
        counts[tuple(sorted(picks.indices.tolist()))] += 1
    for subset, probability in exact.items():
        error = (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[subset] / draws - probability) < 4 * error, subset


def test_rank_based_takes_any_pressure_and_equal_losses():
    assert RankBased(pressure=1e300)(Candidates(4, losses=torch.arange(4.0)), 2).indices.tolist() == [3, 2]
    torch.manual_seed(0)
    seen, rule = Candidates(3, losses=torch.ones(3)), RankBased(pressure=1e300)
    assert {int(rule(seen, 1).indices) for _ in range(50)} == {0, 1, 2}


@pytest.mark.parametrize("pressure", [0.5, float("inf"), float("nan"), -2.0])
def test_a_pressure_out_of_range_is_refused(pressure):
    with pytest.raises(ValueError, match="pressure must be a number >= 1"):
        RankBased(pressure=pressure)
