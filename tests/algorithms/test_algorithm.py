"""The algorithms in a Trainer: traces, order, schedule, metrics, fallbacks, and bad input."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ANY_SIZE, BATCHNORM, MLP, loader, make_trainer, record_selections
from composer import Algorithm, Callback, Event
from composer.algorithms import ColOut, CutMix, LabelSmoothing, MixUp, SelectiveBackprop
from composer.algorithms.selective_backprop import select_using_loss
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier, ComposerModel
from selecting import LOOKING, SELECTING
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_gradmatch import Candidates, GradMatch, LossBackprop, RandomBackprop, select_first
from composer_gradmatch.rules.loss_percentiles import LossPercentiles, loss_percentiles, select_by_percentile

ON = {"start": 0.0, "end": 1.0, "interrupt": 0}


def fit(algorithms, model=None, data=None, batch_size=20, **kwargs):
    model = MLP.model() if model is None else model
    train = loader(MLP.data(60) if data is None else data, batch_size)
    trainer = make_trainer(model, train, algorithms, **{"algorithm_passes": [select_first], **kwargs})
    trainer.fit()
    return trainer


class Spy(Algorithm):
    """Notes how many samples it sees on AFTER_DATALOADER."""

    def __init__(self):
        self.seen = []

    def match(self, event, state):
        return event == Event.AFTER_DATALOADER

    def apply(self, event, state, logger):
        self.seen.append(len(state.batch[0]))


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_the_selection_pass_leaves_no_trace(algorithm_class, monkeypatch):
    model = BATCHNORM.model()
    algorithm = algorithm_class(keep=0.4, **ON)
    original = algorithm._after_dataloader
    traces = []

    def fingerprint():
        return {
            "buffers": {k: v.clone() for k, v in model.named_buffers()},
            "buffer_ids": [id(v) for v in model.buffers()],
            "rng": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].copy(),
            "python": random.getstate(),
            "training": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grads": [p.grad for p in model.parameters()],
            "hooks": [dict(m._forward_hooks) for m in model.modules()],
            "grad_mode": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        }

    def watched(state, logger):
        if algorithm_class is LossBackprop:
            # Its draw is meant to move the generator; the pass is not.
            monkeypatch.setattr(
                "composer_gradmatch.rules.loss_percentiles.select_by_percentile", lambda p, m, b: torch.arange(m)
            )
        before = fingerprint()
        original(state, logger)
        traces.append((before, fingerprint()))
        assert len(state.batch[0]) < 20

    monkeypatch.setattr(algorithm, "_after_dataloader", watched)
    fit([algorithm], model, BATCHNORM.data(60), max_duration="1ep")
    assert len(traces) == 3
    for before, after in traces:
        for key, value in before.pop("buffers").items():
            assert torch.equal(value, after["buffers"][key]), key
        after.pop("buffers")
        assert torch.equal(before.pop("rng"), after.pop("rng"))
        np.testing.assert_array_equal(before.pop("numpy"), after.pop("numpy"))
        assert before == after
    assert model.module[1].num_batches_tracked == 3


def test_composers_own_selection_pass_does_leave_a_trace():
    """What the test above would look like without the care: BatchNorm counts each batch twice."""
    model = BATCHNORM.model()
    fit([SelectiveBackprop(keep=0.4, **ON)], model, BATCHNORM.data(60), max_duration="1ep")
    assert model.module[1].num_batches_tracked == 6


@pytest.mark.parametrize("selecting", [*SELECTING, SelectiveBackprop])
@pytest.mark.parametrize("spy_first", [True, False])
def test_with_the_pass_selection_comes_first(selecting, spy_first):
    spy, algorithm = Spy(), selecting(keep=0.3, **ON)
    fit([spy, algorithm] if spy_first else [algorithm, spy])
    assert spy.seen[0] <= 6


def test_without_the_pass_composer_selects_last_and_we_warn_of_it():
    spy = Spy()
    fit([spy, SelectiveBackprop(keep=0.3, **ON)], algorithm_passes=None)
    assert spy.seen == [20]
    spy = Spy()
    with pytest.warns(UserWarning, match="(?s)Spy will change.*algorithm_passes=.composer_gradmatch.select_first"):
        fit([GradMatch(keep=0.3, **ON), spy], algorithm_passes=None)
    assert spy.seen == [20]


@pytest.mark.parametrize("passes", [None, [select_first]])
def test_no_warning_where_selection_does_come_first(passes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Cannot split tensor|The composer|.*deprecated")
        algorithms = [Spy(), GradMatch(keep=0.3, **ON)]
        fit(algorithms if passes is None else algorithms[::-1], algorithm_passes=passes, device_train_microbatch_size=2)


@pytest.mark.parametrize("other", [MixUp(alpha=0.2), CutMix(), ColOut(), LabelSmoothing(0.1)])
def test_trains_beside_algorithms_that_change_the_batch(other):
    algorithm = GradMatch(keep=0.3, **ON)
    trainer = fit(
        [algorithm, other], ANY_SIZE.model(), ANY_SIZE.data(60), max_duration="1ep", device_train_microbatch_size=4
    )
    assert trainer.state.timestamp.batch == 3
    assert torch.isfinite(torch.as_tensor(trainer.state.loss)).all()


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_scale_factor_shrinks_the_inputs_of_the_selection_pass_only(algorithm_class):
    model = ANY_SIZE.model()
    sizes = []
    model.module.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    algorithm = algorithm_class(keep=0.5, scale_factor=0.5, **ON)
    fit([algorithm], model, ANY_SIZE.data(20), device_train_microbatch_size=20)
    assert sizes[-1][1:] == (1, 8, 8)
    assert sizes[-1][0] <= 10
    assert {size[1:] for size in sizes[:-1]} == {(1, 4, 4)}
    assert (20, 1, 4, 4) in sizes


def test_label_smoothing_reaches_the_weighted_loss():
    class Watch(Callback):
        losses: dict = {}  # noqa: RUF012

        def before_backward(self, state, logger):
            self.losses["got"] = float(state.loss.detach())
            self.losses["outputs"] = state.outputs.detach()
            self.losses["targets"] = state.batch[1]

    algorithm = GradMatch(keep=0.4, **ON)
    seen = record_selections(algorithm)
    fit([algorithm, LabelSmoothing(0.3)], callbacks=[Watch()], device_train_microbatch_size=20)
    losses = F.cross_entropy(Watch.losses["outputs"], Watch.losses["targets"], reduction="none", label_smoothing=0.3)
    expected = float((losses * seen[0][1].weights).mean())
    assert Watch.losses["got"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="LabelSmoothing changes the batch for the loss"):
        fit([GradMatch(keep=0.4, **ON), LabelSmoothing(0.3)], algorithm_passes=None)


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


@pytest.mark.parametrize("algorithm_class", SELECTING)
def test_metrics_are_logged_each_selection_step(algorithm_class):
    logger = InMemoryLogger()
    algorithm = algorithm_class(keep=0.3, **ON)
    fit([algorithm], loggers=[logger], max_duration="1ep")
    values = {k.split("/")[1]: [v for _, v in x] for k, x in logger.data.items() if k.startswith(algorithm.log_name)}
    expected = {"fraction_kept", "effective_sample_size", "largest_weight", "selection_time", "estimated_cost"}
    assert set(values) >= expected
    assert ("matching_residual" in values) or algorithm_class is not GradMatch
    assert all(len(v) == 3 for v in values.values())
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


def test_loss_backprop_picks_what_select_using_loss_picks_for_the_same_draws(monkeypatch):
    inputs, targets = MLP.data(40).tensors
    module = MLP.model().module
    losses = F.cross_entropy(module(inputs), targets, reduction="none").detach()
    percentiles = torch.arange(0.5, 40, dtype=torch.float64) / 40
    torch.manual_seed(5)
    draws = select_by_percentile(percentiles, 12, 1 / 0.3 - 1)

    def choice(n, size, replace, p):
        assert (n, size, replace) == (40, 12, False)
        np.testing.assert_allclose(p, (percentiles ** (1 / 0.3 - 1) / (percentiles ** (1 / 0.3 - 1)).sum()).numpy())
        return draws.numpy()

    monkeypatch.setattr(np.random, "choice", choice)
    theirs, their_targets = select_using_loss(inputs, targets, module, F.cross_entropy, keep=0.3)

    torch.manual_seed(5)
    picks = LossPercentiles(beta=1 / 0.3 - 1)(Candidates(40, losses=losses), 12).indices
    assert torch.equal(inputs[picks], theirs)
    assert torch.equal(targets[picks], their_targets)


def test_draws_follow_numpys_sequential_sampling_without_replacement():
    percentiles = torch.arange(0.5, 6, dtype=torch.float64) / 6
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    p = (percentiles**2 / (percentiles**2).sum()).numpy()
    ours, theirs = np.zeros(6), np.zeros(6)
    for _ in range(4000):
        ours[select_by_percentile(percentiles, 2, 2.0).numpy()] += 1
        theirs[rng.choice(6, 2, replace=False, p=p)] += 1
    np.testing.assert_allclose(ours / 4000, theirs / 4000, atol=0.04)


def test_large_beta_does_not_underflow():
    assert select_by_percentile(torch.arange(0.5, 128) / 128, 100, 10_000.0).unique().numel() == 100


def test_percentiles_of_a_history():
    losses = torch.tensor([3.0, 1.0, 2.0])
    assert loss_percentiles(losses, losses).tolist() == pytest.approx([2.5 / 3, 0.5 / 3, 1.5 / 3])
    history = torch.tensor([0.0, 1.0, 1.0, 4.0])
    assert loss_percentiles(torch.tensor([1.0, 5.0]), history).tolist() == [0.5, 1.0]


def test_a_history_remembers_the_most_recent_losses():
    algorithm = LossBackprop(keep=0.3, history=50, **ON)
    fit([algorithm], max_duration="2ep")
    assert len(algorithm.rule.function.recent) == 50


def test_keep_of_two_thirds_and_more_is_warned_of():
    with pytest.warns(UserWarning, match="costs more than training on everything"):
        fit([GradMatch(keep=0.7, **ON)])


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


def test_two_selecting_algorithms_at_once_are_refused():
    with pytest.raises(ValueError, match="would both select"):
        fit([GradMatch(**ON), SelectiveBackprop()])
    fit([GradMatch(start=0.0, end=0.5), RandomBackprop(start=0.5, end=1.0)])


def test_an_interpolated_loss_is_refused():
    with pytest.raises(ValueError, match="interpolate_loss=False"):
        fit([GradMatch(**ON), MixUp(interpolate_loss=True)])


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
