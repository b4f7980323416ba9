"""A user's rule in a Trainer: a function is all that it takes."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import BATCHNORM, CONV, MLP, Counting, loader, make_trainer
from composer.loggers import InMemoryLogger

from composer_gradmatch import (
    GradMatch,
    LossBackprop,
    Picks,
    RandomBackprop,
    Rule,
    RuleBackprop,
    WholeBatch,
    gram_omp,
    normalize_weights,
    select_first,
)
from composer_gradmatch.algorithms.factory import algorithm_of
from composer_gradmatch.rules.table import RULES

M = 20
ON = {"start": 0.0, "end": 1.0, "keep": 0.3, "interrupt": 0}
ONE_AND_TWO = pytest.mark.parametrize("reuse", [False, True], ids=["two passes", "one pass"])


def matching(candidates, m):
    indices, weights = gram_omp(candidates.gram, candidates.gram.mean(1), m)
    return indices[weights > 0], normalize_weights(weights[weights > 0])


def halves(candidates, m):
    """Weighs the first m samples, and looks at nothing."""
    return list(range(m)), torch.linspace(0.5, 2.0, m)


def train(algorithm, case=MLP, num=60, max_duration="2ep", **kwargs):
    model, picked = case.model(), []
    select = algorithm.selector.select

    def recorded(*args):
        picked.append(select(*args))
        return picked[-1]

    algorithm.selector.select = recorded
    trainer = make_trainer(
        model,
        loader(case.data(num), M),
        [algorithm],
        max_duration=max_duration,
        seed=1,
        algorithm_passes=[select_first],
        **kwargs,
    )
    trainer.fit()
    trainer.close()
    return model.state_dict(), picked


@ONE_AND_TWO
@pytest.mark.parametrize("case", [MLP, CONV, BATCHNORM], ids=lambda case: case.name)
def test_matching_in_two_lines_is_grad_match_bit_for_bit(case, reuse):
    mine, my_picks = train(RuleBackprop(matching, reuse_activations=reuse, **ON), case)
    theirs, their_picks = train(GradMatch(reuse_activations=reuse, **ON), case)
    for one, other in zip(my_picks, their_picks, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.weights, other.weights)
    for key in theirs:
        assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize("needs", ["nothing", "losses", "gradients"])
@pytest.mark.parametrize("microbatch", [M, 4])
def test_its_weights_reach_the_loss_whatever_it_looks_at(needs, microbatch):
    algorithm = RuleBackprop(Rule(halves, needs=needs), **ON)
    trained, _ = train(algorithm, num=M, max_duration="1ba", device_train_microbatch_size=microbatch, lr=0.5)
    model = MLP.model()
    inputs, targets = (tensor[:6] for tensor in MLP.data(M).tensors)
    losses = F.cross_entropy(model.module(inputs), targets, reduction="none")
    ((losses * torch.linspace(0.5, 2.0, 6)).sum() / 6).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach() - 0.5 * parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", ["nothing", "losses"])
def test_a_loss_that_weights_would_not_fit_is_refused_whatever_it_looks_at(needs):
    model = MLP.model()
    other = torch.nn.MSELoss()

    def loss(outputs, batch, reduction="mean"):
        if reduction == "none":
            return F.cross_entropy(outputs, batch[1], reduction="none")
        return other(outputs, torch.zeros_like(outputs))

    model.loss = loss
    algorithm = RuleBackprop(Rule(halves, needs=needs), **ON)
    with pytest.raises(ValueError, match="do not add up to the model's own loss"):
        make_trainer(model, loader(MLP.data(M), M), [algorithm]).fit()


def test_metrics_go_under_its_name_with_those_of_its_own():
    def loud(candidates, m):
        return Picks(torch.arange(m), torch.tensor([2.0] + [0.5] * (m - 1)), {"surprise": 4.0})

    logger = InMemoryLogger()
    train(RuleBackprop(loud, **ON), num=M, max_duration="1ba", loggers=[logger])
    found = {name.removeprefix("loud/"): values[0][1] for name, values in logger.data.items() if "loud/" in name}
    assert found["surprise"] == 4
    assert found["fraction_kept"] == pytest.approx(0.3)
    assert found["effective_sample_size"] == pytest.approx(4.5**2 / (4 + 5 * 0.25))
    assert found["largest_weight"] == pytest.approx(2 / (4.5 / 6))
    assert found["estimated_cost"] == pytest.approx(1 / 3 + 0.3)


def test_the_whole_batch_is_trained_counted_and_its_reason_told_once():
    def never(candidates, m):
        return WholeBatch("I would rather not.")

    algorithm = RuleBackprop(never, **ON)
    with pytest.warns(UserWarning, match="I would rather not") as caught:
        train(algorithm, max_duration="1ep")
    assert algorithm.batches_trained_whole == 3
    assert sum("rather" in str(each.message) for each in caught) == 1
    assert algorithm.last_selection is None


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (lambda candidates, m: torch.arange(m), "must return Picks or a pair"),
        (lambda candidates, m: ([0, 0], None), "picked a sample twice"),
        (lambda candidates, m: ([M], None), "indices from 20 to 20"),
        (lambda candidates, m: ([0], [float("inf")]), "not finite"),
    ],
)
def test_a_rule_that_returns_nonsense_fails_on_the_first_batch(rule, says, start):
    algorithm = RuleBackprop(Rule(rule, "mine"), start=start, end=1.0, keep=0.3, interrupt=0)
    trainer = make_trainer(MLP.model(), loader(MLP.data(60), M), [algorithm], max_duration="2ep")
    with pytest.raises((TypeError, ValueError), match=f"'mine'.*{says}"):
        trainer.fit()
    assert int(trainer.state.timestamp.batch) == 0


COUNTING = Rule(Counting, needs="nothing", weighs=False)


def test_what_a_rule_remembers_is_not_moved_by_the_rehearsal_and_is_new_in_each_trainer():
    algorithm = RuleBackprop(COUNTING, options={"offset": 5}, **ON)
    _, first = train(algorithm, max_duration="3ba")
    assert [int(picks.indices[0]) for picks in first] == [6, 7, 8]
    _, second = train(algorithm, max_duration="1ba")
    assert int(second[0].indices[0]) == 6


def test_what_a_rule_remembers_is_in_the_checkpoint(tmp_path):
    whole, picks = train(RuleBackprop(COUNTING, **ON), max_duration="5ba")
    saving = {"save_folder": str(tmp_path), "save_interval": "2ba", "save_filename": "ba{batch}.pt"}
    train(RuleBackprop(COUNTING, **ON), max_duration="2ba", run_name="a", **saving)
    resumed, later = train(RuleBackprop(COUNTING, **ON), max_duration="5ba", load_path=str(tmp_path / "ba2.pt"))
    assert [int(each.indices[0]) for each in later] == [int(each.indices[0]) for each in picks[2:]]
    for key in whole:
        assert torch.equal(resumed[key], whole[key]), key


@pytest.mark.parametrize(
    ("rule", "arguments", "says"),
    [
        (COUNTING, {"reuse_activations": True}, "looks at nothing"),
        (COUNTING, {"scale_factor": 0.5}, "looks at nothing"),
        (COUNTING, {"selection_microbatch_size": 4}, "looks at nothing"),
        (COUNTING, {"selection_precision": "amp_bf16"}, "looks at nothing"),
        (COUNTING, {"output_layer": "module.2"}, "looks at nothing"),
        (RULES["loss_backprop"], {"output_layer": "module.2"}, "looks at losses only"),
        ("gradmatsch", {}, "there is no rule 'gradmatsch'; perhaps 'gradmatch'"),
    ],
)
def test_arguments_that_are_of_no_use_to_a_rule_are_refused(rule, arguments, says):
    with pytest.raises(ValueError, match=says):
        RuleBackprop(rule, **arguments)


@pytest.mark.parametrize(
    ("rule", "cls"),
    [("gradmatch", GradMatch), ("loss_backprop", LossBackprop), ("random_backprop", RandomBackprop)],
)
def test_a_rule_by_its_name_trains_as_its_algorithm_does(rule, cls):
    options = {"beta": 1 / 0.3 - 1} if rule == "loss_backprop" else None
    by_name, _ = train(RuleBackprop(rule, options=options, **ON))
    by_class, _ = train(cls(**ON))
    for key in by_class:
        assert torch.equal(by_name[key], by_class[key]), key


def test_a_factory_takes_the_arguments_of_both_and_no_others():
    make = algorithm_of(Rule(Counting, "counting", needs="nothing", weighs=False))
    algorithm = make(keep=0.2, start=3 / 4)
    assert (algorithm.keep, algorithm.start, algorithm.log_name) == (0.2, 0.75, "counting")
    assert "scale_factor" not in inspect.signature(make).parameters
    with pytest.raises(TypeError, match="nonsense"):
        make(nonsense=1)


def test_an_option_that_would_hide_an_argument_is_refused():
    def greedy(candidates, m, *, keep=0.5):
        return torch.arange(m), None

    with pytest.raises(ValueError, match="option 'keep'"):
        algorithm_of(Rule(greedy))
