"""The command line of the studies."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_gradmatch.studies.strategies import STRATEGIES
from composer_gradmatch.train.config import ConfigError, load_config, nearest

__all__ = ["main"]


def _number(kind: Callable[[str], Any], valid: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _strategy(text: str) -> str:
    if text not in STRATEGIES:
        raise argparse.ArgumentTypeError(f"unknown strategy {text!r}; {nearest(text, STRATEGIES)}")
    return text


_positive = _number(int, lambda value: value > 0, "a positive integer")
_fraction = _number(float, lambda value: 0 < value < 1, "a fraction in (0, 1)")
_factor = _number(float, lambda value: 0 < value < float("inf"), "a positive number")
_noise = _number(float, lambda value: 0 <= value <= 1, "a fraction in [0, 1]")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m composer_gradmatch.studies",
        description="Does selection pay on my model and data, and with which strategy?",
        epilog="A study that was stopped goes on where it was when it is started again.",
    )
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")

    def add(name: str, text: str, strategies: list[str], keeps: list[float], seeds: bool = True) -> Any:
        study = studies.add_parser(name, help=text, description=text)
        study.add_argument("config", help="a YAML file")
        # Taken out of the command line before it is parsed, so that they may stand anywhere.
        study.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
        study.add_argument("--out", type=Path, required=True, help="the folder for results")
        listed = " ".join(strategies)
        study.add_argument(
            "--strategies",
            nargs="+",
            type=_strategy,
            default=strategies,
            metavar="NAME",
            help=f"of {', '.join(STRATEGIES)}; default: {listed}",
        )
        study.add_argument(
            "--keep",
            nargs="+",
            type=_fraction,
            default=keeps,
            metavar="FRACTION",
            help=f"fractions of the minibatch; default: {' '.join(map(str, keeps))}",
        )
        study.add_argument("--retry-failed", action="store_true", help="make runs that failed once more")
        if seeds:
            study.add_argument("--seeds", type=_positive, default=3, help="seeds 0 to N-1; default: 3")
            study.add_argument("--jobs", type=_positive, default=1, help="runs at a time, in processes; default: 1")
            study.add_argument(
                "--label-noise",
                type=_noise,
                default=0.0,
                metavar="FRACTION",
                help="reassign the labels of this part of the training set at random; default: 0",
            )
        return study

    compared = ["gradmatch", "loss", "random", "full"]
    accuracy = add("accuracy", "test accuracy at equal keep and at equal cost", compared, [0.05, 0.1, 0.3, 0.5])
    accuracy.add_argument(
        "--batch-size",
        choices=("fixed", "scaled"),
        default="fixed",
        help="forward M samples whatever is kept, or M/keep; default: fixed",
    )
    rates = add("learning-rate", "test accuracy over a factor of the learning rate (App. C.4)", compared, [0.3])
    rates.add_argument(
        "--factors",
        nargs="+",
        type=_factor,
        default=[round(float(f), 4) for f in np.logspace(-1, 1, 9)],
        metavar="BETA",
        help="default: 9 on a logarithmic grid from 0.1 to 10",
    )
    for study in (accuracy, rates):
        study.add_argument("--metric", help="the evaluation metric; default: the one with Accuracy in its name")
    errors = add(
        "gradient-error", "distance of each strategy's gradient to the full data's (§5.3)", compared, [0.1, 0.3]
    )
    errors.add_argument("--minibatches", type=_positive, default=200, help="for each seed; default: 200")
    errors.add_argument("--checkpoint", default="", metavar="PATH", help="weights to load; default: at initialisation")
    errors.add_argument(
        "--mode",
        choices=("train", "eval"),
        default="train",
        help="of BatchNorm and dropout: as in a training step, or as in evaluation; default: train",
    )
    times = add(
        "step-time",
        "time per step and where it goes (Table 1)",
        ["full", "random", "selective_backprop", "loss", "gradmatch"],
        [0.1, 0.3, 0.5],
        seeds=False,
    )
    times.add_argument("--synthetic", action="store_true", help="random tensors of the data set's shape")
    for study in (accuracy, times):
        study.add_argument("--rounds", type=_positive, default=10, help="timed steps of each strategy; default: 10")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: returns the exit code, 2 for what cannot be run, 1 if every run failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    arguments = _parser().parse_args([word for word in words if word not in overrides])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("A study starts its own processes: run it without the launcher, with --jobs N.", file=sys.stderr)
        return 2
    try:
        config = load_config(arguments.config, [*arguments.overrides, *overrides])
        # Pandas, seaborn and matplotlib come with the extra; --help and errors in the config need none of them.
        from composer_gradmatch.studies.run_study import run_study
    except ConfigError as error:
        print(f"{arguments.config}: the study cannot be run:\n{error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"{error}. The studies need: pip install 'composer-gradmatch[studies]'", file=sys.stderr)
        return 2
    options = {name: value for name, value in vars(arguments).items() if name not in ("config", "overrides")}
    options |= {name: list(dict.fromkeys(options[name])) for name in ("strategies", "keep")}
    try:
        return run_study(config, Path(arguments.config).stem, **options)
    except ConfigError as error:
        print(f"{arguments.config}: the study cannot be run:\n{error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # Composer turns SIGINT and SIGTERM into SystemExit(128 + signal).
        print("\nStopped. The same command goes on from here.", file=sys.stderr, flush=True)
        # Workers follow at once; waiting for their runs is what the user did not want.
        os._exit(stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130)


if __name__ == "__main__":
    sys.exit(main())
