"""Imports go one way: the table of rooms, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import composer_gradmatch

PACKAGE = Path(composer_gradmatch.__file__).parent
ALGORITHMS = {"gradmatch", "loss_backprop", "random_backprop"}
#: What the studies measure the parts of.
MEASURED = {"batches", "gradmatch", "last_layer", "selection_pass", "spans"}
MAY_IMPORT: dict[str, set[str]] = {
    "matching": set(),
    "batches": set(),
    "last_layer": set(),
    "losses": set(),
    "config": set(),
    "selection_pass": {"batches"},
    "run_summary": {"batches"},
    "spans": set(),
    "subset_backprop": {"batches", "losses", "selection_pass", "spans"},
    "passes": {"subset_backprop"},
    "gradmatch": {"batches", "last_layer", "losses", "matching", "selection_pass", "spans", "subset_backprop"},
    "loss_backprop": {"losses", "selection_pass", "subset_backprop"},
    "random_backprop": {"losses", "selection_pass", "subset_backprop"},
    "pretrained": set(),
    "data": {"data", "pretrained"},
    "models": {"models", "pretrained"},
    "builders": {"config", "data", "models", *ALGORITHMS},
    "train": {"builders", "config", "passes", "run_summary"},
    "studies": {"studies", "train", "builders", "config", "data", "run_summary", *MEASURED},
    "__init__": {"matching", "last_layer", "passes", *ALGORITHMS},
}


def rooms_imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("composer_gradmatch.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_room_imports_only_what_it_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert rooms_imported(path.read_text()) <= MAY_IMPORT[room]


def test_this_test_can_fail():
    source = "from composer_gradmatch.gradmatch import GradMatch\nfrom composer_gradmatch import losses"
    assert rooms_imported(source) == {"gradmatch", "losses"}
    assert not rooms_imported(source) <= MAY_IMPORT["matching"]
