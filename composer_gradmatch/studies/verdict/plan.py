"""The verdict on a user's config: what is asked, what is timed first, and then the conduct of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import yaml

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.configs import accuracy_metric, quiet
from composer_gradmatch.studies.engines.engine import Engine
from composer_gradmatch.studies.planning import cells, training_run
from composer_gradmatch.studies.step_time.plan import step_time_run
from composer_gradmatch.studies.store import Record, Run, Store, write_atomically
from composer_gradmatch.studies.strategies import selecting_entry, strategy_named, with_strategy
from composer_gradmatch.studies.study import Plan
from composer_gradmatch.studies.verdict.conduct import conduct
from composer_gradmatch.studies.verdict.ledger import Ledger
from composer_gradmatch.studies.verdict.progress import Progress
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.runs import TRAINING, batches_of, runs_of
from composer_gradmatch.studies.verdict.source import Stored, making
from composer_gradmatch.studies.verdict.trial import FULL, Cell, Trial
from composer_gradmatch.studies.verdict.tuning import tuning_rate
from composer_gradmatch.train.config import ConfigError

__all__ = ["plan_verdict"]

_ROUNDS = 5
#: The measurement of the noise scale may take this part of the budget, and trains about so much longer than a run.
_NOISE_PART, _NOISE_COST = 0.1, 2.0


def plan_verdict(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    *,
    budget: float,
    margin: float = 0.005,
    confidence: float = 0.95,
    validation: float = 0.1,
    seed: int = 0,
    label_noise: float = 0.0,
    metric: str | None = None,
) -> Plan:
    """Plans the timing of steps, and all else as it goes; the full batch and random are there in any case."""
    logged = accuracy_metric(config, metric)
    rate = tuning_rate(config)
    candidates = [cell for cell in cells(dict.fromkeys(["random", *strategies]), keeps) if cell != FULL]
    samples = _test_samples(config)
    if margin < 1 / samples:
        raise ConfigError(
            f"--margin {margin:g} is below what the test set can resolve: one of its {samples:,} samples is "
            f"{1 / samples:.4f}. Use a larger margin, or a larger test set."
        )
    question = Question(tuple(candidates), rate, margin, confidence, samples, seed)
    run_of = runs_of(config, "verdict", logged, label_noise, validation, seed)
    shared = {"label_noise": label_noise, "metric": logged, "margin": margin, "confidence": confidence}
    shared |= {"validation": validation, "seed": seed}
    size = config["global_train_batch_size"]
    timing = step_time_run(
        quiet({**config, "seed": seed}, "step-time"), [(*cell, size) for cell in (FULL, *candidates)], _ROUNDS
    )
    trials = [Trial(cell, rate, seed) for cell in (FULL, *candidates)]
    trials.append(Trial(FULL, rate, question.tuning_seed, 0.25, "validation"))
    adapt = partial(_conduct, config, question, run_of, budget, timing)
    return Plan([run_of(trial) for trial in trials], shared, adapt=adapt)


def _test_samples(config: dict[str, Any]) -> int:
    samples = builder_of(config).test_samples(config)
    subset = config.get("eval_subset_num_batches") or -1
    size = config.get("device_eval_batch_size", config["global_train_batch_size"])
    return samples if subset < 0 else min(samples, subset * size)


def _conduct(
    config: dict[str, Any],
    question: Question,
    run_of: Any,
    budget: float,
    timing: Run,
    store: Store,
    engine: Engine,
    retry_failed: bool,
) -> list[Run]:
    """Makes the verdict and writes ``verdict.json``; no runs are left to be made."""
    batches = batches_of(config)
    with making(store, engine) as make, Progress(budget, engine.slots) as progress:

        def kept(run: Run, task: str) -> Record:
            record = store.record(run)
            if record is None or (retry_failed and record.error):
                record = make(run, task)
                store.save(run, record)
            return record

        # First: it starts the worker, whose time is not taken for that of the first run.
        timed = kept(timing, "composer_gradmatch.studies.step_time.timer:step_time")
        of_cell = _step_seconds(timed)
        full = of_cell.get(FULL, 0.0) * (batches or 0)
        spent = timed.seconds
        noise = None
        run = _noise_run(config, run_of(Trial(FULL, question.rate, question.tuning_seed)))
        if store.record(run) is not None or 0 < full * _NOISE_COST <= _NOISE_PART * budget:
            noise = kept(run, "composer_gradmatch.studies.verdict.noise_scale:noise_scale")
            spent += noise.seconds

        def guess(cell: Cell) -> float:
            if cell in of_cell and FULL in of_cell:
                return of_cell[cell] / of_cell[FULL]
            return strategy_named(cell[0]).cost(cell[1])

        source = Stored(store, run_of, lambda run: make(run, TRAINING), retry_failed, engine.slots)
        expect = source.expect if engine.slots > 1 else None
        ledger = Ledger(source, budget, guess, full, spent, progress.tell, source.has, expect)
        try:
            verdict = conduct(question, ledger)
        finally:
            source.close()
            store.write_table("verdict", "results.csv")  # What was computed is kept, whatever ends it.
    found = verdict.as_json()
    found["headroom"] |= {
        "step_times": [{"strategy": s, "keep": k, "seconds": of_cell[s, k]} for s, k in sorted(of_cell)],
        "step_times_error": timed.error,
        "noise_scale": [] if noise is None else noise.rows,
        "noise_scale_error": "" if noise is None else noise.error,
        "batch_size": config["global_train_batch_size"],
    }
    answer = verdict.answer
    found["recommended"]["yaml"] = _entry(config, answer.cell, found["recommended"]["rate"])
    write_atomically(store.folder / "verdict.json", json.dumps(found, indent=1) + "\n")
    return []


def _step_seconds(timed: Record) -> dict[Cell, float]:
    """Gives the median time of each cell's step; nothing if they could not be timed."""
    seconds: dict[Cell, list[float]] = {}
    for row in timed.rows:
        if row["measured"] == "step":
            seconds.setdefault((row["strategy"], row["keep"]), []).append(row["seconds"])
    return {cell: median(each) for cell, each in seconds.items()}


def _noise_run(config: dict[str, Any], full: Run) -> Run:
    settings = {key: full.settings[key] for key in ("rate", "seed", "label_noise")}
    run = training_run("noise-scale", settings, {**full.config, "eval_loader": None}, "")
    return Run(run.kind, run.settings, run.config, {"config": config})


def _entry(config: dict[str, Any], cell: Cell, rate: float) -> str:
    """Gives the YAML that trains with a cell: the optimizer with its rate, and the algorithms."""
    algorithms = with_strategy(config, *cell)["algorithms"]
    own = selecting_entry(config)
    if own is not None and own[0] not in algorithms:
        algorithms[own[0]] = False
    optimizer = {**config["optimizer"], "lr": rate}
    entry = {"optimizer": optimizer, "algorithms": algorithms}
    return yaml.safe_dump(entry, sort_keys=False, default_flow_style=None, width=math.inf)
