"""Values, models and batches that cannot be worked with: a clear error, as early as it can be known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import MLP, ON, fit, make_trainer
from composer import Event
from composer.models import ComposerClassifier, ComposerModel
from selecting import SELECTING
from torch import nn
from torch.utils.data import DataLoader

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop


class OpaqueLoss(ComposerClassifier):
    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])


class ScalarLoss(ComposerClassifier):
    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, batch[1])


class OtherLoss(ComposerClassifier):
    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, batch[1], reduction=reduction) + (
            outputs.square().mean() if reduction == "mean" else 0
        )


@pytest.mark.parametrize("algorithm_class", SELECTING)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\]"),
        ({"keep": 1.1}, "keep must be in"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"start": -0.1}, "start < end"),
        ({"interrupt": -1}, "interrupt must be"),
    ],
)
def test_bad_values_are_refused_at_construction(algorithm_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        algorithm_class(**arguments)


@pytest.mark.parametrize("scale_factor", [0.0, 1.5])
def test_a_bad_scale_factor_is_refused_at_construction(scale_factor):
    with pytest.raises(ValueError, match="scale_factor must be in"):
        GradMatch(scale_factor=scale_factor)


@pytest.mark.parametrize(
    ("model", "algorithm", "error", "message"),
    [
        (OpaqueLoss(MLP.module(), num_classes=5), GradMatch(), TypeError, "no keyword argument 'reduction'.*loss_fn"),
        (
            OpaqueLoss(MLP.module(), num_classes=5),
            LossBackprop(),
            TypeError,
            "no keyword argument 'reduction'.*loss_fn",
        ),
        (
            ScalarLoss(MLP.module(), num_classes=5),
            GradMatch(),
            ValueError,
            "one loss for each of the 20 samples.*loss_fn",
        ),
        (OtherLoss(MLP.module(), num_classes=5), GradMatch(), ValueError, "do not add up to the model's own loss"),
        (MLP.model(), GradMatch(loss_fn=lambda o, b: o.mean()), ValueError, r"loss_fn must return.*\(20,\)"),
        (MLP.model(), GradMatch(output_layer="fc"), ValueError, "not a module.*module.0, module.2"),
        (MLP.model(), GradMatch(scale_factor=0.5), ValueError, "Leave scale_factor at 1"),
        (MLP.model(), GradMatch(input_key="image"), ValueError, "input_key='image' names nothing"),
        (MLP.model(), RandomBackprop(target_key=5), ValueError, "target_key=5 names nothing"),
        (ComposerClassifier(nn.Flatten(), num_classes=5), GradMatch(), ValueError, "has no nn.Linear"),
    ],
)
def test_what_cannot_work_fails_before_the_schedule_starts(model, algorithm, error, message):
    """All of these algorithms start at half of the training: they must fail on the first batch at the latest."""
    data = MLP.data(60)
    if not list(model.parameters()):
        model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(error, match=message):
        fit([algorithm], model, data, max_duration="100ep", train_subset_num_batches=1)


def test_a_model_that_is_no_composer_model_is_refused():
    from types import SimpleNamespace

    with pytest.raises(TypeError, match="needs a ComposerModel"):
        GradMatch().apply(Event.INIT, SimpleNamespace(model=nn.Linear(2, 2), algorithms=[]), None)
    assert issubclass(ComposerClassifier, ComposerModel)


@pytest.mark.parametrize("algorithm_class", SELECTING)
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 12), torch.zeros(3, dtype=torch.int64)), "have 4 samples but the targets.*have 3"),
        ((torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64)), "batch is empty"),
    ],
)
def test_bad_batches_are_refused(algorithm_class, batch, message):
    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield batch

    from composer import DataSpec

    spec = DataSpec(DataLoader(Batches(), batch_size=None), get_num_samples_in_batch=lambda b: 4)
    trainer = make_trainer(MLP.model(), spec, [algorithm_class()])
    with pytest.raises(ValueError, match=message):
        trainer.fit()


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_an_empty_batch_after_the_first_is_left_to_the_trainer_and_warned_of(algorithm_class):
    inputs, targets = MLP.data(8).tensors
    batches = [(inputs, targets), (inputs[:0], targets[:0]), (inputs, targets)]

    class Sums(ComposerClassifier):
        def loss(self, outputs, batch, *args, reduction="mean", **kwargs):
            # A mean over nothing would be NaN, with or without selection.
            return F.cross_entropy(outputs, batch[1], reduction="none" if reduction == "none" else "sum")

        def get_metrics(self, is_train=False):
            return {}  # Torchmetrics' accuracy cannot take an empty batch.

    from composer import DataSpec

    spec = DataSpec(batches, get_num_samples_in_batch=lambda batch: max(1, len(batch[0])))
    algorithm = algorithm_class(keep=0.5, **ON)
    model = Sums(MLP.module(), num_classes=5)
    trainer = make_trainer(model, spec, [algorithm], device_train_microbatch_size=8, max_duration="3ba", lr=0.01)
    with pytest.warns(UserWarning, match="a minibatch is empty"):
        trainer.fit()
    assert algorithm.batches_trained_whole == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
