"""The strategies that the studies compare, a record each, and a config patched to train with one of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from composer_gradmatch.rules.cost import FORWARD_SHARE, Passes, step_cost
from composer_gradmatch.rules.table import all_rules
from composer_gradmatch.train.config import ConfigError, nearest
from composer_gradmatch.train.registry import resolve

__all__ = [
    "STRATEGIES",
    "Strategy",
    "all_strategies",
    "in_order",
    "selecting_entry",
    "selecting_names",
    "strategy_entry",
    "strategy_named",
    "with_strategy",
]


@dataclass(frozen=True)
class Strategy:
    """What a study trains with, and how it is shown.

    Attributes:
        name (str): Its name on the command line, in tables and in legends.
        algorithm (str, optional): The selecting algorithm's name in YAML; None for the full batch.
        passes (int): Forward passes over the whole minibatch beside the training step: see :data:`.Passes`.
        color (str): Of its lines and bars, as matplotlib names it.
        marker (str): Of its points, as matplotlib names it: a filled one.
        arguments (Mapping[str, Any], optional): What tells it from other strategies of the same algorithm. A ``keep``
            among them is the only one that it has. Default: ``{}``.
        looked_at (float, optional): The share of a minibatch that its passes are made over; less than one with a store
            of looks. Default: ``1.0``.
    """

    name: str
    algorithm: str | None
    passes: Passes
    color: str
    marker: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    looked_at: float = 1.0

    @property
    def is_stored(self) -> bool:
        """Whether it keeps a store of looks, so that its steps are not alike and cannot be timed apart from a run."""
        return "refresh" in self.arguments

    def cost(self, keep: float, forward_share: float = FORWARD_SHARE) -> float:
        """Tells what a step costs, in full steps, if selection itself is free: see :func:`.step_cost`.

        Args:
            keep (float): m/M; not used for the full batch.
            forward_share (float, optional): f, the forward pass's share of a full step. Default: ``1/3``.
        """
        keep = self.arguments.get("keep", 1.0 if self.algorithm is None else keep)
        if self.looked_at < 1:
            return self.looked_at * forward_share + keep
        return step_cost(self.passes, keep, forward_share)


_REUSE = {"reuse_activations": True}
_STORED = {"refresh": "5ep"}
_TRUSTED = {**_STORED, "suspects": True}
#: Name → strategy, in the order of tables and legends. Colours are those of seaborn's "colorblind" palette.
STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("gradmatch", "gradmatch", 2, "#0173b2", "o"),
        Strategy("gradmatch_matched", "gradmatch", 2, "#002d5c", "H", {"weights": "matched"}),
        Strategy("loss", "loss_backprop", 2, "#de8f05", "s"),
        Strategy("random", "random_backprop", 0, "#029e73", "^"),
        Strategy("selective_backprop", "selective_backprop", 2, "#d55e00", "D"),
        Strategy("gradmatch_reuse", "gradmatch", 1, "#cc78bc", "P", _REUSE),
        Strategy("loss_reuse", "loss_backprop", 1, "#ca9161", "v", _REUSE),
        # With stored looks; "trusted" ones leave samples out whose labels look wrong.
        Strategy("gradmatch_stored", "gradmatch", 2, "#6a3d9a", "p", _STORED, 1 / 5),
        Strategy("gradmatch_trusted", "gradmatch", 2, "#b15928", "h", _TRUSTED, 1 / 5),
        Strategy("matched_trusted", "gradmatch", 2, "#1b7837", "d", {**_TRUSTED, "weights": "matched"}, 1 / 5),
        Strategy("loss_stored", "loss_backprop", 2, "#f1b6da", "8", _STORED, 1 / 5),
        Strategy("importance_stored", "importance_backprop", 2, "#bf812d", "*", _STORED, 1 / 5),
        Strategy("random_trusted", "random_backprop", 2, "#80cdc1", "<", _TRUSTED, 1 / 5),
        # Their picks follow from the losses, so that what they keep, and their modelled cost, is an upper bound.
        Strategy("infobatch_stored", "infobatch", 2, "#8c2d04", "$I$", {**_STORED, "keep": 0.99, "end": 0.875}, 1 / 5),
        Strategy("kakurenbo_stored", "kakurenbo", 2, "#3690c0", "$K$", {**_STORED, "keep": 0.99}, 1 / 5),
        Strategy("full_trusted", "random_backprop", 2, "#878787", ">", {**_TRUSTED, "keep": 1.0}, 1 / 5),
        Strategy("full", None, 0, "#404040", "X"),
    )
}
#: For strategies without a colour of their own: the rest of "colorblind", and darker ones.
_MORE_COLORS = (
    *("#56b4e9", "#949494", "#fbafe4", "#ece133", "#882255", "#332288", "#117733", "#999933"),
    *("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#e31a1c", "#1f78b4", "#33a02c", "#543005", "#003c30", "#c51b7d"),
)
_MORE_MARKERS = ("<", ">", "p", "h", "d", "*", "8")  # One fewer, so that pairs differ for long.
#: What makes the selection pass another one than the training step's.
_OWN_PASS = ("scale_factor", "selection_microbatch_size", "selection_precision")
_ALWAYS = {"start": 0.0, "end": 1.0, "interrupt": 0}


def all_strategies() -> dict[str, Strategy]:
    """Lists the strategies by name: those of :data:`STRATEGIES`, then those of all other rules, by name.

    A rule is a strategy by its own name, and one that looks at its candidates also one by ``NAME_reuse``.
    """
    taken = {strategy.algorithm for strategy in STRATEGIES.values() if not strategy.is_stored}
    rules = [rule for name, rule in sorted(all_rules().items()) if name not in taken]
    colors = _free(_MORE_COLORS, [rule.color for rule in rules])
    markers = _free(_MORE_MARKERS, [rule.marker for rule in rules])
    more = []
    for rule in rules:
        color, marker = rule.color or next(colors), rule.marker or next(markers)
        more.append(Strategy(rule.name, rule.name, rule.passes(), color, marker))
        if rule.passes():
            name, color, marker = f"{rule.name}_reuse", next(colors), next(markers)
            more.append(Strategy(name, rule.name, rule.passes(reuse_activations=True), color, marker, _REUSE))
    # A row of the table is what its name means, whatever a rule is called.
    return STRATEGIES | {strategy.name: strategy for strategy in more if strategy.name not in STRATEGIES}


def _free(palette: tuple[str, ...], own: Iterable[str | None]) -> Iterator[str]:
    """Goes through what a palette has beside the rules' own, over and over."""
    own = set(own)
    return cycle([each for each in palette if each not in own] or palette)


def strategy_named(name: str) -> Strategy:
    """Finds a strategy.

    Raises:
        ConfigError: If there is none of that name, as when the package that brought it is no longer installed.
    """
    (strategy,) = in_order([name])
    return strategy


def in_order(names: Iterable[str]) -> list[Strategy]:
    """Lists the strategies of some names, each once, in the order of tables and legends.

    Raises:
        ConfigError: If there is none of a name.
    """
    wanted, strategies = set(names), STRATEGIES
    if not wanted <= strategies.keys():
        strategies = all_strategies()  # Which asks the installed packages.
    if unknown := sorted(wanted - strategies.keys()):
        raise ConfigError(f"unknown strategy {unknown[0]!r}; {nearest(unknown[0], strategies)}")
    return [strategy for strategy in strategies.values() if strategy.name in wanted]


def selecting_names() -> set[str]:
    """Lists the YAML names of the algorithms that select."""
    return {strategy.algorithm for strategy in all_strategies().values() if strategy.algorithm is not None}


def selecting_entry(config: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Gives the selecting algorithm that a config has, as (YAML name, arguments); None if it has none.

    Raises:
        ConfigError: If it has more than one.
    """
    names = selecting_names()
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


def strategy_entry(config: dict[str, Any], name: str, keep: float) -> dict[str, Any]:
    """Gives the ``algorithms`` entry of a strategy: ``{}`` for the full batch, else ``{YAML name: arguments}``.

    The schedule, the batch keys and ``scale_factor`` are those of the config's own selecting algorithm, whatever
    its name, so that all strategies share them; a config without one selects in every step, as in the paper. A
    strategy's own arguments (``solver``, say) are those under its own name.

    Args:
        config (dict[str, Any]): A config.
        name (str): The strategy's name.
        keep (float): The fraction to keep.

    Raises:
        ConfigError: If there is no such strategy.
    """
    strategy = strategy_named(name)
    if strategy.algorithm is None:
        return {}
    entry = selecting_entry(config)
    shared = _ALWAYS if entry is None else entry[1]
    own = (config.get("algorithms") or {}).get(strategy.algorithm) or {}
    accepted = inspect.signature(resolve("algorithm", strategy.algorithm)).parameters
    common = ("start", "end", "interrupt", "input_key", "target_key", "scale_factor")
    arguments = {**own, **{key: shared[key] for key in common if key in shared and key in accepted}}
    if strategy.passes == 1:
        arguments = {key: value for key, value in arguments.items() if key not in _OWN_PASS}
    return {strategy.algorithm: {**arguments, "keep": keep, **strategy.arguments}}


def with_strategy(config: dict[str, Any], name: str, keep: float) -> dict[str, Any]:
    """Gives a copy of a config that trains with a strategy in the place of its own selecting algorithm."""
    selecting = selecting_names()
    others = {key: value for key, value in (config.get("algorithms") or {}).items() if key not in selecting}
    return copy.deepcopy({**config, "algorithms": {**others, **strategy_entry(config, name, keep)}})
