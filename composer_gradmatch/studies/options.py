"""Options of the command line that several studies have, and the numbers that they take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from composer_gradmatch.studies.engines import ENGINES

__all__ = [
    "add_engine",
    "add_label_noise",
    "add_metric",
    "add_rounds",
    "add_seeds",
    "duration",
    "epochs",
    "factor",
    "fraction",
    "natural",
    "noise",
    "positive",
]


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


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip().lower())
    if found is None or not any(found.groups()):
        raise ValueError(text)
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


duration = _number(_seconds, lambda value: value > 0, "a time such as 2h, 90m, 1h30m or 300s")
natural = _number(int, lambda value: 0 <= value < 2**31, "a whole number from 0 to 2^31")
positive = _number(int, lambda value: value > 0, "a positive integer")
epochs = _number(int, lambda value: value >= 0, "a number of epochs, 0 or more")
fraction = _number(float, lambda value: 0 < value < 1, "a fraction in (0, 1)")
factor = _number(float, lambda value: 0 < value < float("inf"), "a positive number")
noise = _number(float, lambda value: 0 <= value <= 1, "a fraction in [0, 1]")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds where runs are made."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="make runs in processes of this machine, or on a Ray cluster; default: local",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="with --engine ray, where Ray listens; default: RAY_ADDRESS, or else the cluster that this machine is a "
        "node of, or one that is started on this machine alone",
    )


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Adds what studies with several runs have: their seeds, how many run at a time, and label noise."""
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0 to N-1; default: 3")
    parser.add_argument(
        "--jobs",
        type=positive,
        help="runs at a time; default: 1, with --engine ray one for each GPU, or for each node where there are none",
    )
    add_label_noise(parser)


def add_label_noise(parser: argparse.ArgumentParser) -> None:
    """Adds the share of noisy labels."""
    parser.add_argument(
        "--label-noise",
        type=noise,
        default=0.0,
        metavar="FRACTION",
        help="reassign the labels of this part of the training set at random; default: 0",
    )


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Adds the metric that accuracies are taken from."""
    parser.add_argument("--metric", help="the evaluation metric; default: the one with Accuracy in its name")


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Adds how often steps are timed."""
    parser.add_argument("--rounds", type=positive, default=10, help="timed steps of each strategy; default: 10")
