"""What is logged, counted and warned of."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from cases import MLP, ON, fit
from composer import Callback
from composer.algorithms import SelectiveBackprop
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from selecting import LOOKING, SELECTING
from torch.utils.data import TensorDataset

from composer_gradmatch import GradMatch


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_metrics_are_logged_each_selection_step(algorithm_class):
    logger = InMemoryLogger()
    algorithm = algorithm_class(keep=0.3, **ON)
    fit([algorithm], loggers=[logger], max_duration="1ep")
    values = {k.split("/")[1]: [v for _, v in x] for k, x in logger.data.items() if k.startswith(algorithm.log_name)}
    expected = {"fraction_kept", "effective_sample_size", "largest_weight", "selection_time", "estimated_cost"}
    assert set(values) >= expected
    assert ("matching_residual" in values) or algorithm_class is not GradMatch
    of_gradients = {"step_length", "gradient_noise_scale", "relative_error"}  # Of losses' looks, in each tenth.
    assert all(
        len(v) == 3 for key, v in values.items() if algorithm.rule.needs == "gradients" or key not in of_gradients
    )
    assert all(0 < share <= 0.3 for share in values["fraction_kept"])
    passes = 1 / 3 if algorithm.rule.passes() else 0
    for cost, share in zip(values["estimated_cost"], values["fraction_kept"], strict=True):
        assert cost == pytest.approx(passes + share)
    if algorithm_class is GradMatch:
        assert all(0 <= residual < 3 for residual in values["matching_residual"])
        assert all(1 <= size <= 6 for size in values["effective_sample_size"])
    elif not algorithm.rule.weighs:
        assert values["effective_sample_size"] == pytest.approx([6, 6, 6])


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_a_small_last_batch_keeps_one_sample(algorithm_class):
    logger = InMemoryLogger()
    algorithm = algorithm_class(keep=0.3, **ON)
    fit([algorithm], data=MLP.data(22), loggers=[logger], max_duration="1ep")
    assert logger.data[f"{algorithm.log_name}/fraction_kept"][-1][1] == 0.5


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_a_batch_that_is_not_finite_is_trained_whole_counted_and_warned_of_once(algorithm_class):
    data = MLP.data(60)
    data.tensors[0][3] = float("nan")
    data.tensors[0][25] = float("inf")
    logger = InMemoryLogger()
    model = MLP.model()
    algorithm = algorithm_class(keep=0.3, **ON)
    with pytest.warns(UserWarning, match="not finite") as caught:
        fit([algorithm], model, data, loggers=[logger], max_duration="1ep", lr=0.0)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    name = algorithm.log_name
    assert [v for _, v in logger.data[f"{name}/batches_trained_whole"]] == [1, 2, 3] or [
        v for _, v in logger.data[f"{name}/batches_trained_whole"]
    ] == [1, 2]


def test_a_batch_whose_gradients_are_all_zero_is_trained_whole():
    data = MLP.data(20)
    algorithm = GradMatch(keep=0.3, loss_fn=lambda outputs, batch: outputs.sum(1) * 0.0, **ON)

    class Zero(ComposerClassifier):
        def loss(self, outputs, batch, *args, **kwargs):
            return outputs.sum() * 0.0

    fit([algorithm], Zero(MLP.module(), num_classes=5), data)
    assert algorithm.batches_trained_whole == 1


def test_keep_of_two_thirds_and_more_is_warned_of():
    with pytest.warns(UserWarning, match="costs more than training on everything"):
        fit([GradMatch(keep=0.7, **ON)])


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_the_schedule_is_composers(algorithm_class):
    class Sizes(Callback):
        def __init__(self):
            self.sizes = []

        def batch_start(self, state, logger):
            self.sizes.append(len(state.batch[0]))

    sizes = Sizes()
    fit([algorithm_class(start=0.25, end=0.75, keep=0.5, interrupt=2)], callbacks=[sizes], max_duration="4ep")
    reference = Sizes()
    fit([SelectiveBackprop(start=0.25, end=0.75, keep=0.5, interrupt=2)], callbacks=[reference], max_duration="4ep")
    assert [size < 20 for size in sizes.sizes] == [size < 20 for size in reference.sizes]
    assert any(size < 20 for size in sizes.sizes)


def test_dict_batches_train_and_select():
    class DictModel(ComposerClassifier):
        def forward(self, batch):
            return self.module(batch["x"])

        def loss(self, outputs, batch, *args, **kwargs):
            return F.cross_entropy(outputs, batch["y"], *args, **kwargs)

        def update_metric(self, batch, outputs, metric):
            metric.update(outputs, batch["y"])

    class DictData(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return {"x": x, "y": y}

    inputs, targets = MLP.data(40).tensors
    logger = InMemoryLogger()
    fit(
        [GradMatch(keep=0.3, input_key="x", target_key="y", **ON)],
        DictModel(MLP.module(), num_classes=5),
        DictData(inputs, targets),
        loggers=[logger],
        max_duration="1ep",
        device_train_microbatch_size=2,
    )
    assert len(logger.data["gradmatch/fraction_kept"]) == 2
