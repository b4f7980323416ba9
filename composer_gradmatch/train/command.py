"""The command line: a YAML config and overrides → ``Trainer.fit``.

``python -m composer_gradmatch.train CONFIG [key=value ...]``, or on several processes
``composer -n 2 -m composer_gradmatch.train CONFIG [key=value ...]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from composer_gradmatch.train.config import ConfigError, load_config
from composer_gradmatch.train.register_files import add_register, load_files
from composer_gradmatch.train.trainer import train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: returns the exit code, 2 for a config that cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m composer_gradmatch.train",
        description="Train a model as a YAML config says, with gradient matching or another selection strategy.",
        epilog="Example: composer -n 2 -m composer_gradmatch.train configs/digits.yaml algorithms.gradmatch=false",
    )
    parser.add_argument("config", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a value: algorithms.gradmatch.keep=0.1"
    )
    add_register(parser)
    arguments = parser.parse_intermixed_args(argv)
    try:
        load_files(arguments.register)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        train(load_config(arguments.config, arguments.overrides))
    except ConfigError as error:
        print(f"{arguments.config}: the config cannot be run:\n{error}", file=sys.stderr)
        return 2
    return 0
