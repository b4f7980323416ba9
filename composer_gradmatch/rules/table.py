"""The rules by their names, those of installed packages and of users' files included."""

from __future__ import annotations

import difflib
import warnings
from importlib.metadata import EntryPoint, entry_points

from composer_gradmatch.registered import Registered, registered
from composer_gradmatch.rules.calibrated import Calibrated
from composer_gradmatch.rules.divbs import divbs
from composer_gradmatch.rules.el2n import el2n
from composer_gradmatch.rules.facility_location import facility_location
from composer_gradmatch.rules.gradient_matching import gradient_matching
from composer_gradmatch.rules.grand import grand
from composer_gradmatch.rules.importance import ImportanceSampling
from composer_gradmatch.rules.infobatch import InfoBatch
from composer_gradmatch.rules.k_dpp import k_dpp
from composer_gradmatch.rules.kakurenbo import Kakurenbo
from composer_gradmatch.rules.loss_percentiles import LossPercentiles
from composer_gradmatch.rules.rank_based import RankBased
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.stratified import stratified
from composer_gradmatch.rules.top_loss import top_loss
from composer_gradmatch.rules.uniform import uniform

__all__ = ["GROUP", "RULES", "all_rules", "rule_named", "rule_names"]

#: The entry points whose functions, or :class:`.Rule` records, are rules by their own names.
GROUP = "composer_gradmatch_rules"

#: Name → rule. A row is all that a rule's file needs to be a YAML name and a study's strategy.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(gradient_matching, "gradmatch", takes_not_finite=True),
        Rule(LossPercentiles, "loss_backprop", needs="losses", weighs=False),
        Rule(ImportanceSampling, "importance_backprop", color="#808000"),
        Rule(uniform, "random_backprop", needs="nothing", weighs=False, unbiased=True),
        Rule(stratified, needs="nothing", unbiased=True, color="#17becf"),
        Rule(top_loss, needs="losses", weighs=False, color="#e6194b"),
        Rule(RankBased, "rank_based", needs="losses", weighs=False, color="#ff7f7f"),
        Rule(InfoBatch, "infobatch", needs="losses", varies=True, color="#8b0000"),
        Rule(Kakurenbo, "kakurenbo", needs="losses", weighs=False, varies=True, color="#7fbf00"),
        Rule(el2n, weighs=False, color="#9a6324"),
        Rule(grand, weighs=False, color="#5c3c92"),
        Rule(Calibrated, "calibrated", color="#0000cd"),
        Rule(facility_location, color="#66c2a5"),
        Rule(divbs, weighs=False, color="#ff00aa"),
        Rule(k_dpp, weighs=False, color="#aa4499"),
    )
}


def all_rules() -> dict[str, Rule]:
    """Lists this package's rules, then users' own, and those of installed packages, which cannot take a name of ours.

    One of theirs that cannot be used is left out, with a warning: it is no reason to stop what does not ask for it.
    """
    rules = {**RULES, **{name: _added(name, each) for name, each in registered("rule").items()}}
    for name, point in sorted(_others().items()):
        if name not in rules:
            try:
                rules[name] = _loaded(name, point)
            except ValueError as error:
                warnings.warn(str(error), stacklevel=2)
    return rules


def rule_names() -> list[str]:
    """Lists the names of all rules; of other packages' none is imported for it."""
    return list(dict.fromkeys([*RULES, *registered("rule"), *_others()]))


def rule_named(name: str) -> Rule:
    """Finds a rule.

    Args:
        name (str): Its name in :data:`RULES`, by :data:`.register`, or as an entry point.

    Raises:
        ValueError: If there is none of that name (it lists the nearest), or what an installed package or a user has
            under it cannot be imported or is none.
    """
    if name in RULES:
        return RULES[name]
    if name in registered("rule"):
        return _added(name, registered("rule")[name])
    others = _others()
    if name in others:
        return _loaded(name, others[name])
    names = rule_names()
    nearest = difflib.get_close_matches(name, names, 3, 0.5) or names
    raise ValueError(f"there is no rule {name!r}; perhaps {', '.join(map(repr, nearest))}.")


def _added(name: str, added: Registered) -> Rule:
    """Makes the record of a function that a user has registered.

    Raises:
        ValueError: If it is no rule; the message begins with its file and line.
    """
    try:
        return Rule(added.function, name, **added.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{added.where}: {error}") from error


def _others() -> dict[str, EntryPoint]:
    """Lists the entry points of installed packages."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _loaded(name: str, point: EntryPoint) -> Rule:
    """Imports the rule of an entry point, under the entry point's name.

    Raises:
        ValueError: If it cannot be imported, whatever its package raises, or is no rule.
    """
    try:
        value = point.load()
        return Rule(**{**vars(value), "name": name}) if isinstance(value, Rule) else Rule(value, name)
    except Exception as error:
        raise ValueError(
            f"the rule {name!r} of an installed package ({point.value}) cannot be used: {type(error).__name__}: "
            f"{error}. Mend or uninstall that package."
        ) from error
