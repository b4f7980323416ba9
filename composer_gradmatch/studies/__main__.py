"""The command line of the studies."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from composer_gradmatch.studies import picks
from composer_gradmatch.studies.options import add_engine, fraction
from composer_gradmatch.studies.registry import STUDIES
from composer_gradmatch.studies.strategies import all_strategies
from composer_gradmatch.studies.study import Study
from composer_gradmatch.train.config import ConfigError, load_config, nearest
from composer_gradmatch.train.register_files import add_register, load_files, take_register

__all__ = ["main"]


def _strategy(text: str) -> str:
    strategies = all_strategies()
    if text not in strategies:
        raise argparse.ArgumentTypeError(f"unknown strategy {text!r}; {nearest(text, strategies)}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m composer_gradmatch.studies",
        description="Does selection pay on my model and data, and with which strategy?",
        epilog="A study that was stopped goes on where it was when it is started again.",
    )
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for study in STUDIES.values():
        own = studies.add_parser(study.name, help=study.help, description=study.help)
        _add_shared(own, study)
        study.options(own)
    picks.add_parser(studies)
    return parser


def _add_shared(parser: argparse.ArgumentParser, study: Study) -> None:
    """Adds the options that every study has."""
    parser.add_argument("config", help="a YAML file")
    # Taken out of the command line before it is parsed, so that they may stand anywhere.
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
    parser.add_argument("--out", type=Path, required=True, help="the folder for results")
    parser.add_argument(
        "--strategies",
        nargs="+",
        type=_strategy,
        default=list(study.strategies),
        metavar="NAME",
        help=f"of {', '.join(all_strategies())}; default: {' '.join(study.strategies)}",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        type=fraction,
        default=list(study.keeps),
        metavar="FRACTION",
        help=f"fractions of the minibatch; default: {' '.join(map(str, study.keeps))}",
    )
    add_register(parser)
    add_engine(parser)
    parser.add_argument("--retry-failed", action="store_true", help="make runs that failed once more")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: returns the exit code, 2 for what cannot be run, 1 if every run failed."""
    files, words = take_register(sys.argv[1:] if argv is None else argv)
    try:
        load_files(files)  # First: the names of strategies depend on them.
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if words[:1] == [picks.NAME]:
        return picks.run(_parser().parse_args(words))
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    arguments = _parser().parse_args([word for word in words if word not in overrides])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("A study starts its own processes: run it without the launcher, with --jobs N.", file=sys.stderr)
        return 2
    try:
        config = load_config(arguments.config, [*arguments.overrides, *overrides])
        # Pandas, seaborn and matplotlib come with the extra; --help and errors in the config need none of them.
        from composer_gradmatch.studies.run_study import run_study

        STUDIES[arguments.study].load()
    except ConfigError as error:
        print(f"{arguments.config}: the study cannot be run:\n{error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"{error}. The studies need: pip install 'composer-gradmatch[studies]'", file=sys.stderr)
        return 2
    options = {
        name: value for name, value in vars(arguments).items() if name not in ("config", "overrides", "register")
    }
    options |= {name: list(dict.fromkeys(options[name])) for name in ("strategies", "keep")}
    try:
        command = f"python -m composer_gradmatch.studies {shlex.join(words)}"
        return run_study(config, Path(arguments.config).stem, command=command, **options)
    except ConfigError as error:
        print(f"{arguments.config}: the study cannot be run:\n{error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # Composer turns SIGINT and SIGTERM into SystemExit(128 + signal).
        try:
            print("\nStopped. The same command goes on from here.", file=sys.stderr, flush=True)
        finally:  # Also where nobody reads what is printed any more.
            # Workers follow at once; waiting for their runs is what the user did not want.
            os._exit(stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130)


if __name__ == "__main__":
    sys.exit(main())
