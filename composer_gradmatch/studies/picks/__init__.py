"""Who was picked: reads what ``selection_log`` wrote in a run's folder. Nothing is trained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from composer_gradmatch.studies.options import positive
from composer_gradmatch.train.config import ConfigError

__all__ = ["NAME", "add_parser", "run"]

NAME = "picks"
_HELP = "who was picked in a run with a selection_log: images or texts, classes, wrong labels"


def add_parser(commands: Any) -> None:
    """Adds the command to those of the studies.

    Args:
        commands (argparse._SubParsersAction): Theirs.
    """
    parser: argparse.ArgumentParser = commands.add_parser(NAME, help=_HELP, description=_HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, help="the folder for results; default: picks in RUN")
    parser.add_argument("--samples", type=positive, default=32, metavar="N", help="how many to draw; default: 32")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command: returns the exit code, 2 for what cannot be run."""
    try:
        from composer_gradmatch.studies.picks import report  # Needs the extra; --help does not.
    except ImportError as error:
        print(f"{error}. The studies need: pip install 'composer-gradmatch[studies]'", file=sys.stderr)
        return 2
    out = arguments.run / NAME if arguments.out is None else arguments.out
    try:
        summary = report.report_picks(arguments.run, out, arguments.samples)
    except ConfigError as error:
        print(f"{arguments.run}: its picks cannot be shown: {error}", file=sys.stderr)
        return 2
    print(summary)
    print(f"Figures and samples.csv are in {out}.")
    return 0
