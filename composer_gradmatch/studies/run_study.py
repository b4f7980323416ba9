"""A study from its config to its report: plan, make the missing runs, write what came out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.engines.engine import Engine, open_engine, run_all
from composer_gradmatch.studies.planning import check_study, identity
from composer_gradmatch.studies.registry import STUDIES
from composer_gradmatch.studies.report import write_report
from composer_gradmatch.studies.store import Run, Store
from composer_gradmatch.studies.tasks import for_workers

__all__ = ["make_study", "run_study"]


def run_study(config: dict[str, Any], name: str, study: str, out: Path, **options: Any) -> int:
    """Does what :func:`make_study` does, and prints the summary: returns 0, or 1 if no run succeeded."""
    succeeded = make_study(config, name, study, out, **options)
    print((out / "summary.md").read_text())
    print(f"Results, figures and logs of the runs are in {out}.")
    return 0 if succeeded else 1


def make_study(
    config: dict[str, Any],
    name: str,
    study: str,
    out: Path,
    strategies: Sequence[str],
    keep: Sequence[float],
    retry_failed: bool = False,
    engine: str = "local",
    address: str | None = None,
    jobs: int | None = None,
    command: str = "",
    **options: Any,
) -> int:
    """Makes a study's missing runs and writes its report.

    Args:
        config (dict[str, Any]): The user's config, resolved.
        name (str): What the figures call it.
        study (str): A key of :data:`.STUDIES`.
        out (Path): The folder for results.
        strategies (Sequence[str]): Names of :func:`.all_strategies`.
        keep (Sequence[float]): Fractions to keep.
        retry_failed (bool, optional): Whether runs that failed are made once more. Default: ``False``.
        engine (str, optional): Where runs are made: ``"local"``, in processes of this machine, or ``"ray"``.
            Default: ``"local"``.
        address (str, optional): Where Ray listens; see :func:`.connect`. Default: ``None``.
        jobs (int, optional): Runs at a time. Default: one, or with Ray what the cluster has room for.
        command (str, optional): How this was asked for, for the report. Default: ``""``.
        options: The study's own; see the command line.

    Returns:
        int: The runs in the folder that succeeded.

    Raises:
        ConfigError: If the study cannot be run.
    """
    builder = builder_of(config)
    builder.check(config)
    with ExitStack() as stack:
        # Before the plan, which reads the data: whether a cluster is there is known sooner.
        makes = stack.enter_context(open_engine(engine, address, jobs, builder.here))
        plan = STUDIES[study].load().plan(config, strategies, keep, **options)
        check_study(config, plan.runs)
        store = stack.enter_context(closing(Store(out, identity(study, config, **plan.shared))))
        for run in plan.alone:
            _make(store, makes, [run], retry_failed)
        runs = plan.runs if plan.adapt is None else plan.adapt(store, makes, retry_failed)
        _make(store, makes, runs, retry_failed)
        write_report(store, study, name, command)
        return sum(not record.error for record in store.records(study))


def _make(store: Store, engine: Engine, runs: Sequence[Run], retry_failed: bool) -> None:
    """Makes the missing ones among runs of one kind."""
    if not runs:
        return
    study = STUDIES[runs[0].kind]
    missing = [run for run in runs if not store.has(run, retry_failed)]
    label = {"total": len(runs), "initial": len(runs) - len(missing), "desc": study.name}
    task = for_workers(study.task, builder_of(runs[0].config))
    with tqdm(**label, unit="run", dynamic_ncols=True) as bar:
        for run, record in run_all(engine, task, missing, store.folder / "logs"):
            store.save(run, record)
            if record.error:
                bar.write(f"{run.key} failed: {record.error}")
            bar.update()
