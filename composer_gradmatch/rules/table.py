"""The rules by their names, those of installed packages included."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from composer_gradmatch.rules.gradient_matching import gradient_matching
from composer_gradmatch.rules.loss_percentiles import LossPercentiles
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.uniform import uniform

__all__ = ["GROUP", "RULES", "all_rules", "rule_named"]

#: The entry points whose functions, or :class:`.Rule` records, are rules by their own names.
GROUP = "composer_gradmatch_rules"

#: Name → rule. A row is all that a rule's file needs to be a YAML name and a study's strategy.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(gradient_matching, "gradmatch", takes_not_finite=True),
        Rule(LossPercentiles, "loss_backprop", needs="losses", weighs=False),
        Rule(uniform, "random_backprop", needs="nothing", weighs=False),
    )
}


def all_rules() -> dict[str, Rule]:
    """Lists this package's rules, then those of other installed packages, which cannot take a name of ours.

    Raises:
        TypeError: If an entry point is no rule.
    """
    others = {point.name: point for point in entry_points(group=GROUP) if point.name not in RULES}
    return {**RULES, **{name: _as_rule(name, point.load()) for name, point in sorted(others.items())}}


def rule_named(name: str) -> Rule:
    """Finds a rule.

    Args:
        name (str): Its name in :data:`RULES`, or as an entry point.

    Raises:
        ValueError: If there is none of that name; it lists the nearest.
    """
    if name in RULES:
        return RULES[name]
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name in points:
        return _as_rule(name, points[name].load())
    names = [*RULES, *points]
    nearest = difflib.get_close_matches(name, names, 3, 0.5) or names
    raise ValueError(f"there is no rule {name!r}; perhaps {', '.join(map(repr, nearest))}.")


def _as_rule(name: str, value: object) -> Rule:
    """The rule of an entry point, under the entry point's name."""
    if isinstance(value, Rule):
        return Rule(**{**vars(value), "name": name})
    return Rule(value, name)  # pyright: ignore[reportArgumentType]
