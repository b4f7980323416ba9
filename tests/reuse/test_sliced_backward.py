"""The sliced backward pass against autograd's own, on models that lay their activations out in all sorts of ways."""

from __future__ import annotations

import copy

import pytest
import torch
from layout_models import CLASSES, MODELS, ROWS, M, assert_close, built, weighted
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.verify import check_outputs, picks_normalised_by_all


@pytest.mark.parametrize("name", MODELS)
def test_the_sliced_gradient_is_autograds_of_the_picks(name):
    """The same masks of dropout; under batch normalisation, the documented formula."""
    model, inputs, targets = built(name)
    own = copy.deepcopy(model)
    forward = CapturedForward(lambda batch: model(batch[0]))
    torch.manual_seed(1)
    captured = forward((inputs, targets), M)
    assert captured.read == [True, False]
    found = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
    torch.manual_seed(1)
    with picks_normalised_by_all(ROWS):
        outputs = own(inputs)
    expected = torch.autograd.grad(weighted(outputs[ROWS], targets[ROWS]), list(own.parameters()))
    check_outputs([captured.outputs], [outputs])
    assert_close(found, expected, 1e-2 if name.startswith("bf16") else 2e-5)


@pytest.mark.parametrize("name", ["ResNet-18, BatchNorm", "BatchNorm and dropout"])
def test_batch_normalisation_keeps_its_statistics_of_all_samples(name):
    model, inputs, targets = built(name)
    own = copy.deepcopy(model)
    torch.manual_seed(1)
    CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M)
    torch.manual_seed(1)
    own(inputs)
    changed = False
    for (key, found), before, expected in zip(
        model.named_buffers(), built(name)[0].buffers(), own.buffers(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=key)
        changed |= not torch.equal(found, before)
    assert changed


def test_a_tensor_that_is_returned_twice_is_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, CLASSES)

        def forward(self, inputs):
            outputs = self.head(inputs)
            return {"logits": outputs, "again": outputs, "half": outputs / 2}

    model, inputs, targets = Twice(), torch.randn(M, 12), torch.randint(CLASSES, (M,))
    rows = CapturedForward(model)(inputs, M).rows(ROWS)
    for keys in (["logits"], ["again"], ["logits", "again", "half"]):
        found = torch.autograd.grad(
            weighted(sum(rows[key] for key in keys), targets[ROWS]), list(model.parameters()), retain_graph=True
        )
        outputs = model(inputs[ROWS])
        expected = torch.autograd.grad(
            weighted(sum(outputs[key] for key in keys), targets[ROWS]), list(model.parameters())
        )
        assert_close(found, expected)


def test_parameters_that_a_loss_does_not_reach_have_no_gradient():
    """None, as without us: an optimiser that decays weights would move them by a gradient of zero."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aside = nn.Linear(12, 8), nn.Linear(8, CLASSES), nn.Linear(8, 2)

        def forward(self, inputs):
            hidden = self.body(inputs).tanh()
            return self.head(hidden), self.aside(hidden)

    model, inputs, targets = Auxiliary(), torch.randn(M, 12), torch.randint(CLASSES, (M,))
    captured = CapturedForward(model)(inputs, M)
    for loss in (lambda out: weighted(out[0], targets[ROWS]), lambda out: out[1].square().sum()):
        found, expected = [], []
        for gradients, outputs in ((found, captured.rows(ROWS)), (expected, model(inputs[ROWS]))):
            gradients += torch.autograd.grad(loss(outputs), list(model.parameters()), allow_unused=True)
        assert [each is None for each in found] == [each is None for each in expected]
        assert sum(each is None for each in found) == 2
        assert_close(*([each for each in g if each is not None] for g in (found, expected)))


SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1}


LANGUAGE_MODELS = {
    # Its token ids and its mask are never compared, and so have a number of samples each.
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, num_attention_heads=2)),
    # Its backward pass views tensors that are laid out in another order of dimensions.
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_causal_language_models(name):
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[name]()
    batch = {"input_ids": torch.randint(30, (M, 7)), "attention_mask": torch.ones(M, 7, dtype=torch.int64)}
    picked = {key: value[ROWS] for key, value in batch.items()}
    captured = CapturedForward(lambda batch: model(**batch).logits)(batch, M)
    found, expected = (
        torch.autograd.grad(outputs.square().mean(), list(model.parameters()))
        for outputs in (captured.rows(ROWS), model(**picked).logits)
    )
    assert_close(found, expected)


def test_what_only_works_on_each_sample_is_not_taken_for_mixing():
    """Indices of the samples, statistics of each, batch statistics that only a buffer holds."""

    class Innocent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.InstanceNorm1d(3), nn.Linear(12, CLASSES)
            self.register_buffer("level", torch.zeros(()))

        def forward(self, inputs):
            hidden = self.norm(inputs.unflatten(1, (3, 4))).flatten(1)
            self.level.mul_(0.9).add_(inputs.mean(), alpha=0.1)
            last = hidden[torch.arange(len(hidden)), inputs.argmax(1)]
            return self.head(hidden) * last[:, None]

    model, inputs, targets = Innocent(), torch.randn(M, 12), torch.randint(CLASSES, (M,))
    captured = CapturedForward(model)(inputs, M)
    found = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
    expected = torch.autograd.grad(weighted(model(inputs[ROWS]), targets[ROWS]), list(model.parameters()))
    assert_close(found, expected)
