"""What changes during a run that is made in one forward pass: each step is that of the model as it is."""

from __future__ import annotations

import copy
import os
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from cases import record_selections
from composer import Callback, DataSpec, Trainer
from composer.algorithms import ColOut, CutOut, ProgressiveResizing
from composer.core import Algorithm, Event
from composer.models import ComposerModel
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop, select_first

M, KEEP = 16, 0.5


def tuples(x, y):
    return x, y


def lists(x, y):
    return [x, y]


def dicts(x, y):
    return {"x": x, "y": y}


class Net(ComposerModel):
    """A model that reads a batch of any kind; layers of a kind that changes are the subclasses'."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(12, 16), nn.Identity(), nn.Linear(16, 5)
        self.register_buffer("offset", torch.zeros(16))
        self.scale = 1.0

    def items(self, batch):
        return (batch["x"], batch["y"]) if isinstance(batch, dict) else batch

    def hidden(self, x):
        return self.a(x) + self.offset

    def forward(self, batch):
        return self.head(torch.tanh(self.norm(self.hidden(self.items(batch)[0])) * self.scale))

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, self.items(batch)[1], reduction=reduction)


class On(Algorithm):
    """A user's algorithm: calls a function of the state on an event."""

    def __init__(self, event, function):
        self.event, self.function = event, function

    def match(self, event, state):
        return event == self.event

    def apply(self, event, state, logger):
        self.function(state)


class AgainstOwn(Callback):
    """Compares each step's gradient with autograd's own, of the picks, by a copy of the model as it is.

    The reference is made when the Trainer has just split its batch, so after all that changes the model before.
    """

    def __init__(self, selections, kind):
        self.selections, self.kind = selections, kind
        self.errors, self.gradients = [], []

    def batch_start(self, state, logger):
        self.batch = state.batch
        state.model.zero_grad()  # Of what the optimizer does not know, too.

    def before_train_batch(self, state, logger):
        own = copy.deepcopy(state.model)
        weights = self.selections[-1][1].weights
        losses = own.loss(own(self.batch), self.batch, reduction="none")
        ((losses if weights is None else losses * weights.to(losses)).mean()).backward()
        self.own = [parameter.grad for parameter in own.parameters()]

    def after_train_batch(self, state, logger):
        found = [parameter.grad for parameter in state.model.parameters()]
        assert [grad is None for grad in found] == [grad is None for grad in self.own]
        pairs = [(one, other) for one, other in zip(found, self.own, strict=True) if one is not None]
        one, other = (torch.cat([grad.flatten() for grad in each]) for each in zip(*pairs, strict=True))
        self.errors.append(float((one - other).norm() / other.norm()))


def count(batch):
    return len(batch["y"] if isinstance(batch, dict) else batch[1])


def batches(kind, steps, seed=0):
    torch.manual_seed(seed)
    return [kind(torch.randn(M, 12), torch.randint(5, (M,))) for _ in range(steps)]


def fit(model, data, algorithm, others=(), callbacks=(), microbatch_size=M):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            model=model,
            train_dataloader=DataSpec(data, get_num_samples_in_batch=count),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
            max_duration=f"{len(data)}ba",
            algorithms=[algorithm, *others],
            algorithm_passes=[select_first],
            callbacks=list(callbacks),
            device_train_microbatch_size=microbatch_size,
            seed=1,
            progress_bar=False,
            device="cpu",
        )
        trainer.fit()
    return [str(each.message) for each in caught if "forward passes are made" in str(each.message)]


def checked(model, kind=tuples, steps=5, select=GradMatch, others=(), microbatch_size=M, data=None):
    keys = {"input_key": "x", "target_key": "y"} if kind is dicts else {}
    algorithm = select(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True, **keys)
    compare = AgainstOwn(record_selections(algorithm), kind)
    data = batches(kind, steps) if data is None else data
    said = fit(model, data, algorithm, others, [compare], microbatch_size)
    assert len(compare.errors) == len(data)
    assert max(compare.errors) < 1e-3, compare.errors
    return said


def unfreeze(model):
    model.a.requires_grad_(True)


def freeze(model):
    model.a.requires_grad_(False)


def replace_module(model):
    model.norm = nn.LayerNorm(16)


def replace_by_the_same_kind(model):
    model.a = nn.Linear(12, 16)


def replace_parameter(model):
    model.a.weight = nn.Parameter(torch.randn(16, 12))


def change_attribute(model):
    model.scale = 3.0


def change_buffer(model):
    model.offset.add_(1.0)


def change_buffer_without_a_version(model):
    model.offset.data.add_(1.0)


def replace_buffer(model):
    model.offset = torch.ones(16)


def change_parameter(model):
    with torch.no_grad():
        model.a.weight.mul_(-2.0)


def change_parameter_without_a_version(model):
    model.a.weight.data.mul_(-2.0)


def replace_data(model):
    model.a.weight.data = model.a.weight.data * -2.0


def replace_forward(model):
    model.a.forward = MethodType(lambda self, x: F.linear(x, self.weight, self.bias) * 2.0, model.a)


CHANGES = [
    freeze,
    replace_module,
    replace_by_the_same_kind,
    replace_parameter,
    change_attribute,
    change_buffer,
    change_buffer_without_a_version,
    replace_buffer,
    change_parameter,
    change_parameter_without_a_version,
    replace_data,
    replace_forward,
]


@pytest.mark.parametrize("event", [Event.BATCH_CHECKPOINT, Event.BATCH_START])
@pytest.mark.parametrize("change", [*CHANGES, unfreeze], ids=lambda change: change.__name__)
def test_a_model_that_is_changed_between_steps_or_after_the_selection(change, event, served):
    torch.manual_seed(0)
    model = Net()
    if change is unfreeze:
        freeze(model)

    def at_third(state):
        if int(state.timestamp.batch) == 2:
            change(state.model)

    said = checked(model, others=[On(event, at_third)], microbatch_size=3)
    assert not said, "once is no reason to give up"
    assert served.count(3) >= 2 * 3, "other steps are served"


@pytest.mark.parametrize("kind", [tuples, lists, dicts])
@pytest.mark.parametrize("select", [GradMatch, LossBackprop])
def test_a_parameter_that_is_always_changed_after_the_selection(kind, select, served):
    torch.manual_seed(0)
    said = checked(Net(), kind, 6, select, [On(Event.BATCH_START, lambda state: change_parameter(state.model))])
    assert not any(served)
    assert len(said) == 1
    assert "a parameter or a buffer was changed" in said[0]


class Settings:
    scale = 1.0


class Many(Net):
    """Reads numbers from outside of itself."""

    table = {"scale": 1.0}  # noqa: RUF012

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, batch):
        x = self.items(batch)[0]
        if self.source == "class":
            scale = Settings.scale
        elif self.source == "environment":
            scale = float(os.environ.get("A_SCALE_OF_THE_TESTS", "1"))
        elif self.source == "own class":
            scale = self.factor
        elif self.source == "dict":
            scale = self.table["scale"]
        elif self.source == "missing key":
            try:
                scale = self.table["other"]
            except KeyError:
                scale = 1.0
        else:
            scale = NUMBER
        return self.head(torch.tanh(self.hidden(x) * scale))

    factor = 1.0


NUMBER = 1.0


@pytest.mark.parametrize("source", ["class", "environment", "own class", "dict", "missing key", "global"])
@pytest.mark.parametrize("event", [Event.BATCH_CHECKPOINT, Event.BATCH_START])
def test_numbers_from_outside_of_the_model(source, event, served, monkeypatch):
    monkeypatch.setattr(Settings, "scale", 1.0)
    monkeypatch.setattr(Many, "factor", 1.0)
    monkeypatch.setattr(Many, "table", {"scale": 1.0})
    monkeypatch.setitem(globals(), "NUMBER", 1.0)
    monkeypatch.delenv("A_SCALE_OF_THE_TESTS", raising=False)

    def change(state):
        scale = 1.0 + int(state.timestamp.batch)
        Settings.scale = Many.factor = Many.table["scale"] = Many.table["other"] = scale
        monkeypatch.setenv("A_SCALE_OF_THE_TESTS", str(scale))
        globals()["NUMBER"] = scale

    torch.manual_seed(0)
    checked(Many(source), steps=3, others=[On(event, change)])
    assert served


class Centred(Net):
    """Mixes samples through features that are constant at first; with dropout or not."""

    def __init__(self, dropout, normalised):
        super().__init__()
        self.dropout, self.context = dropout, nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16) if normalised else nn.Identity()

    def hidden(self, x):
        context = self.context(x[:, 8:])
        hidden = F.dropout(self.a(x), self.dropout, self.training) if self.dropout else self.a(x)
        return hidden + context - context.mean(0)


@pytest.mark.parametrize(("dropout", "normalised"), [(0.0, False), (0.3, False), (0.0, True)])
@pytest.mark.parametrize("first", [1, 5])
def test_samples_that_are_mixed_later(dropout, normalised, first, served):
    data = batches(tuples, first + 2)
    for x, _ in data[:first]:
        x[:, 8:] = 0.0
    torch.manual_seed(0)
    algorithm = GradMatch(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True)
    said = fit(Centred(dropout, normalised), data, algorithm)
    assert served == [M // 2] * first
    assert len(said) == 1
    assert "mix samples" in said[0]


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
