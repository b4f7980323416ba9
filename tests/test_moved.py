"""Modules of version 0.1.0 by their old names."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from composer_gradmatch.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_what_an_old_name_stands_for_is_there(old):
    for module in MOVED[old]:
        assert import_module(f"composer_gradmatch.{module}").__name__ == f"composer_gradmatch.{module}"


def test_imports_by_old_names_give_the_same_objects_and_say_where_they_are():
    source = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from composer_gradmatch.builders import build_algorithms, check_entries, resolve
    from composer_gradmatch.config import ConfigError, load_config
    from composer_gradmatch.gradmatch import GradMatch, select_using_gradient_matching
    from composer_gradmatch.solvers.problem import Problem
    from composer_gradmatch.subset_backprop import WholeBatch
said = [str(each.message) for each in caught if issubclass(each.category, DeprecationWarning)]
assert any("composer_gradmatch.config has moved to composer_gradmatch.train.config" in each for each in said), said
import composer_gradmatch, composer_gradmatch.train.config, composer_gradmatch.matching.problem
assert ConfigError is composer_gradmatch.train.config.ConfigError
assert GradMatch is composer_gradmatch.GradMatch
assert Problem is composer_gradmatch.matching.problem.Problem
try:
    from composer_gradmatch.config import nonsense
except ImportError:
    print("well")
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "well\n", done.stderr
