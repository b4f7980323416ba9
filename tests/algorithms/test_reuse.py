"""Steps of one forward pass through a real Trainer, against steps of two, and references that share no code."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BATCHNORM,
    CONV,
    MLP,
    NO_BIAS,
    REORDERED,
    Autocast,
    loader,
    make_trainer,
    record_selections,
)
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from one_pass import KEEP, LR, M, always, assert_same_parameters, trained
from oracles import weighted_gradient
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop, select_first


@pytest.mark.parametrize("microbatch_size", [2, M])
@pytest.mark.parametrize("case", [MLP, NO_BIAS, CONV, REORDERED], ids=lambda case: case.name)
def test_a_step_is_the_weighted_mean_gradient_of_the_picks(case, microbatch_size, served):
    dataset, model = case.data(M), case.model()
    algorithm = always()
    seen = record_selections(algorithm)
    trained(model, loader(dataset, M), [algorithm], device_train_microbatch_size=microbatch_size)
    ((_, selection),) = seen
    picks = selection.indices
    assert sum(served) == len(picks), "every pick is served, and nothing else is"
    assert selection.weights.std() > 0.01
    inputs, targets = dataset.tensors
    module = case.model().module
    gradients = weighted_gradient(module, inputs[picks], targets[picks], selection.weights)
    steps = [p.detach() - b.detach() for p, b in zip(model.module.parameters(), module.parameters(), strict=True)]
    flat = torch.cat([s.flatten().double() for s in steps])
    expected = torch.cat([-LR * g.flatten() for g in gradients])
    assert (flat - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("algorithm", [GradMatch, LossBackprop])
def test_training_is_that_of_two_passes(algorithm, served):
    """Some epochs, with a smaller last minibatch, of a model without random numbers."""
    models, logs = [], []
    for reuse in (False, True):
        log = InMemoryLogger()
        model = CONV.model()
        train = loader(CONV.data(40), 16)
        torch.manual_seed(3)
        trained(model, train, [always(algorithm, reuse=reuse)], max_duration="3ep", loggers=[log], seed=3)
        models.append(model)
        logs.append(log)
    assert served == [6, 6, 3] * 3
    if algorithm is GradMatch:
        assert_same_parameters(*models)
        for key in ("gradmatch/matching_residual", "loss/train/total", "metrics/train/MulticlassAccuracy"):
            values = [[float(value) for _, value in log.data[key]] for log in logs]
            assert values[0] == pytest.approx(values[1], rel=1e-3)
        costs = [float(log.data["gradmatch/estimated_cost"][0][1]) for log in logs]
        assert costs == pytest.approx([1 / 3 + 6 / 16, 1 / 3 + 2 / 3 * 6 / 16])


def test_running_statistics_are_updated_once_a_step_by_all_samples(served):
    dataset, model = BATCHNORM.data(M), BATCHNORM.model()
    expected = BATCHNORM.model().module
    trained(model, loader(dataset, M), [always()], device_train_microbatch_size=4)
    assert served == [4, 4, 2]  # Of nine picks one would be left, which batch normalisation takes another one with.
    expected(dataset.tensors[0])
    for found, other in zip(model.module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("scaled", [False, True])
def test_low_precision_and_a_gradient_scaler(scaled, monkeypatch, served):
    models = []
    for reuse in (False, True):
        model = MLP.model()
        model.module = Autocast(model.module)
        with monkeypatch.context() as patched:
            if scaled:
                patched.setattr(Trainer, "_use_grad_scaling", lambda self, precision, scaler: True)
                patched.setattr(Trainer, "_use_closures", lambda self: False)
            trainer = make_trainer(
                model,
                loader(MLP.data(M), M),
                [always(reuse=reuse)],
                lr=LR,
                algorithm_passes=[select_first],
                device_train_microbatch_size=4,
            )
            if scaled:
                trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            trainer.fit()
        models.append(model)
    assert sum(served) == int(KEEP * M)
    assert_same_parameters(*models, tolerance=2e-3)


def test_a_loss_that_runs_the_model_again(served):
    class Consistent(ComposerClassifier):
        def loss(self, outputs, batch, *args, **kwargs):
            again = self(batch).square().mean(1)
            each = kwargs.get("reduction") == "none"
            return super().loss(outputs, batch, *args, **kwargs) + (again if each else again.mean())

    models = []
    for reuse in (False, True):
        model = CONV.model()
        model.__class__ = Consistent
        torch.manual_seed(0)
        algorithm = always(LossBackprop, reuse=reuse)
        trained(model, loader(CONV.data(M), M), [algorithm], device_train_microbatch_size=5, seed=3)
        models.append(model)
    assert served == [5, 5, 4, 4]
    assert_same_parameters(*models)


def test_a_model_that_returns_a_tensor_twice(served):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, inputs):
            outputs = self.head(self.body(inputs).relu())
            return {"logits": outputs, "again": outputs}

    class Both(ComposerClassifier):
        def loss(self, outputs, batch, *args, **kwargs):
            return super().loss((outputs["logits"] + outputs["again"]) / 2, batch, *args, **kwargs)

        def update_metric(self, batch, outputs, metric):
            metric.update(outputs["logits"], batch[1])

    models = []
    for reuse in (False, True):
        torch.manual_seed(0)
        model = Both(Twice(), num_classes=5)
        trained(model, loader(MLP.data(M), M), [always(reuse=reuse)])
        models.append(model)
    assert served == [9]
    assert_same_parameters(*models)
