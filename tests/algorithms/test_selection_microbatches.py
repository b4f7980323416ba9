"""The selection pass in microbatches and in another precision: the same picks, in less memory."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import BATCHNORM, MLP, STEP_CASES, loader, make_trainer, record_selections
from composer import Algorithm, Event
from composer.models import ComposerClassifier
from selecting import LOOKING
from torch import nn

from composer_gradmatch import GradMatch, select_first
from composer_gradmatch.data.digits import digits
from composer_gradmatch.models.digits_cnn import digits_cnn

ON = {"start": 0.0, "end": 1.0, "interrupt": 0}


def selections(model, data, algorithm, batch_size=20, **kwargs):
    seen = record_selections(algorithm)
    trainer = make_trainer(model, loader(data, batch_size), [algorithm], algorithm_passes=[select_first], **kwargs)
    trainer.fit()
    return [selection for _, selection in seen]


def sizes_of_forward_passes(model):
    sizes = []
    model.module.register_forward_hook(lambda module, args, output: sizes.append((module.training, len(output))))
    return sizes


@pytest.mark.parametrize("algorithm_class", LOOKING)
@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_picks_and_weights_are_those_of_one_pass(case, algorithm_class):
    found = []
    for size in (20, 7, 1):
        algorithm = algorithm_class(keep=0.4, selection_microbatch_size=size, **ON)
        found.append(selections(case.model(), case.data(20), algorithm, seed=3)[0])
    for other in found[1:]:
        assert torch.equal(other.indices, found[0].indices)
        if found[0].weights is not None:
            torch.testing.assert_close(other.weights, found[0].weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm_class", LOOKING)
@pytest.mark.parametrize(("own", "trainers", "expected"), [(None, 6, [5] * 4), (None, 20, [20]), (8, 20, [6, 7, 7])])
def test_the_size_is_the_training_microbatches_unless_it_is_given(algorithm_class, own, trainers, expected):
    model = MLP.model()
    algorithm = algorithm_class(keep=0.4, selection_microbatch_size=own, **ON)
    original = algorithm.selector.select

    def select(state, num_samples, num_picks):
        sizes = sizes_of_forward_passes(model)
        selection = original(state, num_samples, num_picks)
        assert [size for _, size in sizes] == expected
        return selection

    algorithm.selector.select = select
    selections(model, MLP.data(20), algorithm, device_train_microbatch_size=trainers)


class Seen(list):
    """What a selection pass notes in a module's plain lists is put back."""


class Small(nn.Module):
    """Runs out of memory above ``limit`` samples, where no gradients are computed yet."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.sizes = limit, Seen()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, inputs):
        if not torch.is_grad_enabled():
            self.sizes.append(len(inputs))
            if len(inputs) > self.limit:
                raise torch.OutOfMemoryError("made up")
        return self.head(torch.relu(self.body(inputs)))


def in_head(algorithm_class):
    """Names the output layer, which is then found without a forward pass."""
    has_layer = "output_layer" in inspect.signature(algorithm_class).parameters
    return {"output_layer": "module.head"} if has_layer else {}


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_auto_halves_until_it_fits_and_remembers(algorithm_class):
    module = Small(limit=6)
    algorithm = algorithm_class(keep=0.3, selection_microbatch_size="auto", **in_head(algorithm_class), **ON)
    model = ComposerClassifier(module, num_classes=5)
    first, second = selections(model, MLP.data(40), algorithm, max_duration="2ba")
    assert module.sizes[:3] == [20, 10, 5]
    assert max(module.sizes[3:]) == 5
    assert (len(first.indices), len(second.indices)) == (6, 6)


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_auto_follows_the_trainers_own(algorithm_class):
    """On a CPU the Trainer refuses "auto", so its flag is set by hand."""

    class Auto(Algorithm):
        def match(self, event, state):
            return event == Event.FIT_START

        def apply(self, event, state, logger):
            state.auto_microbatching = True

    module = Small(limit=6)
    algorithm = algorithm_class(keep=0.3, **in_head(algorithm_class), **ON)
    make_trainer(ComposerClassifier(module, num_classes=5), loader(MLP.data(20), 20), [algorithm, Auto()]).fit()
    assert module.sizes[:3] == [20, 10, 5]


@pytest.mark.parametrize("algorithm_class", LOOKING)
@pytest.mark.parametrize("size", [None, 10, "auto"])
def test_memory_that_cannot_do_is_told_with_the_remedy(algorithm_class, size):
    module = Small(limit=0)
    algorithm = algorithm_class(selection_microbatch_size=size, **in_head(algorithm_class))
    with pytest.raises(RuntimeError, match=r"Memory ran out in the selection pass of \w+, with (1|10|20) samples"):
        selections(ComposerClassifier(module, num_classes=5), MLP.data(20), algorithm)


@pytest.mark.parametrize("algorithm_class", LOOKING)
@pytest.mark.parametrize("size", [0, -1, 2.5, True, "half"])
def test_a_wrong_size_is_refused_at_construction(algorithm_class, size):
    with pytest.raises(ValueError, match="selection_microbatch_size must be a positive number"):
        algorithm_class(selection_microbatch_size=size)


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_a_wrong_precision_is_refused_at_construction(algorithm_class):
    with pytest.raises(ValueError, match="selection_precision must be one of fp32, amp_fp16, amp_bf16"):
        algorithm_class(selection_precision="bf16")


def test_batchnorm_normalises_each_selection_microbatch_by_itself_and_keeps_its_statistics():
    model = BATCHNORM.model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    algorithm = GradMatch(keep=0.4, selection_microbatch_size=5, **ON)
    original = algorithm.selector.select

    def select(*args):
        selection = original(*args)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        return selection

    algorithm.selector.select = select
    selections(model, BATCHNORM.data(20), algorithm)
    assert not torch.equal(model.module[1].running_mean, before["module.1.running_mean"])


def test_low_precision_runs_the_selection_pass_only():
    """Reports how many picks on digits agree with full precision's; rounding may decide some of them."""
    torch.manual_seed(0)
    model = digits_cnn(num_classes=10)
    dtypes = []
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    low = GradMatch(keep=0.3, selection_precision="amp_bf16", **ON)
    full = GradMatch(keep=0.3, **ON)
    original, pairs = low.selector.select, []

    def select(state, *sizes):
        selection = original(state, *sizes)
        assert dtypes[-1] == torch.bfloat16
        pairs.append([set(each.indices.tolist()) for each in (selection, full.selector.select(state, *sizes))])
        assert dtypes[-1] == torch.float32
        return selection

    low.selector.select = select
    selections(model, digits(split="train"), low, batch_size=128, max_duration="3ep", seed=0, lr=0.02)
    assert dtypes[-1] == torch.float32  # The training step.
    overlap = [len(a & b) / len(b) for a, b in pairs]
    assert all(a for a, _ in pairs)
    assert len(overlap) == 36
    print(f"picks of amp_bf16 that are fp32's, mean over {len(overlap)} steps on digits: {sum(overlap) / 36:.2f}")


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_no_part_of_a_small_last_minibatch_is_a_single_sample_for_batch_normalisation(algorithm_class):
    """Three samples in microbatches of two would be one and two."""
    module = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    model = ComposerClassifier(module, num_classes=5)
    algorithm = algorithm_class(keep=0.3, **ON)
    train = loader(MLP.data(19), 16)
    make_trainer(model, train, [algorithm], max_duration="1ep", device_train_microbatch_size=2).fit()
    assert algorithm.batches_trained_whole == 0
