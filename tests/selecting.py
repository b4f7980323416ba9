"""The algorithms that select, from the table of rules: whatever goes over them covers a new rule by its row there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.table import RULES
from composer_gradmatch.train.registry import resolve

__all__ = ["LOOKING", "REPRESENTATIVES", "SELECTING", "WEIGHING", "factory", "kinds_of", "param"]


def factory(name):
    """What makes the algorithm of a YAML name, so that it selects in each step."""
    made = resolve("algorithm", name)
    return partial(made, switch="always") if "switch" in inspect.signature(made).parameters else made


def kinds_of(rule: Rule) -> set[tuple]:
    """What a rule asks of the code around it; one that remembers something asks what one does that does not, too."""
    kind = rule.needs, rule.weighs
    if kind == ("losses", True):
        # It looks as one without weights does, and has its losses weighted as one that looks at nothing does.
        return kinds_of(replace(rule, weighs=False)) | kinds_of(replace(rule, needs="nothing"))
    return {kind, (*kind, "remembers")} if hasattr(rule.function, "state_dict") else {kind}


def _representatives() -> Iterator[str]:
    shown: set[tuple] = set()
    for name, rule in RULES.items():
        if not kinds_of(rule) <= shown:
            yield name
        shown |= kinds_of(rule)


#: The rules that are the first of their kind. Others ask nothing more of the code around them: they run by ``-m slow``.
REPRESENTATIVES = frozenset(_representatives())


def param(name, *values):
    """A test's parameters for a rule, slow if another one stands for its kind."""
    return pytest.param(*values, id=name, marks=[] if name in REPRESENTATIVES else pytest.mark.slow)


#: Factories of all algorithms that select, of those that look at samples, and of those that give weights.
SELECTING = [param(name, factory(name)) for name in RULES]
LOOKING = [param(name, factory(name)) for name, rule in RULES.items() if rule.needs != "nothing"]
WEIGHING = [param(name, factory(name)) for name, rule in RULES.items() if rule.weighs]
