"""Names in YAML: the tables, what a row adds, and what an installed package does."""

from __future__ import annotations

from pathlib import Path

import pytest

import composer_gradmatch
from composer_gradmatch.data import DATA_SETS, SHAPES, digits
from composer_gradmatch.models import MODELS, digits_cnn
from composer_gradmatch.train import check_config
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


def install(folder, monkeypatch, group, line):
    """Puts a package with an entry point on the path, as an installer does."""
    (folder / "their_package.py").write_text("def theirs(size=3):\n    return size\n")
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(("kind", "group"), [(kind, group) for kind, (_, group) in TABLES.items() if group])
def test_a_package_adds_names_by_entry_points(kind, group, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, group, "theirs = their_package:theirs")
    assert resolve(kind, "theirs")() == 3
    with pytest.raises(ConfigError, match=f"unknown {kind} 'theris'; did you mean 'theirs'"):
        resolve(kind, "theris")


def test_a_package_cannot_take_a_name_of_ours(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "composer_gradmatch_models", "digits_cnn = their_package:theirs")
    assert resolve("model", "digits_cnn") is digits_cnn


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_names_that_no_package_adds_to(kind, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, f"composer_gradmatch_{kind}s", "theirs = their_package:theirs")
    with pytest.raises(ConfigError, match=f"unknown {kind} 'theirs'"):
        resolve(kind, "theirs")
