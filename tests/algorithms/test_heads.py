"""Heads that are no ``nn.Linear`` pick and train as the same model with one, in all ways of looking."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import On, loader, make_trainer, record_selections
from composer.core import Event
from composer.models import ComposerModel
from head_models import LENGTH, VOCABULARY, WIDTH, Causal, Segmentation, SharedEmbedding
from one_pass import assert_same_parameters, single_pass_of
from torch import nn
from torch.utils.data import TensorDataset

from composer_gradmatch import GradMatch, ImportanceBackprop, RuleBackprop, number_samples, select_first

ON = {"start": 0.0, "end": 1.0, "interrupt": 0, "keep": 0.4}
N, M = 40, 20
BATCH = torch.arange(4 * LENGTH).reshape(4, LENGTH) % VOCABULARY


class Shared(nn.Module):
    """MPT's head, and the same as an ``nn.Linear`` with the embedding's weight."""

    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.body = SharedEmbedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        if linear:
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        hidden = torch.tanh(self.body(self.wte(tokens)))
        return self.head(hidden) if hasattr(self, "head") else self.wte(hidden, unembed=True)


class Multiplied(nn.Module):
    """A classifier whose head is a product and a sum, or an ``nn.Linear``; one row for each sample."""

    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(0)
        self.body, head = nn.Linear(LENGTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        if linear:
            self.head = head
        else:
            self.out, self.offset = nn.Parameter(head.weight.detach().clone()), nn.Parameter(head.bias.detach().clone())

    def forward(self, tokens):
        hidden = torch.tanh(self.body(tokens.float() / VOCABULARY))
        return self.head(hidden) if hasattr(self, "head") else torch.einsum("bd,cd->bc", hidden, self.out) + self.offset


class Pixels(nn.Module):
    """A convolution, or the same as an ``nn.Linear`` on pixels."""

    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv1d(1, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, VOCABULARY, 1)
        if linear:
            conv, self.head = self.head, nn.Linear(WIDTH, VOCABULARY)
            self.head.weight, self.head.bias = nn.Parameter(conv.weight.detach().flatten(1)), conv.bias
        self.linear = linear

    def forward(self, tokens):
        hidden = torch.tanh(self.body(tokens[:, None].float() / VOCABULARY))
        return self.head(hidden.transpose(1, 2)) if self.linear else self.head(hidden)


class Model(ComposerModel):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module(batch[0])

    def loss(self, outputs, batch, reduction="mean"):
        if outputs.dim() == 2:
            return F.cross_entropy(outputs, batch[1][:, 0], reduction=reduction)
        if outputs.shape[1] != VOCABULARY:
            outputs = outputs.transpose(1, 2)
        return F.cross_entropy(outputs, batch[1], reduction=reduction)


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randint(VOCABULARY, (N, LENGTH), generator=generator) for _ in range(2)))


def train(module, algorithm, numbered=False, **kwargs):
    """Trains for some steps; returns the model, the picks and the warnings."""
    model, dataset, seen = Model(module), data(), record_selections(algorithm)
    train = loader(dataset, M)
    if numbered:
        dataset = number_samples(dataset)
        train = torch.utils.data.DataLoader(dataset, M, collate_fn=dataset.collate_fn)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_trainer(
            model, train, [algorithm], algorithm_passes=[select_first], **{"max_duration": "2ep", **kwargs}
        ).fit()
    return model, [each.indices.tolist() for _, each in seen], [str(each.message) for each in said]


WAYS = {
    "two passes": (GradMatch, {}),
    "microbatches": (GradMatch, {"selection_microbatch_size": 7}),
    "autocast": (GradMatch, {"selection_precision": "amp_bf16"}),
    "one pass": (GradMatch, {"reuse_activations": True}),
    "importance": (ImportanceBackprop, {}),
    "a rule": (RuleBackprop, {"rule": "grand"}),
}


@pytest.mark.parametrize("module", [Shared, Multiplied, Pixels])
@pytest.mark.parametrize(("algorithm", "options"), WAYS.values(), ids=WAYS.keys())
def test_what_is_picked_and_trained_is_what_an_nn_linear_picks_and_trains(module, algorithm, options):
    runs = []
    for linear in (False, True):
        made = algorithm(**ON, **options)
        runs.append(train(module(linear), made))
        assert (single_pass_of(made) is not None) == ("reuse_activations" in options)
    (model, picks, said), (twin, right, _) = runs
    assert len(picks) == 4
    assert picks == right
    values = [torch.cat([each.detach().flatten() for each in one.parameters()]) for one in (model, twin)]
    assert abs(values[0].norm() - values[1].norm()) <= 1e-5 * values[1].norm()
    assert not any("GradMatch" in each for each in said)


def test_stored_looks_compute_what_they_keep_again():
    runs = []
    for linear in (False, True):
        algorithm = GradMatch(**ON, refresh="2ep")
        runs.append(train(Multiplied(linear), algorithm, numbered=True, max_duration="4ep"))
        assert algorithm.selector.source.kept.computes
        assert algorithm.selector.source.store.inputs.shape == (N, WIDTH)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("module", [Shared, Pixels])
def test_stored_looks_refuse_positions(module):
    with pytest.raises(ValueError, match="keeps one row for each sample, but the output layer of GradMatch runs at"):
        train(module(False), GradMatch(**ON, refresh="2ep"), numbered=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Shared, "module.wte"),
        (Shared, "module.wte.weight"),
        (Multiplied, "module.out"),
        (Pixels, "module.head"),
        (Shared, lambda module: module.wte),
    ],
)
def test_a_head_can_be_named(module, name):
    modules = module(False), module(False)
    named = GradMatch(**ON, output_layer=name(modules[0]) if callable(name) else name)
    model, picks, _ = train(modules[0], named)
    twin, right, _ = train(modules[1], GradMatch(**ON))
    assert picks == right
    assert_same_parameters(model, twin, 0.0)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (Segmentation(nn.Conv2d(WIDTH, 3, 3)), "module.head", r"a Conv2d \(its kernel is 3×3\)"),
        (Multiplied(False), "module.offset", "'module.offset' must be an nn.Linear"),
        (Shared(False), "module.head", "'module.head' is not a module"),
    ],
)
def test_a_name_of_what_can_be_no_output_layer_is_refused_as_the_trainer_is_made(module, name, message):
    algorithm = GradMatch(**ON, output_layer=name)
    with pytest.raises(ValueError, match=message):
        make_trainer(Model(module), loader(data(), M), [algorithm])


def test_a_named_embedding_that_is_no_head_is_refused_on_the_first_batch():
    module = Shared(True)
    module.head.weight = nn.Parameter(module.wte.weight.detach().clone())
    with pytest.raises(ValueError, match=r"module\.wte' is a SharedEmbedding, of whose weight, as it is, no matrix"):
        train(module, GradMatch(**ON, output_layer="module.wte"))


def test_where_dynamo_does_not_show_a_product_two_passes_are_made():
    runs = []
    for reuse in (True, False):
        torch.manual_seed(0)
        runs.append(
            train(Causal(lambda h, m: h @ m.weight.T), GradMatch(**ON, reuse_activations=reuse), max_duration="1ep")
        )
    assert runs[0][1] == runs[1][1]
    (said,) = [each for each in runs[0][2] if "two forward passes are made" in each]
    assert "seen 0 times in a captured forward pass" in said


def test_a_product_whose_modules_are_replaced_is_found_again():
    module = Shared(False)

    def replace(state):
        if int(state.timestamp.batch) == 1:
            new = SharedEmbedding(VOCABULARY, WIDTH)
            new.weight = module.wte.weight
            module.wte = new

    algorithm = GradMatch(**ON)
    seen = record_selections(algorithm)
    make_trainer(
        Model(module), loader(data(), M), [On(Event.BATCH_START, replace), algorithm], max_duration="2ba"
    ).fit()
    assert len(seen) == 2
