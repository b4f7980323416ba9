"""InfoBatch and KAKURENBO: what is left, its weights, and what keep bounds."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import MLP, ON, On, fit, make_trainer
from composer import Event
from composer.loggers import InMemoryLogger
from composer.utils import dist
from oracles import weighted_gradient
from torch.utils.data import DataLoader

from composer_gradmatch import Candidates, RandomBackprop, RuleBackprop, number_samples, select_first
from composer_gradmatch.rules.infobatch import InfoBatch
from composer_gradmatch.rules.kakurenbo import Kakurenbo

LOSSES = torch.tensor([0.1, 3.0, 0.2, 0.9, 0.05, 0.4, 5.0, 0.3, 0.0, 0.6])  # Mean 1.055, of which two are above.


def seen(losses=LOSSES):
    return Candidates(len(losses), losses=losses)


def weighted(picks):
    """Pairs of a pick and its weight."""
    return list(zip(picks.indices.tolist(), picks.weights.tolist(), strict=True))


@pytest.mark.parametrize("prune", [0.0, 0.25, 0.5, 0.9])
def test_infobatch_keeps_high_losses_and_a_part_of_the_others(prune):
    torch.manual_seed(0)
    kept = {0.0: 8, 0.25: 6, 0.5: 4, 0.9: 1}[prune]
    for _ in range(20):
        picks = InfoBatch(prune=prune)(seen(), 10)
        counts = dict(weighted(picks))
        assert len(counts) == len(picks.indices) == 2 + kept
        share = (2 + kept) / 10
        assert counts.pop(1) == counts.pop(6) == pytest.approx(share)
        assert list(counts.values()) == pytest.approx([share * 8 / kept] * kept)
        assert picks.metrics == {"fraction_left": share}


@pytest.mark.parametrize("m", [10, 4])
@pytest.mark.parametrize("prune", [0.5, 0.8])
def test_infobatchs_weighted_mean_is_unbiased_also_where_keep_binds(m, prune):
    torch.manual_seed(1)
    gradients = torch.randn(10, 3, dtype=torch.float64) * (1 + LOSSES[:, None])
    rule, draws = InfoBatch(prune=prune), 3000
    steps = torch.empty(draws, 3, dtype=torch.float64)
    sizes = set()
    for i in range(draws):
        drawn = weighted(rule(seen(), m))
        steps[i] = torch.stack([weight * gradients[pick] for pick, weight in drawn]).sum(0) / len(drawn)
        sizes.add(len(drawn))
    assert sizes == {min(m, {0.5: 6, 0.8: 4}[prune])}
    errors = steps.std(0) / math.sqrt(draws)
    assert (errors > 0).all()
    assert ((steps.mean(0) - gradients.mean(0)).abs() < 4.5 * errors).all()


def test_infobatch_draws_each_low_loss_as_often():
    torch.manual_seed(2)
    counts, draws = torch.zeros(10), 4000
    for _ in range(draws):
        counts[InfoBatch()(seen(), 10).indices] += 1
    high = torch.tensor([1, 6])
    assert (counts[high] == draws).all()
    counts[high] = draws / 2
    assert ((counts / draws - 0.5).abs() < 4.5 * 0.5 / math.sqrt(draws)).all()


@pytest.mark.parametrize("losses", [[0.1] * 3, [0.0] * 5, [2.0]])
def test_infobatch_keeps_all_of_equal_losses(losses):
    assert weighted(InfoBatch()(seen(torch.tensor(losses)), len(losses))) == [(i, 1.0) for i in range(len(losses))]


def test_a_step_is_along_infobatchs_weighted_mean():
    """In microbatches, with weights brought into losses of which no gradient was looked at."""
    data = number_samples(MLP.data(20))
    inputs, targets = MLP.data(20).tensors
    model, algorithm = MLP.model(), RuleBackprop("infobatch", **ON, keep=0.9, refresh="1ep")
    before = [p.detach().clone() for p in model.parameters()]
    train = DataLoader(data, 20, sampler=dist.get_sampler(data), collate_fn=data.collate_fn)
    make_trainer(model, train, [algorithm], device_train_microbatch_size=3).fit()
    picks = algorithm.last_selection
    assert picks is not None
    weights = torch.tensor([weight for _, weight in weighted(picks)])
    assert len(weights.unique()) == 2
    expected = weighted_gradient(MLP.model().module, inputs[picks.indices], targets[picks.indices], weights)
    for old, new, gradient in zip(before, model.parameters(), expected, strict=True):
        torch.testing.assert_close(new.detach() - old, (-0.1 * gradient).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("refresh", [None, "1ep"])
@pytest.mark.parametrize(("rule", "left"), [("infobatch", 0.8), ("kakurenbo", 0.95)])
def test_keep_one_is_no_bound(rule, left, refresh):
    """The rule decides alone, as without a Trainer; nothing is trained whole."""
    data = MLP.data(60)
    train = number_samples(data)
    loader = DataLoader(train, 20, sampler=dist.get_sampler(train), collate_fn=train.collate_fn)
    options = {"hide": 0.4, "confidence": None} if rule == "kakurenbo" else {}
    algorithm = RuleBackprop(rule, **ON, keep=1.0, refresh=refresh, options=options)
    sizes, shares = [], []
    note = On(
        Event.BATCH_START,
        lambda state: (
            sizes.append(len(state.batch[0])),
            shares.append(algorithm.last_selection.metrics["fraction_left"]),
        ),
    )
    logger = InMemoryLogger()
    with nullcontext() if refresh else pytest.warns(UserWarning, match=r"less than 2/3 .* is left"):
        trainer = make_trainer(
            MLP.model(), loader, [algorithm, note], algorithm_passes=[select_first], loggers=[logger],
            max_duration="1ep",
        )  # fmt: skip
    trainer.fit()
    assert sizes == [round(20 * share) for share in shares]
    assert len(sizes) == 3
    assert all(0.3 < share < left for share in shares)
    assert [value for _, value in logger.data[f"{rule}/fraction_kept"]] == pytest.approx(shares)
    assert algorithm.batches_trained_whole == 0


def test_keep_one_of_a_rule_with_a_fixed_number_of_picks_selects_nothing():
    algorithm = RuleBackprop("top_loss", **ON, keep=1.0)
    fit([algorithm])
    assert algorithm.last_selection is None


def test_one_that_decides_alone_is_not_to_select_beside_another():
    others = [RuleBackprop("infobatch", **ON, keep=1.0), RandomBackprop(**ON, keep=0.5)]
    with pytest.raises(ValueError, match="would both select"):
        fit(others)


def classified():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(60, 4, generator=generator).double()
    return logits, torch.randint(4, (60,), generator=generator)


@pytest.mark.parametrize("hide", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("confidence", [0.5, 0.7, 0.95])
def test_kakurenbo_moves_back_what_is_mispredicted_or_not_sure(hide, confidence):
    logits, labels = classified()
    losses = F.cross_entropy(logits, labels, reduction="none")
    picks = Kakurenbo(hide=hide, confidence=confidence)(seen(losses), 60)
    # As the paper says it, by predictions, one sample after the other.
    left = []
    for i in range(60):
        probabilities = logits[i].softmax(0)
        rank = sum(float(other) < float(losses[i]) for other in losses)
        sure = int(probabilities.argmax()) == int(labels[i]) and float(probabilities.max()) >= confidence
        if rank >= int(hide * 60) or not sure:
            left.append(i)
    assert picks.indices.tolist() == left
    assert picks.weights is None
    assert picks.metrics == {"fraction_left": len(left) / 60}


def test_kakurenbo_hides_by_rank_alone_where_nothing_is_moved_back():
    assert Kakurenbo(hide=0.5, confidence=None)(seen(), 10).indices.tolist() == [1, 3, 5, 6, 9]
    assert Kakurenbo(hide=0.5, confidence=0.8)(seen(), 10).indices.tolist() == [1, 3, 5, 6, 7, 9]  # 0.3 > −log 0.8.


def test_kakurenbo_draws_among_equal_losses_and_what_keep_allows():
    torch.manual_seed(4)
    equal = {tuple(Kakurenbo(hide=0.5)(seen(torch.zeros(4)), 4).indices.tolist()) for _ in range(80)}
    assert len(equal) == 6
    drawn = [Kakurenbo(hide=0.5, confidence=None)(seen(), 2).indices.tolist() for _ in range(80)]
    assert {len(each) for each in drawn} == {2}
    assert {i for each in drawn for i in each} == {1, 3, 5, 6, 9}


@pytest.mark.parametrize("rule", [InfoBatch(), Kakurenbo()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("m", [0, 11])
def test_more_picks_than_samples_are_refused(rule, m):
    with pytest.raises(ValueError, match="m must be between 1 and the number of samples, 10"):
        rule(seen(), m)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (InfoBatch, {"prune": 1.0}),
        (InfoBatch, {"prune": -0.1}),
        (InfoBatch, {"prune": math.nan}),
        (Kakurenbo, {"hide": 1.0}),
        (Kakurenbo, {"hide": math.nan}),
        (Kakurenbo, {"confidence": 0.4}),
        (Kakurenbo, {"confidence": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(rule, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be in"):
        rule(**options)
