"""The command line: a YAML config and overrides → ``Trainer.fit``.

``python -m composer_gradmatch.train CONFIG [key=value ...]``, or on several processes
``composer -n 2 -m composer_gradmatch.train CONFIG [key=value ...]``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from composer_gradmatch.train.config import ConfigError, load_config
from composer_gradmatch.train.init_config import write_config
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
    parser.add_argument("--init", action="store_true", help="write a commented config to start from, and do no more")
    parser.add_argument("--model", metavar="NAME", help="with --init: the model; default: digits_cnn")
    parser.add_argument("--data", metavar="NAME", help="with --init: the data set; default: digits")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.init and (arguments.model or arguments.data):
        parser.error("--model and --data go with --init; in a config they are model.name and train_loader.name.")
    try:
        load_files(arguments.register)
        if arguments.init:
            return _init(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        train(load_config(arguments.config, arguments.overrides))
    except ConfigError as error:
        print(f"{arguments.config}: the config cannot be run:\n{error}", file=sys.stderr)
        return 2
    return 0


def _init(arguments: argparse.Namespace) -> int:
    """Writes a config, and says how to go on."""
    missing = write_config(
        Path(arguments.config), arguments.model or "digits_cnn", arguments.data or "digits", arguments.overrides
    )
    files = [word for file in arguments.register for word in ("--register", file)]
    command = shlex.join(["python", "-m", "composer_gradmatch.train", arguments.config, *files])
    print(
        f"Wrote {arguments.config}. " + (f"Give {', '.join(missing)} in it, then: " if missing else "Next: ") + command
    )
    return 0
