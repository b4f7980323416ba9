"""The runs of the gradient-error study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit

from composer_gradmatch.rules.table import all_rules
from composer_gradmatch.studies.configs import quiet, with_label_noise
from composer_gradmatch.studies.planning import cells
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import strategy_named
from composer_gradmatch.studies.study import Plan
from composer_gradmatch.train.builders import build_named
from composer_gradmatch.train.config import ConfigError

__all__ = ["plan_gradient_error"]

#: The most memory, in bytes, that gradients of samples, a copy of them, and the vectors of each variant may take.
_MEMORY = 4 * 2**30
_VECTORS = 14


def plan_gradient_error(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    *,
    seeds: int,
    minibatches: int,
    mode: str,
    checkpoint: str,
    label_noise: float = 0.0,
    after: Sequence[int] = (0,),
    against: Sequence[str] | None = None,
    draws: int = 8,
) -> Plan:
    """Plans runs for each seed and number of epochs, in which all strategies see the same minibatches.

    One is against the gradient of the data (§5.3), one against that of the minibatch.
    """
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).is_file():
        raise ConfigError(f"--checkpoint: there is no file {checkpoint}. Give a checkpoint that Composer has saved.")
    _check_epochs(config, after)
    pairs = [pair for pair in cells(strategies, keeps) if pair[0] != "full"]
    by_rule = [pair for pair in pairs if strategy_named(pair[0]).algorithm in all_rules()]
    refusal = _refusal(config, by_rule, minibatches, draws)
    if against is not None and "minibatch" in against:
        if refusal is None and by_rule != pairs:
            others = ", ".join(sorted({pair[0] for pair in pairs} - {pair[0] for pair in by_rule}))
            refusal = f"{others} is no rule of this package, so it cannot be drawn from alone. Leave it out"
        if refusal is not None:
            raise ConfigError(f"--against minibatch: {refusal}, or use --against data.")
    if against is None:
        against = ["data"] if refusal else ["data", "minibatch"]
    variants = {"data": [("full", 1.0), *pairs], "minibatch": by_rule}
    own = {"minibatches": minibatches, "mode": mode, "checkpoint": checkpoint}
    runs = [
        Run(
            "gradient-error",
            {
                "seed": seed,
                "label_noise": label_noise,
                "against": kind,
                "after": epochs,
                "variants": " ".join(f"{strategy}:{keep:g}" for strategy, keep in variants[kind]),
                **own,
                **({"draws": draws} if kind == "minibatch" else {}),
            },
            quiet(with_label_noise({**config, "seed": seed, "eval_loader": None}, label_noise, seed), f"errors-{seed}"),
            {"variants": [list(pair) for pair in variants[kind]], "minibatches": minibatches, "draws": draws},
        )
        for epochs in dict.fromkeys(after)
        for kind in dict.fromkeys(against)
        for seed in range(seeds)
    ]
    return Plan(runs, {**own, "label_noise": label_noise, "draws": draws})


def _check_epochs(config: dict[str, Any], after: Sequence[int]) -> None:
    duration = Time.from_input(config["max_duration"], TimeUnit.EPOCH)
    if duration.unit == TimeUnit.EPOCH and max(after) > duration.value:
        raise ConfigError(
            f"--after: {max(after)} epochs are more than max_duration={config['max_duration']}. Raise max_duration, "
            "which the learning rates depend on, or compare earlier."
        )


def _refusal(config: dict[str, Any], variants: Sequence[Any], minibatches: int, draws: int) -> str | None:
    """Tells why errors cannot be split, with a remedy; None if they can."""
    if not variants:
        return "there is no rule among the strategies. Add one"
    if minibatches < 2 or draws < 2:
        return (
            f"bias is told from variance by two minibatches or more, of two draws or more each; got {minibatches} and "
            f"{draws}. Raise --minibatches and --draws"
        )
    size = config["global_train_batch_size"]
    if size < 2:
        return "a minibatch of one sample has no subsets. Raise global_train_batch_size"
    model = build_named("model", config["model"])
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    needed = 8 * parameters * (2 * size + _VECTORS * len(variants))
    if needed > _MEMORY:
        return (
            f"the gradients of {size} samples and {len(variants)} variants over {parameters:,} parameters take "
            f"{needed / 2**30:.1f} GiB, and at most {_MEMORY / 2**30:.0f} are used. Compare fewer at a time, or lower "
            "global_train_batch_size"
        )
    return None
