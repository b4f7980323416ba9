"""How long a step on picks is: told in each tenth look at losses, and where nothing is looked at."""

from __future__ import annotations

import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import BATCHNORM, CONV, IN_PLACE, MLP, NO_BIAS, ON, Autocast, Case, On, fit, make_trainer
from composer import Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from one_pass import single_pass_of
from oracles import classifier_gradients, per_sample_gradients
from selecting import factory
from text_cases import CLASSIFICATION
from torch import nn
from torch.utils.data import DataLoader

from composer_gradmatch import LossBackprop, RandomBackprop, Rule, RuleBackprop, number_samples, select_first
from composer_gradmatch.candidates.gauge import Gauge
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.spot_checks import SpotChecks
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.uniform import uniform
from composer_gradmatch.train.run_summary import RunSummary

BATCH = 20


def run(algorithm, model=None, data=None, *, lr=0.0, others=(), **kwargs):
    """What was logged of twelve steps, their picks, and whether nothing was warned of."""
    logger, picked = InMemoryLogger(), []
    note = On(Event.BATCH_START, lambda state: picked.append(algorithm.last_selection.indices.clone()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([algorithm, note, *others], model, data, BATCH, loggers=[logger], max_duration="4ep", lr=lr, **kwargs)
    name = algorithm.log_name
    found = {key.removeprefix(f"{name}/"): value for key, value in logger.data.items() if key.startswith(f"{name}/")}
    return found, picked, not [each for each in caught if "forward pass" in str(each.message)]


def length_of(gradients, indices):
    mean = gradients.mean(0)
    return float(gradients[indices].mean(0) @ mean / (mean @ mean))


def of_case(case):
    """Per-sample gradients of the tenth minibatch, which is the first of the data."""
    model = case.model()
    return torch.from_numpy(
        classifier_gradients(model.module, case.layer, *(each[:BATCH] for each in case.data(60).tensors))
    )


def _normalised():
    return nn.Sequential(*[each for each in BATCHNORM.module() if not isinstance(each, nn.Dropout)])


NORMALISED = Case("batchnorm", _normalised, "4", (1, 4, 4))


@pytest.mark.parametrize(
    ("case", "microbatch"), [(MLP, BATCH), (NO_BIAS, 2), (CONV, 4), (NORMALISED, BATCH)], ids=lambda each: str(each)[:9]
)
def test_one_pass_says_in_each_tenth_look_how_long_the_step_is(case, microbatch):
    algorithm = LossBackprop(**ON, keep=0.3, reuse_activations=True)
    found, picked, quiet = run(algorithm, case.model(), case.data(60), device_train_microbatch_size=microbatch)
    assert quiet
    assert single_pass_of(algorithm) is not None
    assert [int(at.batch) for at, _ in found["step_length"]] == [9]
    assert found["step_length"][0][1] == pytest.approx(length_of(of_case(case), picked[9]), rel=1e-4)
    assert "relative_error" in found


@pytest.mark.parametrize("name", ["top_loss", "rank_based"])
def test_other_rules_of_losses_say_it_too(name):
    found, picked, _ = run(factory(name)(**ON, keep=0.3, reuse_activations=True))
    assert [int(at.batch) for at, _ in found["step_length"]] == [9]
    assert found["step_length"][0][1] == pytest.approx(length_of(of_case(MLP), picked[9]), rel=1e-4)


def test_outputs_of_a_huggingface_model_that_are_a_mapping():
    model, data = CLASSIFICATION.model(), CLASSIFICATION.data(60)
    found, picked, quiet = run(LossBackprop(**ON, keep=0.3, reuse_activations=True), model, data)
    assert quiet
    batch = {key: value[:BATCH] for key, value in data.batch.items()}
    double = CLASSIFICATION.model().double()
    losses = F.cross_entropy(double(batch)["logits"], batch["labels"], reduction="none")
    layer = double.get_submodule(CLASSIFICATION.layer)
    gradients = per_sample_gradients(lambda i: losses[i], list(layer.parameters()), BATCH)
    assert found["step_length"][0][1] == pytest.approx(length_of(gradients, picked[9]), rel=1e-3)


def test_a_pass_in_bfloat16():
    case = Case("autocast", lambda: Autocast(MLP.module()), "module.2", (12,))
    found, picked, quiet = run(LossBackprop(**ON, keep=0.3, reuse_activations=True), case.model(), case.data(60))
    assert quiet
    assert found["step_length"][0][1] == pytest.approx(length_of(of_case(MLP), picked[9]), rel=0.02)


def test_it_changes_nothing_in_training_and_makes_no_pass(monkeypatch):
    def trained(measures):
        passes = []

        def count(owner, name):
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *args: passes.append(name) or original(*args))

        with monkeypatch.context() as patch:
            if not measures:
                patch.setattr(Gauge, "is_due", lambda self: False)
            # By their own clocks, checks of the pass would come in other steps.
            patch.setattr(SpotChecks, "due", lambda self: False)
            count(CapturedForward, "__call__")
            count(ModelForward, "own")
            count(SelectionPass, "outputs_of")
            model = BATCHNORM.model()
            algorithm = LossBackprop(**ON, keep=0.3, reuse_activations=True)
            found, picked, quiet = run(algorithm, model, BATCHNORM.data(60), lr=0.1)
        assert quiet
        assert ("step_length" in found) == measures
        assert passes.count("__call__") >= 12
        return model.state_dict(), torch.stack(picked), torch.get_rng_state(), passes

    (state, *measured), (other, *plain) = trained(True), trained(False)
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert all(torch.equal(one, another) for one, another in zip(measured[:2], plain[:2], strict=True))
    assert measured[2] == plain[2]


class Temperature(ComposerClassifier):
    """Has a parameter behind its output layer."""

    def __init__(self):
        super().__init__(MLP.module(), num_classes=5)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def loss(self, outputs, batch, *args, **kwargs):
        return F.cross_entropy(outputs / self.temperature, batch[1], *args, **kwargs)


class Adapted(nn.Linear):
    """Takes its inputs times its weight, and something else."""

    def forward(self, input):
        return super().forward(input) * 1.0


def _adapted():
    return ComposerClassifier(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), Adapted(16, 5)), num_classes=5)


@pytest.mark.parametrize("make", [IN_PLACE.model, Temperature, _adapted], ids=["in place", "behind", "own"])
def test_nothing_is_said_where_one_pass_does_not_show_the_output_layer(make):
    found, _, quiet = run(LossBackprop(**ON, keep=0.3, reuse_activations=True), make())
    assert quiet
    assert "fraction_kept" in found
    assert "step_length" not in found


@pytest.mark.parametrize("reuse_activations", [False, True])
def test_nothing_is_said_of_a_compiled_model(reuse_activations):
    algorithm = LossBackprop(**ON, keep=0.3, reuse_activations=reuse_activations)
    found, _, quiet = run(algorithm, compile_config={"backend": "eager"})
    assert quiet
    assert "fraction_kept" in found
    assert "step_length" not in found


@pytest.mark.parametrize("reuse_activations", [False, True])
def test_a_minibatch_whose_losses_alone_are_finite_is_selected_from(reuse_activations):
    data = MLP.data(60)

    def loss_fn(outputs, batch):
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        return losses + (outputs[:, 0] - outputs[:, 0].detach()).clamp(min=0).sqrt()  # Zero, with an infinite slope.

    algorithm = LossBackprop(**ON, keep=0.3, reuse_activations=reuse_activations, loss_fn=loss_fn)
    found, *_ = run(algorithm, data=data)
    assert algorithm.batches_trained_whole == 0
    assert len(found["fraction_kept"]) == 12


def closing_table(algorithm, **kwargs):
    summary = RunSummary()
    trainer = fit([algorithm], loggers=[summary], max_duration="4ep", lr=0.0, **kwargs)
    return summary.table(trainer.state)


@pytest.mark.parametrize("make", [partial(RandomBackprop, keep=0.3), partial(factory("stratified"), keep=0.3)])
def test_the_closing_table_says_what_is_known_of_a_rule_that_looks_at_nothing(make):
    assert re.search(r"mean step length +1 in expectation \(not measured", closing_table(make(**ON)))


def first_ones(candidates, m):
    return torch.arange(m), None


@pytest.mark.parametrize(
    "algorithm",
    [
        RuleBackprop(Rule(first_ones, needs="nothing", weighs=False), **ON, keep=0.3),
        RandomBackprop(**ON, keep=1.0),
        LossBackprop(**ON, keep=0.3),
    ],
    ids=["biased", "selects nothing", "measures"],
)
def test_it_does_not_say_so_of_others(algorithm):
    assert "in expectation" not in closing_table(algorithm)


def test_random_picks_that_a_store_looks_for_are_measured():
    data = number_samples(MLP.data(60))
    algorithm = RandomBackprop(**ON, keep=0.3, refresh="2ep", suspects={"after": "9ep"})
    logger, summary, picked = InMemoryLogger(), RunSummary(), []
    note = On(Event.BATCH_START, lambda state: picked.append(algorithm.last_selection.indices.clone()))
    trainer = make_trainer(
        MLP.model(),
        DataLoader(data, BATCH, sampler=dist.get_sampler(data, shuffle=False), collate_fn=data.collate_fn),
        [algorithm, note],
        loggers=[logger, summary],
        max_duration="4ep",
        lr=0.0,
        algorithm_passes=[select_first],
    )
    trainer.fit()
    lengths = [value for _, value in logger.data["random_backprop/step_length"]]
    assert len(lengths) == 1  # Of each tenth selection, since K is of no other use to random picks.
    assert lengths[0] == pytest.approx(length_of(of_case(MLP), picked[9]), rel=2e-2)
    assert "in expectation" not in summary.table(trainer.state)


def test_a_random_subset_is_as_long_as_the_minibatch_in_expectation():
    gradients, rounds = of_case(MLP), 4000
    torch.manual_seed(0)
    lengths = torch.tensor([length_of(gradients, uniform(Candidates(BATCH), 6).indices) for _ in range(rounds)])
    assert abs(float(lengths.mean()) - 1) < 4 * float(lengths.std()) / rounds**0.5
