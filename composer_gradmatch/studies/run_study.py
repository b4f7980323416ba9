"""A study from its config to its report: plan, make the missing runs, write what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from composer_gradmatch.studies.configs import accuracy_metric, with_synthetic_data
from composer_gradmatch.studies.plans import (
    check_study,
    identity,
    plan_accuracy,
    plan_gradient_error,
    plan_learning_rate,
    plan_step_time,
)
from composer_gradmatch.studies.pool import run_all
from composer_gradmatch.studies.report import write_report
from composer_gradmatch.studies.store import Run, Store
from composer_gradmatch.studies.tasks import do_run
from composer_gradmatch.train import check_config

__all__ = ["run_study"]


def run_study(
    config: dict[str, Any],
    name: str,
    study: str,
    out: Path,
    strategies: Sequence[str],
    keep: Sequence[float],
    retry_failed: bool = False,
    jobs: int = 1,
    **options: Any,
) -> int:
    """Makes a study's missing runs and writes its report.

    Args:
        config (dict[str, Any]): The user's config, resolved.
        name (str): What the figures call it.
        study (str): ``"accuracy"``, ``"learning-rate"``, ``"gradient-error"`` or ``"step-time"``.
        out (Path): The folder for results.
        strategies (Sequence[str]): Names of :data:`.STRATEGIES`.
        keep (Sequence[float]): Fractions to keep.
        retry_failed (bool, optional): Whether runs that failed are made once more. Default: ``False``.
        jobs (int, optional): Runs at a time. Default: ``1``.
        options: The study's own; see the command line.

    Returns:
        int: 0, or 1 if no run succeeded.

    Raises:
        ConfigError: If the study cannot be run.
    """
    check_config(config)
    timing, runs, shared = _plan(config, study, strategies, keep, options)
    check_study(config, runs)
    store = Store(out, identity(study, config, **shared))
    try:
        # Alone on the machine: other runs would be timed with it.
        if timing is not None:
            _make(store, [timing], 1, retry_failed, "step time")
        _make(store, runs, jobs, retry_failed, study)
        summary = write_report(store, study, name)
        print(summary.read_text())
        print(f"Results, figures and logs of the runs are in {out}.")
        return 0 if any(not record.error for record in store.records(study)) else 1
    finally:
        store.close()


def _plan(
    config: dict[str, Any], study: str, strategies: Sequence[str], keep: Sequence[float], options: dict[str, Any]
) -> tuple[Run | None, list[Run], dict[str, Any]]:
    """The run that times steps, if the study has one; its runs; and what they share."""
    if study == "step-time":
        synthetic = options["synthetic"]
        config = with_synthetic_data(config) if synthetic else config
        run = plan_step_time(config, strategies, keep, rounds=options["rounds"], synthetic=synthetic)
        return None, [run], {"synthetic": synthetic}
    seeds = options["seeds"]
    shared = {"label_noise": options["label_noise"]}
    if study == "gradient-error":
        own = {key: options[key] for key in ("minibatches", "mode", "checkpoint")}
        return None, plan_gradient_error(config, strategies, keep, seeds, **own, **shared), {**own, **shared}
    shared["metric"] = accuracy_metric(config, options["metric"])
    if study == "learning-rate":
        return None, plan_learning_rate(config, strategies, keep, seeds, factors=options["factors"], **shared), shared
    shared["batch_size"] = options["batch_size"]
    timing, runs = plan_accuracy(config, strategies, keep, seeds, rounds=options["rounds"], **shared)
    return timing, runs, shared


def _make(store: Store, runs: Sequence[Run], jobs: int, retry_failed: bool, label: str) -> None:
    missing = [run for run in runs if not store.has(run, retry_failed)]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=label, unit="run", dynamic_ncols=True) as bar:
        for run, record in run_all(do_run, missing, jobs, store.folder / "logs"):
            store.save(run, record)
            if record.error:
                bar.write(f"{run.key} failed: {record.error}")
            bar.update()
