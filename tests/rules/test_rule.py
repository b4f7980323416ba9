"""The record of a rule."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import Counting
from selecting import REPRESENTATIVES, kinds_of

import composer_gradmatch
from composer_gradmatch import Candidates, Rule
from composer_gradmatch.rules import table
from composer_gradmatch.rules.table import RULES, all_rules, rule_named


def first(candidates, m, *, skip=0):
    return torch.arange(skip, m + skip), None


def test_a_functions_name_and_options_are_the_rules():
    rule = Rule(first)
    assert (rule.name, rule.needs, rule.weighs) == ("first", "gradients", True)
    assert list(rule.options) == ["skip"]
    assert rule.with_options({"skip": 2}).function(Candidates(9), 3)[0].tolist() == [2, 3, 4]
    assert rule.with_options({}) == rule
    assert Rule(partial(first, skip=1)).name == "first"


def test_a_class_is_made_an_object_with_its_options_each_time():
    rule = Rule(Counting)
    one, other = rule.with_options({"offset": 3}).function, rule.with_options({"offset": 3}).function
    assert one is not other
    assert one(Candidates(9), 1)[0].tolist() == [4]
    assert other.at == 3


def test_an_unknown_option_is_told_with_those_there_are():
    with pytest.raises(TypeError, match="'first' has no option 'jump'; it has: skip"):
        Rule(first).with_options({"jump": 1})


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda candidates: None,
        lambda candidates, m, more: None,
        lambda candidates, m, *, more: None,
        type("Deaf", (), {}),
        type("Wants", (), {"__init__": lambda self, x: None, "__call__": lambda self, candidates, m: None}),
    ],
)
def test_what_cannot_be_called_as_a_rule_is_refused(function):
    with pytest.raises(TypeError, match=r"called as rule\(candidates, m\)|must be a function"):
        Rule(function, name="mine")


def test_no_function_and_unknown_needs_are_refused():
    with pytest.raises(TypeError, match="must be a function"):
        Rule("first")
    with pytest.raises(ValueError, match="needs must be"):
        Rule(first, needs="everything")


@pytest.mark.parametrize(
    ("needs", "reuse", "passes"), [("nothing", False, 0), ("losses", False, 2), ("losses", True, 1)]
)
def test_the_passes_follow_from_what_it_needs(needs, reuse, passes):
    assert Rule(first, needs=needs).passes(reuse) == passes


def test_the_table_has_each_rule_under_its_own_name():
    assert list(RULES) == [rule.name for rule in RULES.values()]
    assert {"gradmatch", "loss_backprop", "random_backprop"} <= set(RULES)


def test_one_rule_of_each_kind_stands_for_the_others_and_no_more():
    kinds = set().union(*map(kinds_of, RULES.values()))
    assert set().union(*(kinds_of(RULES[name]) for name in REPRESENTATIVES)) == kinds
    assert len(REPRESENTATIVES) <= len(kinds)
    assert {"gradmatch", "loss_backprop", "random_backprop"} <= REPRESENTATIVES < RULES.keys()


def test_the_readme_tells_each_rule_as_its_record_does():
    text = (Path(composer_gradmatch.__file__).parent / "rules" / "README.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (nothing|losses|gradients) \| (yes|no) \|", text, re.MULTILINE)
    assert told == [(name, rule.needs, "yes" if rule.weighs else "no") for name, rule in RULES.items()]
    options = re.findall(r"^\| `(\w+)` \| [^|]+ \| `(\w+)` \|", text[text.index("## Options") :], re.MULTILINE)
    assert sorted(options) == sorted((option, name) for name, rule in RULES.items() for option in rule.options)


class Point:
    def __init__(self, name, rule):
        self.name, self.rule, self.value = name, rule, f"package:{name}"

    def load(self):
        if isinstance(self.rule, Exception):
            raise self.rule
        return self.rule


def test_installed_packages_add_rules_but_take_no_name_of_ours(monkeypatch):
    points = [Point("theirs", first), Point("record", Rule(first, needs="losses")), Point("gradmatch", first)]
    monkeypatch.setattr(table, "entry_points", lambda group: points if group == "composer_gradmatch_rules" else [])
    rules = all_rules()
    assert list(rules) == [*RULES, "record", "theirs"]
    assert rules["gradmatch"] is RULES["gradmatch"]
    assert (rules["record"].name, rules["record"].needs) == ("record", "losses")
    assert rule_named("theirs").function is first
    with pytest.raises(ValueError, match=r"no rule 'their'; perhaps 'theirs'"):
        rule_named("their")


@pytest.mark.parametrize("broken", [ImportError("no module named theirs"), 3, len], ids=["import", "number", "len"])
def test_a_rule_of_a_broken_package_is_told_and_stops_nothing_else(broken, monkeypatch):
    points = [Point("broken", broken), Point("theirs", first)]
    monkeypatch.setattr(table, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match=r"'broken' of an installed package \(package:broken\) cannot be used"):
        assert list(all_rules()) == [*RULES, "theirs"]
    with pytest.raises(ValueError, match="'broken' of an installed package"):
        rule_named("broken")
    assert rule_named("theirs").function is first
