"""Every shipped YAML trains two batches, on tiny files in its data set's real format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_data import write_cifar, write_imagenet32, write_svhn
from torchvision import datasets

from composer_gradmatch import GradMatch
from composer_gradmatch.builders import build_named
from composer_gradmatch.config import ConfigError, load_config
from composer_gradmatch.train import build_trainer, check_config, train

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
WRITERS = {
    "cifar10": lambda root, patch: write_cifar(root, datasets.CIFAR10, patch),
    "cifar100": lambda root, patch: write_cifar(root, datasets.CIFAR100, patch),
    "svhn": write_svhn,
    "imagenet32": lambda root, patch: write_imagenet32(root),
}


def tiny(path, tmp_path, *overrides):
    config = load_config(path, [f"save_folder={tmp_path}/runs", "max_duration=2ba", "progress_bar=false", *overrides])
    config["global_train_batch_size"] = 8
    config["eval_subset_num_batches"] = 1
    for loader in (config["train_loader"], config["eval_loader"]):
        if "num_workers" in loader:
            loader |= {"num_workers": 0, "persistent_workers": False}
        if "root" in loader["dataset"]:
            loader["dataset"]["root"] = str(tmp_path / "data")
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_batches_train(path, tmp_path, monkeypatch):
    config = tiny(path, tmp_path)
    if (data_set := config["train_loader"]["name"]) in WRITERS:
        (tmp_path / "data").mkdir()
        WRITERS[data_set](tmp_path / "data", monkeypatch)
    torch.manual_seed(config["seed"])
    trainer = train(config)
    assert int(trainer.state.timestamp.batch) == 2
    (algorithm,) = (a for a in trainer.state.algorithms if isinstance(a, GradMatch))
    assert algorithm.batches_trained_whole == 0
    fresh = build_named("model", config["model"])
    assert any(
        not torch.equal(a.cpu(), b) for a, b in zip(trainer.state.model.parameters(), fresh.parameters(), strict=True)
    )


@pytest.mark.parametrize("path", [path for path in CONFIGS if "_" in path.stem], ids=lambda path: path.stem)
def test_missing_data_are_an_error_of_the_config(path, tmp_path):
    with pytest.raises(ConfigError, match=r"train_loader: .*dataset\.root"):
        build_trainer(tiny(path, tmp_path))


def paper(epochs, lr, model, scheduler, **optimizer):
    optimizer = {"name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 5e-4, **optimizer}
    return {"max_duration": f"{epochs}ep", "model": model, "scheduler": scheduler, "optimizer": optimizer}


def steps(*epochs):
    return {"name": "multistep", "milestones": [f"{epoch}ep" for epoch in epochs], "gamma": 0.2}


def wrn(depth, width, classes):
    return {"name": "wide_resnet", "depth": depth, "width": width, "num_classes": classes}


RESNET = {"name": "resnet18_cifar"}
CIFAR_STEPS, IMAGENET_STEPS = steps(60, 120, 160), steps(10, 20, 30)
PAPER = {
    "cifar10_resnet18": paper(200, 0.1, {**RESNET, "num_classes": 10}, CIFAR_STEPS, nesterov=True),
    "cifar100_resnet18": paper(200, 0.1, {**RESNET, "num_classes": 100}, CIFAR_STEPS, nesterov=True),
    "svhn_wrn16_4": paper(80, 0.01, wrn(16, 4, 10), {"name": "cosine", "alpha_f": 0.0}, nesterov=True),
    "imagenet32_wrn28_2": paper(40, 0.01, wrn(28, 2, 1000), IMAGENET_STEPS, nesterov=False),
}


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_the_papers_settings_are_in_their_yaml(name, expected):
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config(path)
    check_config(config)
    assert {key: config[key] for key in expected} == expected
    assert config["global_train_batch_size"] == 128
