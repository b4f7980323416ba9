"""The studies from Python: a notebook's way to what the command line does."""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer_gradmatch.studies.options import duration, factor, fraction, natural, noise, positive
from composer_gradmatch.train.config import ConfigError, load_config, nearest

if TYPE_CHECKING:
    from composer_gradmatch.studies.result import Result

__all__ = ["accuracy", "verdict"]

#: A config's path, a config, or what makes a Trainer's arguments.
Task = str | Path | dict[str, Any] | Callable[..., dict[str, Any]]


def verdict(
    make: Task,
    *,
    out: str | Path,
    budget: str | float,
    strategies: Sequence[str] = ("full", "random", "gradmatch", "loss"),
    keep: Sequence[float] = (0.1, 0.3),
    margin: float = 0.005,
    confidence: float = 0.95,
    validation: float = 0.1,
    seed: int = 0,
    label_noise: float = 0.0,
    metric: str | None = None,
    algorithms: dict[str, Any] | None = None,
    version: str = "",
    retry_failed: bool = False,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
) -> Result:
    """Finds out what to switch on and what it saves, within a budget of time.

    The same call goes on where one was stopped, and with a larger budget it goes on from there.

    Args:
        make (str | Path | dict | Callable): The path of a config, a config, or a function that returns a Trainer's
            keyword arguments as a dict, with at least ``model``, ``train_dataloader``, ``eval_dataloader``,
            ``optimizers`` and ``max_duration``. It is called for each run, in this process or, with Ray, in a
            worker's, with a learning rate ``lr`` and, if it takes one, the ``seed``, and makes all of them anew. The
            default of ``lr`` is the rate around which others are tried. Selection is the study's to add.
        out (str | Path): The folder for results.
        budget (str | float): The time for all of it: ``"2h"``, ``"1h30m"``, or seconds.
        strategies (Sequence[str], optional): See the table of studies. Default: full, random, gradmatch, loss.
        keep (Sequence[float], optional): Fractions of the minibatch. Default: ``(0.1, 0.3)``.
        margin (float, optional): So much less accurate than the full batch is as good. Default: ``0.005``.
        confidence (float, optional): The probability that nothing called decided is wrong. Default: ``0.95``.
        validation (float, optional): The part of the training set that rates are chosen on. Default: ``0.1``.
        seed (int, optional): The first of the seeds. Default: ``0``.
        label_noise (float, optional): The part of the training set with random labels. Default: ``0.0``.
        metric (str, optional): The evaluation metric. Default: the one with Accuracy in its name.
        algorithms (dict[str, Any], optional): With a function, the selecting algorithm as a config has it: e.g.
            ``{"gradmatch": {"start": 0.1, "input_key": "image"}}``. Its schedule and keys are all strategies'.
            Default: selection in every step.
        version (str, optional): With a function, a name for what it uses, such as its data: a folder of results
            belongs to one version, and to one source of the function. Default: ``""``.
        retry_failed (bool, optional): Whether runs that failed are made once more. Default: ``False``.
        engine (str, optional): Where runs are made: ``"local"``, on this machine, or ``"ray"``, on a Ray cluster, whose
            workers are sent the function if there is one. Default: ``"local"``.
        address (str, optional): With Ray, where it listens, ``"HOST:PORT"``. Default: ``RAY_ADDRESS``, or the cluster
            that this machine is a node of, or one that is started of this machine alone.

    Returns:
        Result: Its ``answer``, ``frame``, ``summary`` and ``figures``.

    Raises:
        ConfigError: If it cannot be asked of this.
    """
    options = {
        "budget": _checked("budget", duration, f"{budget}s" if isinstance(budget, int | float) else budget),
        "margin": _checked("margin", factor, margin),
        "confidence": _checked("confidence", fraction, confidence),
        "validation": _checked("validation", fraction, validation),
        "seed": _checked("seed", natural, seed),
        "label_noise": _checked("label_noise", noise, label_noise),
        "metric": metric,
    }
    shared = {"strategies": strategies, "keep": keep, "retry_failed": retry_failed}
    shared |= {"engine": engine, "address": address}
    return _ask("verdict", make, out, algorithms, version, varies_rate=True, **shared, **options)


def accuracy(
    make: Task,
    *,
    out: str | Path,
    strategies: Sequence[str] = ("gradmatch", "loss", "random", "full"),
    keep: Sequence[float] = (0.05, 0.1, 0.3, 0.5),
    seeds: int = 3,
    jobs: int | None = None,
    label_noise: float = 0.0,
    batch_size: Literal["fixed", "scaled"] = "fixed",
    tune: bool = False,
    validation: float = 0.1,
    metric: str | None = None,
    rounds: int = 10,
    algorithms: dict[str, Any] | None = None,
    version: str = "",
    retry_failed: bool = False,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
) -> Result:
    """Compares test accuracies at equal keep and at equal cost.

    The same call goes on where one was stopped; strategies, keeps and seeds may be added.

    Args:
        make (str | Path | dict | Callable): See :func:`verdict`; a function need only take ``lr`` with ``tune``.
        out (str | Path): The folder for results.
        strategies (Sequence[str], optional): Default: gradmatch, loss, random, full.
        keep (Sequence[float], optional): Fractions of the minibatch. Default: ``(0.05, 0.1, 0.3, 0.5)``.
        seeds (int, optional): Seeds 0 to N-1. Default: ``3``.
        jobs (int, optional): Runs at a time. Default: 1; with Ray, one for each GPU, or for each node where there are
            none.
        label_noise (float, optional): The part of the training set with random labels. Default: ``0.0``.
        batch_size (str, optional): ``"fixed"``: forward M samples whatever is kept; ``"scaled"``: M/keep.
            Default: ``"fixed"``.
        tune (bool, optional): Whether each strategy's learning rate at each keep is chosen first. Default: ``False``.
        validation (float, optional): With ``tune``, the part of the training set they are chosen on.
            Default: ``0.1``.
        metric (str, optional): The evaluation metric. Default: the one with Accuracy in its name.
        rounds (int, optional): Timed steps of each strategy. Default: ``10``.
        algorithms (dict[str, Any], optional): See :func:`verdict`. Default: ``None``.
        version (str, optional): See :func:`verdict`. Default: ``""``.
        retry_failed (bool, optional): Whether runs that failed are made once more. Default: ``False``.
        engine (str, optional): Where runs are made: ``"local"``, on this machine, or ``"ray"``, on a Ray cluster, whose
            workers are sent the function if there is one. Default: ``"local"``.
        address (str, optional): With Ray, where it listens, ``"HOST:PORT"``. Default: ``RAY_ADDRESS``, or the cluster
            that this machine is a node of, or one that is started of this machine alone.

    Returns:
        Result: Its ``answer``, ``frame``, ``summary`` and ``figures``.

    Raises:
        ConfigError: If it cannot be asked of this.
    """
    if batch_size not in ("fixed", "scaled"):
        raise ConfigError(f"batch_size: expected 'fixed' or 'scaled', got {batch_size!r}")
    if callable(make) and engine == "local" and jobs not in (None, 1):
        raise ConfigError(
            f"jobs: a function's runs are made in this process, one at a time; got {jobs!r}. Leave it out, or give "
            "engine='ray'."
        )
    options = {
        "seeds": _checked("seeds", positive, seeds),
        "jobs": None if jobs is None else _checked("jobs", positive, jobs),
        "label_noise": _checked("label_noise", noise, label_noise),
        "batch_size": batch_size,
        "tune": tune,
        "validation": _checked("validation", fraction, validation),
        "metric": metric,
        "rounds": _checked("rounds", positive, rounds),
    }
    shared = {"strategies": strategies, "keep": keep, "retry_failed": retry_failed}
    shared |= {"engine": engine, "address": address}
    return _ask("accuracy", make, out, algorithms, version, varies_rate=tune, **shared, **options)


def _checked(name: str, kind: Callable[[str], Any], value: Any) -> Any:
    """Reads a value as the command line reads its text."""
    try:
        return kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{name}: {error}") from None


def _ask(
    study: str,
    make: Task,
    out: str | Path,
    algorithms: dict[str, Any] | None,
    version: str,
    *,
    varies_rate: bool,
    strategies: Sequence[str],
    keep: Sequence[float],
    **options: Any,
) -> Result:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("A study makes its runs itself: call it without the launcher, in one process.")
    try:
        from composer_gradmatch.studies.building import built_by
        from composer_gradmatch.studies.figures import collecting
        from composer_gradmatch.studies.made import Made
        from composer_gradmatch.studies.result import Result
        from composer_gradmatch.studies.run_study import make_study
        from composer_gradmatch.studies.strategies import all_strategies
    except ImportError as error:
        raise ImportError(f"{error}. The studies need: pip install 'composer-gradmatch[studies]'") from error
    known = all_strategies()
    for name, given in {"strategies": strategies, "keep": keep}.items():
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ConfigError(f"{name}: expected a list with at least one entry, got {given!r}.")
    if unknown := [each for each in strategies if each not in known]:
        raise ConfigError(f"strategies: unknown strategy {unknown[0]!r}; {nearest(str(unknown[0]), known)}")
    keeps = [_checked("keep", fraction, each) for each in keep]
    with ExitStack() as stack:
        try:
            if callable(make):
                builder = Made(make, varies_rate, algorithms, version)
                config, name = builder.config, builder.name
                stack.enter_context(built_by(builder, config))
            elif algorithms is not None or version:
                raise ConfigError("algorithms, version: they go with a function; a config has its own algorithms.")
            else:
                config, name = (make, "config") if isinstance(make, dict) else (load_config(make), Path(make).stem)
                if options["engine"] == "local":
                    _refuse_unguarded_script()
            figures = stack.enter_context(collecting())
            cells = {"strategies": list(dict.fromkeys(strategies)), "keep": list(dict.fromkeys(keeps))}
            make_study(config, name, study, Path(out), **cells, **options)
        except ConfigError as error:
            raise ConfigError(_in_python(str(error))) from error
    return Result(study, Path(out), figures)


def _in_python(message: str) -> str:
    """Writes an error's options as arguments: ``--label-noise 0.1`` as ``label_noise 0.1``."""
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", lambda option: option[1].replace("-", "_"), message)


def _refuse_unguarded_script() -> None:
    """Refuses a script that worker processes, which import it, would have start studies of their own."""
    main: Any = sys.modules["__main__"]
    if multiprocessing.parent_process() is None and (getattr(main, "__file__", None) is None or _is_guarded(main)):
        return
    raise ConfigError(
        "A config's runs are made in processes of their own, which import this script. Put what it does under "
        "if __name__ == '__main__':, or give a function in the place of the config."
    )


def _is_guarded(main: Any) -> bool:
    try:
        return "__name__" in inspect.getsource(main)
    except (OSError, TypeError):  # No script in Python.
        return True
