"""Strategies by their study names, and a config patched to train with one of them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.registry import resolve

__all__ = ["REUSE", "STRATEGIES", "selecting_entry", "strategy_entry", "with_strategy"]

#: Study name → the algorithm's name in YAML; None is the full batch.
STRATEGIES: dict[str, str | None] = {
    "gradmatch": "gradmatch",
    "loss": "loss_backprop",
    "random": "random_backprop",
    "selective_backprop": "selective_backprop",
    "gradmatch_reuse": "gradmatch",
    "loss_reuse": "loss_backprop",
    "full": None,
}
#: The strategies that reuse the activations of the selection pass.
REUSE = {"gradmatch_reuse", "loss_reuse"}
#: What makes the selection pass another one than the training step's.
_OWN_PASS = ("scale_factor", "selection_microbatch_size", "selection_precision")
_ALWAYS = {"start": 0.0, "end": 1.0, "interrupt": 0}


def selecting_entry(config: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The selecting algorithm that a config has, as (YAML name, arguments); None if it has none.

    Raises:
        ConfigError: If it has more than one.
    """
    names = [name for name in STRATEGIES.values() if name]
    found = [
        (name, dict(arguments or {}))
        for name, arguments in (config.get("algorithms") or {}).items()
        if name in names and arguments is not False
    ]
    if len(found) > 1:
        raise ConfigError(
            f"algorithms: a study puts one strategy after another in the place of the config's selecting algorithm, "
            f"but it has {' and '.join(name for name, _ in found)}. Switch all but one off with false."
        )
    return found[0] if found else None


def strategy_entry(config: dict[str, Any], strategy: str, keep: float) -> dict[str, Any]:
    """The ``algorithms`` entry of a strategy: ``{}`` for the full batch, else ``{YAML name: arguments}``.

    The schedule, the batch keys and ``scale_factor`` are those of the config's own selecting algorithm, whatever
    its name, so that all strategies share them; a config without one selects in every step, as in the paper. A
    strategy's own arguments (``solver``, say) are those under its own name.

    Args:
        config (dict[str, Any]): A config.
        strategy (str): A key of :data:`STRATEGIES`.
        keep (float): The fraction to keep.
    """
    name = STRATEGIES[strategy]
    if name is None:
        return {}
    entry = selecting_entry(config)
    shared = _ALWAYS if entry is None else entry[1]
    own = (config.get("algorithms") or {}).get(name) or {}
    accepted = inspect.signature(resolve("algorithm", name)).parameters
    common = ("start", "end", "interrupt", "input_key", "target_key", "scale_factor")
    arguments = {**own, **{key: shared[key] for key in common if key in shared and key in accepted}}
    if strategy in REUSE:
        arguments = {key: value for key, value in arguments.items() if key not in _OWN_PASS}
        arguments["reuse_activations"] = True
    return {name: {**arguments, "keep": keep}}


def with_strategy(config: dict[str, Any], strategy: str, keep: float) -> dict[str, Any]:
    """A copy of a config that trains with a strategy in the place of its own selecting algorithm."""
    config = copy.deepcopy(config)
    selecting = set(STRATEGIES.values())
    others = {name: value for name, value in (config.get("algorithms") or {}).items() if name not in selecting}
    original = {**config}
    config["algorithms"] = {**others, **strategy_entry(original, strategy, keep)}
    return config
