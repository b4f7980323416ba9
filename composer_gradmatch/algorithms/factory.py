"""A rule's name as that of an algorithm: a callable with the arguments of both."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.rules.rule import Rule

__all__ = ["algorithm_of"]

#: Arguments of :class:`.RuleBackprop` that are of use to a rule that makes a selection pass.
_OF_PASSES = {"scale_factor", "selection_microbatch_size", "selection_precision", "reuse_activations"}
#: And those that are of use to a rule that looks at nothing, if it weighs the loss.
_OF_LOSSES = {"loss_fn"}


def algorithm_of(rule: Rule) -> Callable[..., RuleBackprop]:
    """Makes the factory of an algorithm, whose signature says what can be given in YAML.

    Args:
        rule (Rule): Its options become keyword arguments beside those of :class:`.RuleBackprop` that are of use to it.

    Returns:
        Callable: Makes a :class:`.RuleBackprop`.

    Raises:
        ValueError: If an option has the name of one of :class:`.RuleBackprop`'s arguments.
    """
    shared = dict(inspect.signature(RuleBackprop).parameters)
    of_no_use = {"rule", "options"}
    if rule.needs == "nothing":
        of_no_use |= _OF_PASSES | (set() if rule.weighs else _OF_LOSSES)
    if rule.needs != "gradients":
        of_no_use |= {"output_layer"}
    if taken := sorted(rule.options.keys() & shared.keys()):
        raise ValueError(
            f"The rule {rule.name!r} has an option {taken[0]!r}, which is an argument of every selecting algorithm. "
            "Give the option another name."
        )
    shared = {name: each for name, each in shared.items() if name not in of_no_use}
    parameters = [*shared.values(), *rule.options.values()]
    signature = inspect.Signature(parameters)

    def make(*args: Any, **kwargs: Any) -> RuleBackprop:
        arguments = signature.bind(*args, **kwargs).arguments
        options = {name: value for name, value in arguments.items() if name in rule.options}
        others = {name: value for name, value in arguments.items() if name not in rule.options}
        return RuleBackprop(rule, **others, options=options)

    hints = {**typing.get_type_hints(RuleBackprop.__init__), **_hints_of(rule)}
    make.__annotations__ = {each.name: hints.get(each.name, Any) for each in parameters}
    vars(make)["__signature__"] = signature
    make.__name__ = make.__qualname__ = rule.name
    make.__doc__ = rule.function.__doc__
    make.__module__ = getattr(rule.function, "__module__", __name__)
    return make


def _hints_of(rule: Rule) -> dict[str, Any]:
    """Gives the types of a rule's options, as far as they can be told."""
    function = rule.function
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):
        return {}
