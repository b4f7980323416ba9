"""What a run that is made in one forward pass does with minibatches and picks that are out of the ordinary."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import On
from changing_runs import KEEP, M, Net, batches, checked, count, dicts, fit, lists, tuples
from composer import Callback, DataSpec, Trainer
from composer.algorithms import ColOut, CutOut, ProgressiveResizing
from composer.core import Event
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop, select_first


@pytest.mark.parametrize("kind", [tuples, lists, dicts])
@pytest.mark.parametrize("select", [GradMatch, LossBackprop])
@pytest.mark.parametrize("make", [CutOut, ColOut, ProgressiveResizing])
def test_picks_that_another_algorithm_changes(make, select, kind, served):
    class Images(Net):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1)

        def hidden(self, x):
            return super().hidden(self.pool(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    data = [kind(torch.rand(M, 3, 16, 16), torch.randint(5, (M,))) for _ in range(2)]
    keys = {"input_key": "x"} if kind is dicts else {}
    both = {**keys, "target_key": "y"} if kind is dicts else keys
    settings = {
        CutOut: {"length": 0.9, **keys},
        ColOut: {"p_row": 0.4, "p_col": 0.4, **both},
        ProgressiveResizing: {"initial_scale": 0.5, "delay_fraction": 0.5, **both},
    }
    said = checked(Images(), kind, 2, select, [make(**settings[make])], data=data)
    assert not any(served)
    assert "not those that were picked" in said[0]


def test_picks_that_are_changed_in_place_without_a_version(served):
    said = checked(Net(), others=[On(Event.BATCH_START, lambda state: state.batch[0].data.mul_(2.0))])
    assert not any(served)
    assert len(said) == 1


@pytest.mark.parametrize("select", [GradMatch, LossBackprop])
def test_one_bad_minibatch_is_no_reason_to_give_up(select, served):
    data = batches(tuples, 3)
    data[0][0][3, 2] = float("nan")
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.a.weight[:, 2] = 0.0
    algorithm = select(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True)

    class Finite(Callback):
        def after_backward(self, state, logger):
            for parameter in state.model.parameters():
                parameter.grad.nan_to_num_(0.0)

    said = fit(model, data, algorithm, callbacks=[Finite()])
    assert not any("cannot be used" in each for each in said)
    assert served == [M // 2] * 2


def test_a_list_of_a_number_for_each_sample_is_no_reason(served):
    class Numbered(Net):
        def items(self, batch):
            return batch["x"], batch["y"]

    torch.manual_seed(0)
    data = batches(lambda x, y: {"x": x, "y": y, "tokens": list(torch.ones(M).unbind())}, 2)

    def split(batch, size):
        n = len(batch["x"])
        return [
            {**{key: batch[key][i : i + size] for key in "xy"}, "tokens": batch["tokens"][i : i + size]}
            for i in range(0, n, size)
        ]

    model = Numbered()
    algorithm = LossBackprop(0.0, 1.0, KEEP, interrupt=0, input_key="x", target_key="y", reuse_activations=True)
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(data, get_num_samples_in_batch=count, split_batch=split),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
        max_duration="2ba",
        algorithms=[algorithm],
        algorithm_passes=[select_first],
        device_train_microbatch_size=3,
        progress_bar=False,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LossBackprop")
        trainer.fit()
    assert served == [3, 3, 2] * 2
