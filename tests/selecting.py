"""The algorithms that select, from the table of rules: whatever goes over them covers a new rule by its row there."""

from __future__ import annotations

import inspect
from functools import partial

import pytest

from composer_gradmatch.rules.table import RULES
from composer_gradmatch.train.registry import resolve

__all__ = ["LOOKING", "SELECTING", "WEIGHING", "factory"]


def factory(name):
    """What makes the algorithm of a YAML name, so that it selects in each step."""
    made = resolve("algorithm", name)
    return partial(made, switch="always") if "switch" in inspect.signature(made).parameters else made


#: Factories of all algorithms that select, of those that look at samples, and of those that give weights.
SELECTING = [pytest.param(factory(name), id=name) for name in RULES]
LOOKING = [pytest.param(factory(name), id=name) for name, rule in RULES.items() if rule.needs != "nothing"]
WEIGHING = [pytest.param(factory(name), id=name) for name, rule in RULES.items() if rule.weighs]
