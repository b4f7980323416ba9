"""What a study is: a record that the command line, the runs and the reports are driven by."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from composer_gradmatch.studies.engines.engine import Engine
    from composer_gradmatch.studies.store import Run, Store

__all__ = ["Parts", "Plan", "Study"]


@dataclass(frozen=True)
class Study:
    """A question that is asked of a config, strategy by strategy.

    ``plan``, ``task`` and ``report`` name functions of modules as ``"module:function"``, so that the command line's
    help needs none of the packages that they do, and a worker process is sent the name.

    Attributes:
        name (str): Its name on the command line, of its runs, and in its folder.
        help (str): What it shows, in a line.
        strategies (tuple[str, ...]): The strategies by default.
        keeps (tuple[float, ...]): The fractions to keep by default.
        options (Callable): Adds the study's own options to its parser.
        plan (str): ``plan(config, strategies, keeps, **options) -> Plan``.
        task (str): ``task(run) -> (rows, details)``: does a run; the rows are its results, the details what is too
            long for a table.
        report (str): ``report(store, name) -> lines``: draws the figures and returns the lines of the summary.
    """

    name: str
    help: str
    strategies: tuple[str, ...]
    keeps: tuple[float, ...]
    options: Callable[[argparse.ArgumentParser], None]
    plan: str
    task: str
    report: str

    def load(self) -> Parts:
        """Imports what the study consists of.

        Raises:
            ImportError: If a package is missing.
        """
        return Parts(*map(resolve_name, (self.plan, self.task, self.report)))


class Parts(NamedTuple):
    """The functions that a study names."""

    plan: Callable[..., Plan]
    task: Callable[[Run], tuple[list[dict[str, Any]], dict[str, Any]]]
    report: Callable[[Store, str], list[str]]


@dataclass(frozen=True)
class Plan:
    """The runs of a study.

    Attributes:
        runs (list[Run]): To be made, several at a time.
        shared (dict[str, Any]): The options that all of them share: they tell the study's folder from others.
        alone (list[Run], optional): To be made first and one by one, on a machine that does nothing else; each is of
            the study that its kind names. Default: ``[]``.
        adapt (Callable, optional): ``adapt(store, engine, retry_failed)``: for a study that decides what to run by what
            came out; called once those alone are made. It makes what it needs, and returns the runs to be made in the
            place of ``runs``, which are then there to be checked only. Default: ``None``.
    """

    runs: list[Run]
    shared: dict[str, Any]
    alone: list[Run] = field(default_factory=list)
    adapt: Callable[[Store, Engine, bool], Sequence[Run]] | None = None
