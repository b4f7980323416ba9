"""Names in YAML: the tables, what a row adds, and what an installed package does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from installing import install

import composer_gradmatch
from composer_gradmatch.data import DATA_SETS, SHAPES, digits
from composer_gradmatch.models import MODELS, digits_cnn
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.table import RULES
from composer_gradmatch.train import check_config, train
from composer_gradmatch.train.builders import build_named
from composer_gradmatch.train.config import ConfigError, load_config
from composer_gradmatch.train.registry import TABLES, resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_names_stand_beside_their_files():
    package = Path(composer_gradmatch.__file__).parent
    for folder, table in (("data", DATA_SETS), ("models", MODELS)):
        for name, factory in table.items():
            file = "cifar" if name.startswith("cifar") else name
            assert factory.__module__ == f"composer_gradmatch.{folder}.{file}"
            assert (package / folder / f"{file}.py").is_file()
    assert set(SHAPES) < set(DATA_SETS)


def test_a_row_is_all_that_a_model_or_a_data_set_needs(monkeypatch):
    monkeypatch.setitem(MODELS, "my_model", lambda num_classes=10, width=4: digits_cnn(num_classes, width))
    monkeypatch.setitem(DATA_SETS, "my_data", digits)
    overrides = ["model.name=my_model", "train_loader.name=my_data"]
    config = load_config(CONFIGS / "digits.yaml", [*overrides, "model.width=8"])
    check_config(config)
    assert build_named("model", config["model"]).module[0].out_channels == 8
    with pytest.raises(ConfigError, match=r"model\.widht: unknown key; did you mean 'width'"):
        check_config(load_config(CONFIGS / "digits.yaml", [*overrides, "model.widht=8"]))


THEIRS = """
def theirs(size=3):
    return size


def first(candidates, m, *, skip: int = 0):
    return range(skip, skip + m), None


def clashing(candidates, m, *, keep=0.5):
    return range(m), None
"""


@pytest.mark.parametrize(("kind", "group"), [(kind, group) for kind, (_, group) in TABLES.items() if group])
def test_a_package_adds_names_by_entry_points(kind, group, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, THEIRS, group, "theirs = their_package:theirs")
    assert resolve(kind, "theirs")() == 3
    with pytest.raises(ConfigError, match=f"unknown {kind} 'theris'; did you mean 'theirs'"):
        resolve(kind, "theris")


def test_a_package_cannot_take_a_name_of_ours(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, THEIRS, "composer_gradmatch_models", "digits_cnn = their_package:theirs")
    assert resolve("model", "digits_cnn") is digits_cnn


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_names_that_no_package_adds_to(kind, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, THEIRS, f"composer_gradmatch_{kind}s", "theirs = their_package:theirs")
    with pytest.raises(ConfigError, match=f"unknown {kind} 'theirs'"):
        resolve(kind, "theirs")


def largest(candidates, m, *, smallest: bool = False):
    return candidates.losses.topk(m, largest=not smallest).indices, None


def short(*overrides):
    shared = "{start: 0.0, end: 1.0, interrupt: 0, keep: 0.25}"
    overrides = [override.replace("SHARED", shared) for override in overrides]
    fixed = ["max_duration=2ba", "eval_loader=null", "save_folder=null", "progress_bar=false", "loggers=null"]
    return load_config(CONFIGS / "digits.yaml", [*fixed, "algorithms.gradmatch=false", *overrides])


def test_a_rules_row_is_an_algorithm_in_yaml(monkeypatch):
    with pytest.raises(ConfigError, match="unknown algorithm 'largest'"):
        check_config(short("algorithms.largest=SHARED"))
    monkeypatch.setitem(RULES, "largest", Rule(largest, needs="losses", weighs=False))
    trainer = train(short("algorithms.largest=SHARED", "algorithms.largest.smallest=true"))
    (algorithm,) = trainer.state.algorithms
    assert len(algorithm.last_selection.indices) == 32
    for wrong, message in {
        "smalest=true": "algorithms.largest.smalest: unknown key; did you mean 'smallest'",
        "smallest=3": "algorithms.largest.smallest: expected bool, got 3",
        "keep=7": "algorithms.largest: keep must be in",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            train(short("algorithms.largest=SHARED", f"algorithms.largest.{wrong}"))


def test_a_rules_entry_point_is_an_algorithm_in_yaml(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, THEIRS, "composer_gradmatch_rules", "foremost = their_package:first")
    trainer = train(short("algorithms.foremost=SHARED", "algorithms.foremost.skip=5"))
    (algorithm,) = trainer.state.algorithms
    assert algorithm.last_selection.indices.tolist() == list(range(5, 37))
    with pytest.raises(ConfigError, match="unknown algorithm 'formost'; did you mean 'foremost'"):
        check_config(short("algorithms.formost=SHARED"))


@pytest.mark.parametrize(("function", "message"), [("theirs", "is called as"), ("clashing", "an option 'keep'")])
def test_a_rule_that_is_none_is_told_with_its_entry(function, message, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, THEIRS, "composer_gradmatch_rules", f"broken = their_package:{function}")
    with pytest.raises(ConfigError, match=f"algorithms.broken: the rule 'broken' is none: .*{message}"):
        check_config(short("algorithms.broken=SHARED"))


def test_what_a_rule_cannot_return_is_told_with_its_entry(monkeypatch):
    def twice(candidates, m):
        return [0, 0], None

    monkeypatch.setitem(RULES, "twice", Rule(twice, needs="losses", weighs=False))
    with pytest.raises(ConfigError, match=r"^algorithms.twice: the run failed on its first batch: .*a sample twice"):
        train(short("algorithms.twice=SHARED"))
