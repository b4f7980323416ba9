"""A run of a config with gradient matching, in which some minibatches' candidates are looked into."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from composer.core import State

from composer_gradmatch import GradMatch
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.train.trainer import build_trainer, expect_small_batches

__all__ = ["Watch", "fit_watched"]

#: ``watch(state, source, candidates)``: looks into a minibatch's candidates.
Watch = Callable[[State, Source, Candidates], None]


def fit_watched(
    config: dict[str, Any], watch: Watch, every: int, prepare: Callable[[Source], None], **own: Any
) -> None:
    """Trains a config by gradient matching, and shows some minibatches' candidates before samples are picked.

    Args:
        config (dict[str, Any]): As :func:`.load_config` returns it. It is not evaluated, and nothing is saved.
        watch (Callable): Is shown each ``every``-th minibatch, from the second epoch on.
        every (int): Steps from one to the next.
        prepare (Callable): Is given the source of candidates before the run.
        own: Arguments of :class:`.GradMatch`, beside the config's.
    """
    given = (config.get("algorithms") or {}).get("gradmatch") or {}
    arguments = {**given, "start": 0.0, "end": 1.0, "interrupt": 0, **own}
    dropped = ("autoresume", "save_interval", "save_num_checkpoints_to_keep", "save_overwrite")
    config = {key: value for key, value in config.items() if key not in dropped}
    config |= {"save_folder": None, "eval_loader": None, "callbacks": {}, "loggers": {}, "progress_bar": False}
    config["algorithms"] = {**(config.get("algorithms") or {}), "gradmatch": arguments}
    expect_small_batches()
    trainer = build_trainer(config)
    (algorithm,) = (each for each in trainer.state.algorithms if isinstance(each, GradMatch))
    source = algorithm.selector.source
    prepare(source)
    look = source.look

    def watched(state: State, num_samples: int) -> Candidates:
        candidates = look(state, num_samples)
        if int(state.timestamp.epoch) and not int(state.timestamp.batch) % every:
            with torch.random.fork_rng(devices=[]):
                watch(state, source, candidates)
        return candidates

    vars(source).update(look=watched)
    try:
        with warnings.catch_warnings():
            # What it says of steps' lengths is of the run, which is none of a user's.
            warnings.filterwarnings("ignore", ".*steps on the picks are too long", UserWarning)
            trainer.fit()
    finally:
        trainer.close()
