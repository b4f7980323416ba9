"""The algorithms that select, from the table of rules: whatever goes over them covers a new rule by its row there."""

from __future__ import annotations

import pytest

from composer_gradmatch.rules.table import RULES
from composer_gradmatch.train.registry import resolve

__all__ = ["LOOKING", "SELECTING", "WEIGHING", "factory"]


def factory(name):
    """What makes the algorithm of a YAML name."""
    return resolve("algorithm", name)


#: Factories of all algorithms that select, of those that look at samples, and of those that give weights.
SELECTING = [pytest.param(factory(name), id=name) for name in RULES]
LOOKING = [pytest.param(factory(name), id=name) for name, rule in RULES.items() if rule.needs != "nothing"]
WEIGHING = [pytest.param(factory(name), id=name) for name, rule in RULES.items() if rule.weighs]
