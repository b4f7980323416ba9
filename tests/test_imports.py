"""Imports go one way: the table of rooms, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import composer_gradmatch

PACKAGE = Path(composer_gradmatch.__file__).parent
ALGORITHMS = {"gradmatch", "loss_backprop", "random_backprop"}
#: What a selecting forward pass takes.
SUBSET = {"batches", "schedule", "selection", "selection_pass", "spans"}
TWO_PASS = {"losses", "reuse", "sample_checks", "subset_backprop", *SUBSET}
#: What the studies measure the parts of.
MEASURED = {"batches", "gradmatch", "last_layer", "selection_pass", "spans"}
MAY_IMPORT: dict[str, set[str]] = {
    "matching": {"solvers"},
    "solvers": {"solvers"},
    "nests": set(),
    "sample_leaves": {"nests"},
    "row_codes": {"nests"},
    "picked_rows": {"nests", "row_codes", "sample_leaves"},
    "batches": {"nests", "picked_rows", "sample_leaves"},
    "position_gram": set(),
    "last_layer": {"position_gram"},
    "layer_gradients": {"last_layer", "position_gram"},
    "output_layer": {"batches", "last_layer"},
    "huggingface_losses": set(),
    "loss_scale": set(),
    "losses": {"batches", "huggingface_losses", "loss_scale"},
    "config": set(),
    "traces": set(),
    "selection_pass": {"batches", "traces"},
    "selection": set(),
    "schedule": set(),
    "sample_checks": set(),
    "given_batch": {"batches", "nests"},
    "enough_samples": {"selection"},
    "other_algorithms": set(),
    "run_summary": {"batches"},
    "spans": set(),
    "reuse": {"batches", "huggingface_losses", "losses", "nests", "sample_leaves", "reuse", "selection_pass", "traces"},
    "match": {"matching", "solvers", "spans"},
    "subset_backprop": {"enough_samples", "nests", "other_algorithms", "picked_rows", "sample_leaves", *SUBSET},
    "two_pass_backprop": {"given_batch", "huggingface_losses", "loss_scale", "subset_backprop", "traces", *TWO_PASS},
    "passes": {"subset_backprop"},
    "gradmatch": {"layer_gradients", "last_layer", "match", "matching", "output_layer", "two_pass_backprop", *TWO_PASS},
    "loss_backprop": {"two_pass_backprop", *TWO_PASS},
    "random_backprop": {"subset_backprop"},
    "pretrained": set(),
    "data": {"data", "pretrained"},
    "models": {"models", "pretrained"},
    "refusals": {"config"},
    "value_rules": {"config"},
    "builders": {"config", "data", "models", "refusals", "value_rules", *ALGORITHMS},
    "schema": {"builders", "config", "refusals", "value_rules"},
    "setting_up": {"builders", "config", "refusals"},
    "train": {"builders", "config", "passes", "refusals", "run_summary", "schema", "setting_up"},
    "studies": {"studies", "train", "builders", "config", "data", "run_summary", *MEASURED},
    "benchmarks": {
        "benchmarks",
        "builders",
        "data",
        "models",
        "last_layer",
        "match",
        "solvers",
        *composer_gradmatch.__all__,
    },
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
