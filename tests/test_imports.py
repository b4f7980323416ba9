"""Imports go one way: the table of folders, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import composer_gradmatch

PACKAGE = Path(composer_gradmatch.__file__).parent
#: Each folder or module, lowest first, and what of the others it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "batches": set(),
    "spans": set(),
    "moved": set(),
    "matching": {"spans"},
    "last_layer": {"batches"},
    "registered": set(),
    "rules": {"last_layer", "matching", "registered", "spans"},
    "forward": {"batches", "spans"},
    "reuse": {"batches", "forward", "last_layer"},
    "candidates": {"batches", "forward", "last_layer", "reuse", "rules", "spans"},
    "algorithms": {"batches", "candidates", "forward", "last_layer", "matching", "rules", "spans"},
    "models": set(),
    "data": {"models"},
    "train": {"algorithms", "batches", "data", "forward", "models", "registered", "rules"},
    "studies": {"algorithms", "batches", "data", "forward", "last_layer", "registered", "rules", "spans", "train"},
    "benchmarks": {"algorithms", "candidates", "data", "forward", "last_layer", "matching", "models", "rules", "train"},
}
MAY_IMPORT = {folder: {folder, *others} for folder, others in MAY_IMPORT.items()}
MAY_IMPORT["__init__"] = {"algorithms", "batches", "last_layer", "matching", "moved", "registered", "rules"}


def folders_imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".")[1] for name in names if name.startswith("composer_gradmatch.")]
        found |= {composer_gradmatch._MODULES.get(part, part).split(".")[0] for part in parts}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_folder_imports_only_what_it_may(path):
    folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert folders_imported(path.read_text()) <= MAY_IMPORT[folder]


def test_this_test_can_fail():
    source = (
        "from composer_gradmatch.algorithms.gradmatch import GradMatch\nfrom composer_gradmatch import losses, gram_omp"
    )
    assert folders_imported(source) == {"algorithms", "losses", "matching"}
    assert not folders_imported(source) <= MAY_IMPORT["matching"]
