"""GradMatch's two kinds of weights, and what is said of the steps that they make."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import MLP, ON, On, fit, loader, make_trainer
from composer import Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from oracles import brute_force_omp, classifier_gradients, weighted_gradient
from selecting import factory
from torch import nn
from torch.utils.data import TensorDataset

from composer_gradmatch import GradMatch, LossBackprop, select_first, select_using_gradient_matching
from composer_gradmatch.rules.cost import break_even
from composer_gradmatch.rules.table import RULES

M, KEEP, LR = 23, 0.4, 0.1


@pytest.mark.parametrize("reuse_activations", [False, True])
@pytest.mark.parametrize("microbatch_size", [4, M])
def test_matched_weights_make_the_step_of_least_squares(microbatch_size, reuse_activations):
    dataset, model = MLP.data(M), MLP.model()
    inputs, targets = dataset.tensors
    gradients = classifier_gradients(model.module, MLP.layer, inputs, targets)
    picks, weights, _ = brute_force_omp(gradients, gradients.mean(0), int(KEEP * M))
    picks, weights = picks[weights > 0], weights[weights > 0] * (weights > 0).sum()
    assert abs(weights.mean() - 1) > 0.05, "as normalised ones it would show nothing"
    expected = weighted_gradient(model.module, inputs[picks], targets[picks], weights)
    before = [p.detach().clone() for p in model.module.parameters()]
    logger = InMemoryLogger()
    algorithm = GradMatch(**ON, keep=KEEP, weights="matched", reuse_activations=reuse_activations)
    make_trainer(
        model,
        loader(dataset, M),
        [algorithm],
        lr=LR,
        algorithm_passes=[select_first],
        device_train_microbatch_size=microbatch_size,
        loggers=[logger],
    ).fit()
    step = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.module.parameters(), before, strict=True)])
    expected = torch.cat([-LR * each.flatten() for each in expected])
    assert (step - expected).norm() <= 1e-4 * expected.norm()
    mean = gradients.mean(0)
    length = (weights[:, None] * gradients[picks]).mean(0) @ mean / (mean @ mean)
    assert logger.data["gradmatch/step_length"][0][1] == pytest.approx(length, rel=1e-4)


def test_the_function_takes_the_kind_of_weights_too():
    inputs, targets = MLP.data(M).tensors
    module = MLP.model().module
    *_, matched = select_using_gradient_matching(inputs, targets, module, F.cross_entropy, KEEP, weights="matched")
    *_, normalized = select_using_gradient_matching(inputs, targets, module, F.cross_entropy, KEEP)
    np.testing.assert_allclose(matched / matched.mean(), normalized, rtol=1e-5)
    assert abs(float(matched.mean()) - 1) > 0.05


@pytest.mark.parametrize("make", [lambda **kwargs: GradMatch(**kwargs), lambda **kwargs: _by_function(**kwargs)])
def test_another_kind_is_refused(make):
    with pytest.raises(ValueError, match=r"'normalized'.*'matched'.*got 'own'"):
        make(weights="own")


def _by_function(**kwargs):
    return select_using_gradient_matching(*MLP.data(4).tensors, MLP.model().module, F.cross_entropy, **kwargs)


def _few_that_matter():
    """Data of which a few samples carry the gradient."""
    inputs = torch.zeros(120, 12)
    inputs[::20] = 10.0
    targets = torch.zeros(120, dtype=torch.int64)
    return TensorDataset(inputs, targets)


def test_steps_that_are_too_long_are_warned_of_once_with_the_remedy():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weights in ("normalized", "matched"):
            model = MLP.model()
            with torch.no_grad():
                model.module[-1].bias[0] += 8.0  # Sure of all samples but those few.
            fit(
                [GradMatch(**ON, keep=0.05, weights=weights)],
                model,
                _few_that_matter(),
                max_duration="5ep",
                lr=0.0,
                loggers=[logger := InMemoryLogger()],
            )
            lengths = [value for _, value in logger.data["gradmatch/step_length"]]
            long = [each for each in caught if "steps on the picks are too long" in str(each.message)]
            assert len(long) == 1  # Of the normalised ones.
            assert (np.mean(lengths) > 1.5) == (weights == "normalized")
    assert "weights='matched'" in str(long[0].message)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.needs == "gradients"])
def test_what_looks_at_gradients_logs_what_its_steps_are_worth(name):
    logger = InMemoryLogger()
    fit([factory(name)(**ON, keep=0.3)], loggers=[logger], max_duration="1ep")
    for key in ("step_length", "gradient_noise_scale", "relative_error", "break_even_error"):
        assert len(logger.data[f"{name}/{key}"]) == 3
    shares, costs = (logger.data[f"{name}/{key}"] for key in ("fraction_kept", "estimated_cost"))
    for (_, share), (_, cost), (_, found) in zip(shares, costs, logger.data[f"{name}/break_even_error"], strict=True):
        assert found == pytest.approx(break_even(cost, share))


def test_what_looks_at_losses_says_now_and_then_how_long_its_steps_are():
    logger, picked = InMemoryLogger(), []
    algorithm = LossBackprop(**ON, keep=0.3)
    model, data = MLP.model(), MLP.data(60)
    note = On(Event.BATCH_START, lambda state: picked.append((algorithm.last_selection.indices, state.batch)))
    fit([algorithm, note], model, data, loggers=[logger], max_duration="4ep", lr=0.0)
    lengths = logger.data["loss_backprop/step_length"]
    assert [int(at.batch) for at, _ in lengths] == [9]
    gradients = torch.from_numpy(classifier_gradients(model.module, MLP.layer, *data.tensors))
    indices, _ = picked[9]
    mean = gradients[:20].mean(0)
    assert lengths[0][1] == pytest.approx(float(gradients[:20][indices].mean(0) @ mean / (mean @ mean)), rel=1e-4)
    assert "loss_backprop/relative_error" in logger.data


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_without_an_output_layer_to_find_trains_by_its_losses_all_the_same(compiled):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 12) / 4)

        def forward(self, inputs):
            return inputs @ (2 * self.weight.T)  # A weight that is computed is no parameter.

    model = ComposerClassifier(Own(), num_classes=5)
    logger = InMemoryLogger()
    compile_config = {"compile_config": {"backend": "eager"}} if compiled else {}
    fit([LossBackprop(**ON, keep=0.3)], model, loggers=[logger], max_duration="4ep", **compile_config)
    assert "loss_backprop/fraction_kept" in logger.data
    assert "loss_backprop/step_length" not in logger.data
