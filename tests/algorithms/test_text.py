"""HuggingFace models in a Trainer: losses, steps against explicit gradients, and bad batches."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import loader, make_trainer, record_selections
from composer import DataSpec
from composer.models import HuggingFaceModel
from oracles import brute_force_omp, clip_and_normalize, per_sample_gradients
from text_cases import CAUSAL_LM, CLASSIFICATION, MASKED_LM, TEXT_CASES, TOKENS
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop
from composer_gradmatch.forward.loss_scale import LossScale
from composer_gradmatch.forward.losses import differentiable_outputs, per_sample_losses, weighted_loss

ON = {"start": 0.0, "end": 1.0, "interrupt": 0}
M = 12
cases = pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)


def own_loss_of_each_sample(model, batch):
    """What the model itself says of each sample alone, times what its mean divides by: its part in a sum.

    Class weights make that divisor a sum of weights; the samples' own losses must be taken to the same scale.
    """
    parts = []
    for i in range(len(batch["labels"])):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        loss = model.loss(model(one), one)
        parts.append(loss * divisor(model, one["labels"]))
    return parts


def divisor(model, labels):
    """Samples or positions that count, each by its class's weight."""
    if labels.is_floating_point():
        return len(labels)
    labels = labels[:, 1:] if model.shift_labels else labels
    criterion = getattr(model.model, "criterion", None)
    counted = labels[labels != -100]
    return len(counted) if criterion is None else criterion.weight[counted].sum()


@cases
def test_unit_weights_give_the_models_own_loss_and_gradient(case):
    model, batch = case.model().train(), case.batch(M)
    outputs = model(batch)
    own = model.loss(outputs, batch)
    losses = per_sample_losses(model, outputs, batch, M)
    assert losses.shape == (M,)
    scale = LossScale().read(losses, own, differentiable_outputs(outputs))
    unit = weighted_loss(losses, torch.ones(M), own, scale)
    torch.testing.assert_close(unit, own, rtol=1e-6, atol=0)
    parameters = list(model.parameters())
    own_grads = torch.autograd.grad(own, parameters, retain_graph=True, materialize_grads=True)
    unit_grads = torch.autograd.grad(unit, parameters, materialize_grads=True)
    for unit_grad, own_grad in zip(unit_grads, own_grads, strict=True):
        torch.testing.assert_close(unit_grad, own_grad, rtol=1e-5, atol=1e-6)


@cases
def test_the_losses_are_the_models_own_of_each_sample_alone(case):
    model, batch = case.model().double(), case.batch(M)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    losses = per_sample_losses(model, model(batch), batch, M)
    alone = torch.stack(own_loss_of_each_sample(model, batch))
    # Language models take their own loss in float32.
    torch.testing.assert_close((losses / losses.sum()).double(), (alone / alone.sum()).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("case", "selection_microbatch_size", "encoding"),
    [
        *((case, size, dict) for case in TEXT_CASES for size in (None, 5)),
        *((case, None, BatchEncoding) for case in (CLASSIFICATION, CAUSAL_LM)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_step_trains_on_the_reference_picks(case, selection_microbatch_size, encoding):
    """Explicit float64 gradients of each sample's own loss, brute-force matching pursuit, and one SGD step."""
    model, batch = case.model(), case.batch(M)
    reference = copy.deepcopy(model).double().train()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    losses = own_loss_of_each_sample(reference, wide)
    if case in (CAUSAL_LM, MASKED_LM):
        gradients = head_gradients(reference, wide)
    else:
        layer = list(reference.get_submodule(case.layer).parameters())
        gradients = per_sample_gradients(lambda i: losses[i], layer, M).numpy()
    picks, weights, margins = brute_force_omp(gradients, gradients.mean(0), 4)
    assert min(margins) > 1e-4  # Float32 rounding decides nothing.
    picks, weights = clip_and_normalize(picks, weights)
    n = divisor(reference, wide["labels"][picks])
    loss = sum(w * losses[i] for w, i in zip(weights, picks, strict=True)) / n
    expected = [
        p - 0.1 * g
        for p, g in zip(
            reference.parameters(),
            torch.autograd.grad(loss, list(reference.parameters()), materialize_grads=True),
            strict=True,
        )
    ]

    algorithm = GradMatch(keep=4 / M, selection_microbatch_size=selection_microbatch_size, **ON)
    seen = record_selections(algorithm)
    data = DataLoader(
        case.data(M),
        batch_size=M,
        collate_fn=lambda rows: encoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]}),
    )
    make_trainer(model, data, [algorithm]).fit()
    ((_, selection),) = seen
    assert selection.indices.tolist() == picks.tolist()
    torch.testing.assert_close(selection.weights, torch.as_tensor(weights), rtol=1e-4, atol=1e-5)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-4, atol=1e-6)


def head_gradients(model, batch):
    """Per-sample gradients of a head that shares its weight with the embeddings: of a copy, to have its part alone."""
    model = copy.deepcopy(model)
    head = model.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    losses = own_loss_of_each_sample(model, batch)
    return per_sample_gradients(lambda i: losses[i], list(head.parameters()), M).numpy()


@pytest.mark.parametrize("algorithm_class", [GradMatch, LossBackprop, RandomBackprop])
@pytest.mark.parametrize("case", [CLASSIFICATION, CAUSAL_LM], ids=lambda case: case.name)
def test_all_strategies_train_on_dict_batches_without_keys(case, algorithm_class):
    algorithm = algorithm_class(keep=0.3, **ON)
    seen = record_selections(algorithm)
    make_trainer(case.model(), loader(case.data(20), 8), [algorithm], max_duration="1ep").fit()
    assert [len(selection.indices) for _, selection in seen] == [2, 2, 1]


def test_loss_weights_follow_tokens_when_the_trainer_counts_tokens():
    """With accumulate_train_batch_on_tokens a step on microbatches is the step on the whole batch of picks."""

    def train(size):
        model = TOKENS.model()
        spec = DataSpec(
            loader(TOKENS.data(M), M), get_num_tokens_in_batch=lambda batch: int((batch["labels"] != -100).sum())
        )
        make_trainer(
            model,
            spec,
            [GradMatch(keep=0.5, **ON)],
            device_train_microbatch_size=size,
            accumulate_train_batch_on_tokens=True,
        ).fit()
        return model

    for one, other in zip(train(M).parameters(), train(2).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def without(key):
    return lambda batch: {k: v for k, v in batch.items() if k != key}


def changed(key, function):
    return lambda batch: {**batch, key: function(batch[key])}


BAD_BATCHES = {
    "no labels": (CLASSIFICATION, without("labels"), r"keys \['attention_mask', 'input_ids'\], has no tensor 'labels'"),
    "a class too high": (
        CLASSIFICATION,
        changed("labels", lambda labels: labels + 3),
        r"batch\['labels'\] of shape \(12,\) has classes from 3 to 5; expected \[0, 3\)",
    ),
    "a token too high": (
        CAUSAL_LM,
        changed("labels", lambda labels: labels.clamp(min=0) + 30),
        r"batch\['labels'\] of shape \(12, 7\) has classes from 30 to 69; expected \[0, 40\)",
    ),
    "all masked": (TOKENS, changed("labels", lambda labels: labels * 0 - 100), r"shape \(12, 7\) masks every position"),
    "samples that disagree": (
        CLASSIFICATION,
        changed("labels", lambda labels: labels[:-1]),
        r"input_ids of shape \(12, 7\), attention_mask of shape \(12, 7\), labels of shape \(11,\)",
    ),
}


@pytest.mark.parametrize("algorithm_class", [GradMatch, LossBackprop])
@pytest.mark.parametrize(("case", "change", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_bad_batches_are_told_by_key_and_shape(algorithm_class, case, change, message):
    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield change(case.batch(M))

    spec = DataSpec(DataLoader(Batches(), batch_size=None), get_num_samples_in_batch=lambda batch: M)
    with pytest.raises(ValueError, match=message):
        make_trainer(case.model(), spec, [algorithm_class()]).fit()


def test_outputs_without_logits_are_told():
    class Hides(HuggingFaceModel):
        def forward(self, batch):
            outputs = super().forward(batch)
            return {"loss": outputs.loss, "scores": outputs.logits}

    with pytest.raises(ValueError, match=r"with the keys \['loss', 'scores'\] without 'logits' of shape \(M, C\)"):
        make_trainer(Hides(CLASSIFICATION.module()), loader(CLASSIFICATION.data(M), M), [LossBackprop()]).fit()


def test_a_loss_fn_is_asked_before_the_models_own_loss():
    asked = []

    def loss_fn(outputs, batch):
        asked.append(len(batch["labels"]))
        return torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"], reduction="none")

    model = CLASSIFICATION.model()
    make_trainer(model, loader(CLASSIFICATION.data(M), M), [GradMatch(keep=0.5, loss_fn=loss_fn, **ON)]).fit()
    assert set(asked) == {M, 8, 4, M // 2}  # Eight and twice four are for the first checks of the loss.


def test_a_models_own_unreduced_loss_is_asked_before_its_logits_are():
    class Doubles(HuggingFaceModel):
        def loss(self, outputs, batch, reduction="mean"):
            return 2 * torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"], reduction=reduction)

    model, batch = Doubles(CLASSIFICATION.module()), CLASSIFICATION.batch(M)
    outputs = model(batch)
    expected = 2 * torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"], reduction="none")
    torch.testing.assert_close(per_sample_losses(model, outputs, batch, M), expected)


def test_a_wholly_masked_sample_is_not_picked_and_a_wholly_masked_batch_is_trained_whole():
    first, second = TOKENS.batch(8, 0), TOKENS.batch(8, 1)
    first["labels"][2:6] = -100
    second["labels"][:] = -100
    spec = DataSpec([first, second], get_num_samples_in_batch=lambda batch: len(batch["labels"]))
    algorithm = GradMatch(keep=0.5, **ON)
    seen = record_selections(algorithm)
    model = TOKENS.model()
    make_trainer(model, spec, [algorithm], device_train_microbatch_size=8, max_duration="2ba").fit()
    assert set(seen[0][1].indices.tolist()) <= {0, 1, 6, 7}
    assert algorithm.batches_trained_whole == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_loss_fn_of_the_wrong_shape_is_told():
    algorithm = GradMatch(loss_fn=lambda outputs, batch: outputs["logits"])
    with pytest.raises(ValueError, match=r"loss_fn must return a tensor of shape \(12,\).*got \(12, 3\)"):
        make_trainer(CLASSIFICATION.model(), loader(CLASSIFICATION.data(M), M), [algorithm]).fit()
