"""The selection step of a GPU, with its fixed number of picks, run on the CPU and on tensors without values."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from cases import BATCHNORM, CONV, MLP, loader, make_trainer
from composer.core import Precision
from composer.loggers import InMemoryLogger, LoggerDestination
from no_host_sync import HostSyncError, NoHostSync
from on_device import OnDevice
from torch.utils.data import TensorDataset

from composer_gradmatch import GradMatch
from composer_gradmatch.batches import match_rows, take_samples
from composer_gradmatch.forward.loss_scale import LossScale
from composer_gradmatch.forward.losses import weighted_loss
from composer_gradmatch.train.run_summary import RunSummary

ON = {"start": 0.0, "end": 1.0, "interrupt": 0}


def train(algorithm, case=MLP, data=None, **kwargs):
    torch.manual_seed(0)
    model, logger = case.model(), InMemoryLogger()
    data = case.data(60) if data is None else data
    trainer = make_trainer(model, loader(data, 20), [algorithm], loggers=[logger], max_duration="2ep", **kwargs)
    trainer.fit()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), logger.data


def pairs(case):
    """Samples each of which is in its minibatch twice, so that matching pursuit stops at half of them."""
    inputs, targets = case.data(30).tensors
    return TensorDataset(inputs.repeat_interleave(2, 0), targets.repeat_interleave(2, 0))


@pytest.mark.parametrize("case", [MLP, CONV], ids=lambda case: case.name)
@pytest.mark.parametrize(("keep", "data", "weigh_nothing"), [(0.3, None, False), (0.9, pairs, True)])
@pytest.mark.filterwarnings("ignore:.*costs more than training on everything")
def test_trains_as_on_the_host_though_some_picks_weigh_nothing(case, keep, data, weigh_nothing):
    data = data and data(case)
    expected, host = train(GradMatch(keep=keep, **ON), case, data)
    actual, device = train(OnDevice(keep=keep, **ON), case, data)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    for name in ("fraction_kept", "effective_sample_size", "largest_weight", "matching_residual"):
        values = [[value for _, value in logged[f"gradmatch/{name}"]] for logged in (host, device)]
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-6)
    assert (min(value for _, value in device["gradmatch/fraction_kept"]) <= 0.5 < keep) == weigh_nothing
    costs = [value for _, value in device["gradmatch/estimated_cost"]]
    assert costs == pytest.approx([1 / 3 + int(keep * 20) / 20] * 6)


def test_a_batch_that_cannot_be_matched_is_trained_on_m_samples_counted_and_warned_of_once():
    data = MLP.data(60)
    data.tensors[0][3] = float("nan")
    algorithm = OnDevice(keep=0.3, **ON)
    with pytest.warns(UserWarning, match="not finite, or whose mean is zero") as caught:
        _, logged = train(algorithm, data=data, lr=0.0)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert [value for _, value in logged["gradmatch/batches_not_matched"]][:1] == [1]
    assert algorithm.state_dict()["batches_not_matched"] == algorithm.batches_not_matched >= 2
    restored = GradMatch()
    restored.load_state_dict(algorithm.state_dict())
    assert restored.batches_not_matched == algorithm.batches_not_matched


class Steps(LoggerDestination):
    """Keeps the step that each metric is logged for."""

    def __init__(self):
        self.of = {}

    def log_metrics(self, metrics, step=None):
        for name in metrics:
            self.of.setdefault(name, []).append(step)


def test_metrics_belong_to_the_step_that_they_were_measured_in():
    for algorithm in (GradMatch(keep=0.3, **ON), OnDevice(keep=0.3, **ON)):
        steps = Steps()
        trainer = make_trainer(MLP.model(), loader(MLP.data(60), 20), [algorithm], loggers=[steps], max_duration="2ep")
        trainer.fit()
        assert steps.of["gradmatch/matching_residual"] == steps.of["loss/train/total"] == list(range(6))


def test_the_summary_tells_of_batches_that_are_not_matched():
    data = MLP.data(60)
    data.tensors[0][3] = float("nan")
    summary = RunSummary()
    trainer = make_trainer(
        MLP.model(), loader(data, 20), [OnDevice(keep=0.3, **ON)], loggers=[summary], max_duration="1ep", lr=0.0
    )
    with pytest.warns(UserWarning, match="not finite"):
        trainer.fit()
    table = summary.table(trainer.state)
    assert summary.not_matched >= 1
    assert re.search(rf"batches not matched +{summary.not_matched}", table)
    assert summary.sums.get("effective_sample_size", (0, 0))[1] == 3 - summary.not_matched


def meta_state(case, microbatch):
    """What selection needs of a Trainer's state, on tensors that have no values, only a device of their own."""
    inputs, targets = case.data(20).tensors
    return SimpleNamespace(
        model=case.model().to("meta"),
        batch=(inputs.to("meta"), targets.to("meta")),
        device=SimpleNamespace(name="gpu"),
        device_train_microbatch_size=microbatch,
        auto_microbatching=False,
        precision=Precision.FP32,
        precision_config=None,
    )


@pytest.mark.parametrize("case", [MLP, BATCHNORM], ids=lambda case: case.name)
@pytest.mark.parametrize("microbatch", [20, 8])
def test_from_the_selection_forward_to_the_weighted_loss_the_host_waits_for_nothing(case, microbatch):
    state = meta_state(case, microbatch)
    algorithm = GradMatch(keep=0.3, output_layer=f"module.{case.layer}", **ON)
    algorithm.selector.layer.of(state)
    with NoHostSync():
        selection = algorithm.selector.select(state, 20, 6)
        picked = take_samples(state.batch, selection.indices, 20)
        part = tuple(leaf[2:5] for leaf in picked)
        weights = match_rows(part, picked, selection.weights.float())
        outputs, model = state.model(part), state.model
        losses, own = model.loss(outputs, part, reduction="none"), model.loss(outputs, part)
        weighted_loss(losses, weights, own, LossScale().read(losses, own, [outputs])).backward()
    assert selection.indices.device.type == "meta"
    assert [len(leaf) for leaf in picked] == [6, 6]
    assert weights.shape == (3,)


@pytest.mark.parametrize("arguments", [{"solver": "nonnegative"}, {"solver": "swap"}, {"tolerance": 0.1}])
def test_the_solvers_on_the_host_do_make_it_wait(arguments):
    algorithm = GradMatch(keep=0.3, output_layer="module.2", **arguments, **ON)
    with pytest.raises(HostSyncError), NoHostSync():
        algorithm.selector.select(meta_state(MLP, 20), 20, 6)
