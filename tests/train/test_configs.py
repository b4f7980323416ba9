"""Every shipped YAML trains two batches, on tiny files in its data set's real format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from selecting import param
from tiny_data import write_bert, write_cifar, write_imagenet32, write_imdb, write_svhn
from torchvision import datasets

from composer_gradmatch import GradMatch, RuleBackprop
from composer_gradmatch.rules.table import RULES
from composer_gradmatch.train import build_trainer, check_config, train
from composer_gradmatch.train.builders import build_named
from composer_gradmatch.train.config import ConfigError, load_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
WRITERS = {
    "cifar10": lambda root, patch: write_cifar(root, datasets.CIFAR10, patch),
    "cifar100": lambda root, patch: write_cifar(root, datasets.CIFAR100, patch),
    "svhn": write_svhn,
    "imagenet32": lambda root, patch: write_imagenet32(root),
    "imdb": lambda root, patch: write_imdb(root),
}
TEXT = [path for path in CONFIGS if path.stem.startswith("imdb_")]
KEEP = "{start: 0.0, end: 1.0, keep: 0.3, interrupt: 0, input_key: input_ids, target_key: labels}"


def tiny(path, tmp_path, *overrides):
    if path.stem == "imdb_bert":
        # In the place of bert-base-uncased: of the same architecture, but here.
        overrides = (f"variables.pretrained={write_bert(tmp_path / 'bert')}", *overrides)
    config = load_config(path, [f"save_folder={tmp_path}/runs", "max_duration=2ba", "progress_bar=false", *overrides])
    config["global_train_batch_size"] = 8
    config["eval_subset_num_batches"] = 1
    for loader in (config["train_loader"], config["eval_loader"]):
        if "num_workers" in loader:
            loader |= {"num_workers": 0, "persistent_workers": False}
        if "root" in loader["dataset"]:
            loader["dataset"]["root"] = str(tmp_path / "data")
    return config


def write_data(config, tmp_path, monkeypatch):
    if (data_set := config["train_loader"]["name"]) in WRITERS:
        (tmp_path / "data").mkdir()
        WRITERS[data_set](tmp_path / "data", monkeypatch)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_batches_train(path, tmp_path, monkeypatch):
    config = tiny(path, tmp_path)
    write_data(config, tmp_path, monkeypatch)
    torch.manual_seed(config["seed"])
    trainer = train(config)
    assert int(trainer.state.timestamp.batch) == 2
    (algorithm,) = (a for a in trainer.state.algorithms if isinstance(a, GradMatch))
    assert algorithm.batches_trained_whole == 0
    fresh = build_named("model", config["model"])
    assert any(
        not torch.equal(a.cpu(), b) for a, b in zip(trainer.state.model.parameters(), fresh.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", [param(name, name) for name in RULES])
def test_each_rule_is_a_key_away(name, tmp_path):
    (path,) = (path for path in CONFIGS if path.stem == "digits")
    always = ", switch: always" if "switch" in RULES[name].options else ""
    toggle = f"algorithms.{name}={{start: 0.0, end: 1.0, keep: 0.5, interrupt: 0{always}}}"
    config = tiny(path, tmp_path, "algorithms.gradmatch=false", toggle)
    trainer = train(config)
    assert int(trainer.state.timestamp.batch) == 2
    (algorithm,) = (each for each in trainer.state.algorithms if isinstance(each, RuleBackprop))
    assert algorithm.rule.name == name
    assert 1 <= len(algorithm.last_selection.indices) <= 4


@pytest.mark.parametrize("path", TEXT, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("toggle", "fraction"), [((), 1.0), ((f"algorithms.random_backprop={KEEP}",), 0.25)], ids=["full", "random"]
)
def test_texts_train_on_everything_and_on_random_picks(toggle, fraction, path, tmp_path, monkeypatch, capfd):
    config = tiny(path, tmp_path, "algorithms.gradmatch=false", *toggle)
    write_data(config, tmp_path, monkeypatch)
    trainer = train(config)
    assert int(trainer.state.timestamp.sample) == 16
    backpropagated = next(line for line in capfd.readouterr().out.splitlines() if "backpropagated" in line)
    assert backpropagated.split()[2] == str(int(16 * fraction))
    assert 0 <= float(trainer.state.eval_metrics["eval"]["MulticlassAccuracy"].compute()) <= 1


def test_a_checkpoint_that_cannot_be_had_is_an_error_of_the_config(tmp_path, monkeypatch):
    (path,) = (path for path in CONFIGS if path.stem == "imdb_bert")
    config = tiny(path, tmp_path)
    write_data(config, tmp_path, monkeypatch)
    config["model"]["pretrained"] = "bert-base-uncased"
    with pytest.raises(ConfigError, match=r"model bert: .*'bert-base-uncased'.*pass the path of a local copy"):
        build_trainer(config)


ON_DISK = [path for path in CONFIGS if "root" in load_config(path)["train_loader"]["dataset"]]


@pytest.mark.parametrize("path", ON_DISK, ids=lambda path: path.stem)
def test_missing_data_are_an_error_of_the_config(path, tmp_path):
    with pytest.raises(ConfigError, match=r"train_loader: .*dataset\.root"):
        build_trainer(tiny(path, tmp_path))


def paper(epochs, lr, model, scheduler, **optimizer):
    optimizer = {"name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 5e-4, **optimizer}
    sections = {"model": model, "scheduler": scheduler, "optimizer": optimizer}
    return {"max_duration": f"{epochs}ep", "global_train_batch_size": 128, **sections}


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
    "imdb_bert": {
        "max_duration": "3ep",
        "global_train_batch_size": 32,
        "model": {"name": "bert", "pretrained": "bert-base-uncased", "num_labels": 2},
        "scheduler": {"name": "constant"},
        "optimizer": {"name": "adamw", "lr": 2e-5, "weight_decay": 5e-4},
    },
}


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_the_papers_settings_are_in_their_yaml(name, expected):
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config(path)
    check_config(config)
    assert {key: config[key] for key in expected} == expected
