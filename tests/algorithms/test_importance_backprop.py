"""Importance sampling in a Trainer: its steps, those that do not look, and what these see of themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import IN_PLACE, MLP, ON, Autocast, On, fit, loader, make_trainer
from composer import Event, Trainer
from composer.algorithms import SAM
from composer.loggers import InMemoryLogger
from oracles import classifier_gradients, weighted_gradient

from composer_gradmatch import ImportanceBackprop, select_first
from composer_gradmatch.rules.cost_switch import CostSwitch, excess_variance
from composer_gradmatch.rules.importance import inclusion_probabilities
from composer_gradmatch.rules.step_quality import gradient_noise

M, LR = 24, 0.1


def changes(model, train, algorithms, **kwargs):
    before = torch.cat([p.detach().flatten().clone() for p in model.module.parameters()])
    make_trainer(model, train, algorithms, lr=LR, algorithm_passes=[select_first], **kwargs).fit()
    return torch.cat([p.detach().flatten() for p in model.module.parameters()]) - before


@pytest.mark.parametrize("reuse_activations", [False, True])
@pytest.mark.parametrize("microbatch_size", [3, M])
@pytest.mark.parametrize("score", ["gradient_norm", "output_gradient", "loss"])
def test_a_step_is_the_unbiased_one_of_the_reference(score, microbatch_size, reuse_activations):
    dataset, model = MLP.data(M), MLP.model()
    inputs, targets = dataset.tensors
    module = MLP.model().module
    gradients = torch.from_numpy(classifier_gradients(module, MLP.layer, inputs, targets))
    losses = F.cross_entropy(module(inputs), targets, reduction="none")
    output_grads = module(inputs).softmax(1) - F.one_hot(targets, 5)
    scores = {
        "gradient_norm": gradients.norm(dim=1),
        "output_gradient": output_grads.norm(dim=1),
        "loss": losses.sqrt(),
    }
    q = inclusion_probabilities(scores[score].detach(), 7)
    algorithm = ImportanceBackprop(**ON, keep=0.3, score=score, reuse_activations=reuse_activations)
    step = changes(model, loader(dataset, M), [algorithm], device_train_microbatch_size=microbatch_size)
    picks = algorithm.last_selection
    assert len(picks.indices) == 7
    torch.testing.assert_close(picks.weights.double(), 7 / (M * q[picks.indices]), rtol=1e-4, atol=0)
    right = weighted_gradient(module, inputs[picks.indices], targets[picks.indices], 7 / (M * q[picks.indices]))
    right = torch.cat([-LR * each.flatten() for each in right])
    assert (step - right).norm() <= 1e-4 * right.norm()


def test_a_step_in_low_precision_with_a_gradient_scaler(monkeypatch):
    dataset, model, module = MLP.data(M), MLP.model(), MLP.model().module
    model.module = Autocast(model.module)
    monkeypatch.setattr(Trainer, "_use_grad_scaling", lambda self, precision, scaler: True)
    monkeypatch.setattr(Trainer, "_use_closures", lambda self: False)
    algorithm = ImportanceBackprop(**ON, keep=0.3)
    set_scaler = On(Event.FIT_START, lambda s: setattr(s, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**12)))
    step = changes(model, loader(dataset, M), [algorithm, set_scaler], device_train_microbatch_size=4)
    indices, weights = algorithm.last_selection.indices, algorithm.last_selection.weights
    right = weighted_gradient(module, *(each[indices] for each in dataset.tensors), weights)
    right = torch.cat([-LR * each.flatten() for each in right])
    assert (step - right).norm() <= 0.03 * right.norm()


def never_on(monkeypatch):
    """A switch that has seen that looking does not pay."""
    reset = CostSwitch.reset

    def switched_off(self):
        reset(self)
        self.is_on, self._excess = False, 50.0

    monkeypatch.setattr(CostSwitch, "reset", switched_off)


@pytest.mark.parametrize("reuse_activations", [False, True])
def test_a_step_that_does_not_look_trains_a_random_part_of_the_same_cost(reuse_activations, monkeypatch):
    never_on(monkeypatch)
    dataset, model, module = MLP.data(M), MLP.model(), MLP.model().module
    algorithm = ImportanceBackprop(**ON, keep=0.3, reuse_activations=reuse_activations)
    logger, calls = InMemoryLogger(), []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    step = changes(model, loader(dataset, M), [algorithm], loggers=[logger], device_train_microbatch_size=5)
    cost = 1 / 3 + 0.3 if not reuse_activations else 1 / 3 + 2 / 3 * 0.3
    picks = algorithm.last_selection
    assert len(picks.indices) == int(cost * M)
    assert picks.weights is None
    right = weighted_gradient(
        module, *(each[picks.indices] for each in dataset.tensors), torch.ones(len(picks.indices))
    )
    right = torch.cat([-LR * each.flatten() for each in right])
    assert (step - right).norm() <= 1e-4 * right.norm()
    name = "importance_backprop"
    assert logger.data[f"{name}/estimated_cost"][0][1] == pytest.approx(len(picks.indices) / M)
    assert logger.data[f"{name}/looked"][0][1] == 0
    assert f"{name}/step_length" not in logger.data


@pytest.mark.parametrize("case", [MLP, IN_PLACE], ids=lambda case: case.name)
@pytest.mark.parametrize("score", ["gradient_norm", "loss"])
@pytest.mark.parametrize("sam", [False, True])
def test_it_decides_by_what_its_own_training_step_shows(case, score, sam, monkeypatch):
    never_on(monkeypatch)
    dataset, model, module = case.data(M), case.model(), case.model().module
    algorithm = ImportanceBackprop(**ON, keep=0.25, score=score)
    found = []
    monkeypatch.setattr(CostSwitch, "see", lambda self, excess: found.append(excess))
    others = [SAM(interval=1)] if sam else []
    changes(model, loader(dataset, M), [algorithm, *others], device_train_microbatch_size=4)
    picks = algorithm.last_selection.indices
    inputs, targets = (each[picks] for each in dataset.tensors)
    gradients = torch.from_numpy(classifier_gradients(module, case.layer, inputs, targets))
    gram = gradients @ gradients.T
    losses = F.cross_entropy(module(inputs), targets, reduction="none").detach()
    scores = gram.diagonal().sqrt() if score == "gradient_norm" else losses.double().sqrt()
    q = inclusion_probabilities(scores, round(0.25 * len(picks)))
    assert found == [pytest.approx(excess_variance(gram.diagonal(), q, gradient_noise(gram)[1]), rel=1e-3)]


def test_where_no_look_can_pay_it_says_that_all_will_be_trained_whole():
    algorithm, sizes = ImportanceBackprop(**ON, keep=0.7), []
    note = On(Event.BATCH_START, lambda state: sizes.append(len(state.batch[0])))
    with pytest.warns(UserWarning, match=r"keep=0.7 .*1\.03.*trained whole.*refresh"):
        fit([algorithm, note], max_duration="1ep")
    assert sizes == [14, 20, 20]


def test_so_it_does_where_two_passes_are_made_instead_of_one(monkeypatch):
    algorithm = ImportanceBackprop(**ON, keep=0.7, reuse_activations=True)
    monkeypatch.setattr(type(algorithm.selector.source.source), "passes", 2)
    with pytest.warns(UserWarning, match="trained whole"):
        fit([algorithm], max_duration="2ba")


def test_a_layer_that_hooks_do_not_see_shows_nothing_and_is_looked_at_again(monkeypatch):
    never_on(monkeypatch)
    model = MLP.model()
    algorithm = ImportanceBackprop(**ON, keep=0.25)
    logger = InMemoryLogger()
    monkeypatch.setattr("composer_gradmatch.candidates.training_step._Microbatch.see_forward", lambda *_: None)
    fit([algorithm], model, MLP.data(600), max_duration="1ep", loggers=[logger])
    looked = [value for _, value in logger.data["importance_backprop/looked"]]
    assert looked == [0] * 20 + [1] + [0] * 9


def test_a_batch_of_which_all_scores_are_zero_is_trained_whole_and_counted():
    dataset, model = MLP.data(40), MLP.model()
    with torch.no_grad():
        model.module[-1].weight.zero_()
        model.module[-1].bias.copy_(torch.tensor([0.0, 200, 0, 0, 0]))
    dataset.tensors[1].fill_(1)
    algorithm = ImportanceBackprop(**ON, keep=0.3)
    with pytest.warns(UserWarning, match="score zero only"):
        fit([algorithm], model, dataset, max_duration="1ep")
    assert algorithm.batches_trained_whole == 2


def test_losses_alone_are_looked_at_where_nothing_else_is_asked_for():
    algorithm = ImportanceBackprop(**ON, keep=0.3, score="loss", switch="always")
    assert algorithm.rule.needs == "losses"
    with pytest.raises(ValueError, match="looks at losses only"):
        ImportanceBackprop(score="loss", switch="always", output_layer="2")
