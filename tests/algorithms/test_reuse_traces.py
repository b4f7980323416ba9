"""What a run that is made in one forward pass leaves as it would be without it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from changing_runs import KEEP, M, Net, batches, count, fit, tuples
from composer import Callback, DataSpec, Trainer
from composer.core import Event
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop, select_first


def test_a_warning_that_is_shown_once_is_shown_once(served, capsys):
    """Python forgets what it has shown wherever ``warnings.catch_warnings`` was left."""
    algorithm = GradMatch(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True)

    class Remarks(Callback):
        def before_forward(self, state, logger):
            if int(state.timestamp.batch) >= 2:
                warnings.warn("a remark", stacklevel=1)

    model = Net()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(batches(tuples, 7), get_num_samples_in_batch=count),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
        max_duration="7ba",
        algorithms=[algorithm],
        algorithm_passes=[select_first],
        callbacks=[Remarks()],
        device_train_microbatch_size=M,
        progress_bar=False,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown = []
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        trainer.fit()
    assert len(served) == 7
    assert shown.count("a remark") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
@pytest.mark.parametrize(
    "where", ["batch_start", "before_forward", "forward", "loss", "after_loss", "backward", "after_train_batch"]
)
def test_however_a_step_ends_the_model_is_its_own(where, error):
    armed = []

    class Raises(Net):
        def loss(self, outputs, batch, reduction="mean"):
            if armed and where == "loss":
                raise error
            return super().loss(outputs, batch, reduction)

    class In(Callback):
        def run_event(self, event, state, logger):
            if event == Event.BATCH_START:
                armed.append(True)
                if where == "forward":
                    state.model.register_forward_pre_hook(lambda *_: fail())
                if where == "backward":
                    state.model.head.weight.register_hook(lambda _: fail())
            if event.value == where:
                raise error

    def fail():
        raise error

    model = Raises()
    own = model.forward
    algorithm = LossBackprop(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True)
    with pytest.raises(error):
        fit(model, batches(tuples, 2), algorithm, callbacks=[In()])
    assert "forward" not in vars(model)
    assert model.forward == own
    copy.deepcopy(model)


@pytest.mark.parametrize("select", [GradMatch, LossBackprop])
def test_a_loss_that_changes_a_buffer_changes_it_once_a_step(select, served):
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))

        def loss(self, outputs, batch, reduction="mean"):
            self.mean.mul_(0.9).add_(outputs.detach().mean(0))
            return super().loss(outputs, batch, reduction)

    means = []
    for reuse in (False, True):
        torch.manual_seed(0)
        model = Counts()
        algorithm = select(0.0, 1.0, KEEP, interrupt=0, reuse_activations=reuse)
        torch.manual_seed(1)
        assert not fit(model, batches(tuples, 3), algorithm)
        means.append(model.mean)
    assert served == [M // 2] * 3
    torch.testing.assert_close(*means)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: normalises by the function, and applies an activation."""

    def forward(self, input):
        x = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return F.silu(x)


def test_a_subclass_of_batch_norm_with_a_forward_of_its_own(served):
    class Images(Net):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.pool = nn.Conv2d(3, 12, 3), BatchNormAct2d(12), nn.AdaptiveAvgPool2d(1)

        def hidden(self, x):
            return super().hidden(self.pool(self.bn(self.conv(x))).flatten(1))

    torch.manual_seed(0)
    data = [(torch.rand(M, 3, 8, 8), torch.randint(5, (M,))) for _ in range(3)]
    algorithm = GradMatch(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True)
    assert not fit(Images(), data, algorithm)
    assert served == [M // 2] * 3
