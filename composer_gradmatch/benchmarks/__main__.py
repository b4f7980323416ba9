"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_gradmatch.benchmarks.looks import FILLS, measure_looks
from composer_gradmatch.benchmarks.memory import measure_memory
from composer_gradmatch.benchmarks.models import MODELS
from composer_gradmatch.benchmarks.omp import SIZES, measure_omp
from composer_gradmatch.benchmarks.solvers import measure_greedy, measure_solvers
from composer_gradmatch.benchmarks.store import measure_store
from composer_gradmatch.candidates.refresh import check_refresh
from composer_gradmatch.train.config import ConfigError, load_config
from composer_gradmatch.train.trainer import expect_small_batches

__all__ = ["main"]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, exclusive; got {text!r}")
    return value


def _size(text: str) -> tuple[int, int]:
    samples, _, picks = text.partition(",")
    size = _positive(samples), _positive(picks)
    if size[1] > size[0]:
        raise argparse.ArgumentTypeError(f"expected m of at most M in M,m; got {text!r}")
    return size


def _refresh(text: str) -> str:
    if text != "never":
        try:
            check_refresh(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a time such as 5ep, or never: {error}") from error
    return text


def _parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, metavar="FILE", help="a CSV file for the table")
    parser = argparse.ArgumentParser(prog="python -m composer_gradmatch.benchmarks")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    omp = benchmarks.add_parser("omp", parents=[out], help="matching pursuit beside the peers that are installed")
    omp.add_argument("--sizes", nargs="+", type=_size, default=SIZES, metavar="M,m", help="default: %(default)s")
    omp.add_argument("--rounds", type=_positive, default=15, help="turns of each, of five calls; default: %(default)s")
    memory = benchmarks.add_parser(
        "memory", parents=[out], help="peak memory of the selection pass and of the training step"
    )
    models = {"nargs": "+", "choices": list(MODELS), "default": ["resnet18_cifar", "causal_lm"]}
    memory.add_argument("--models", **models, help="default: %(default)s")
    memory.add_argument("--samples", nargs="+", type=_positive, default=[], metavar="M", help="default: each model's")
    picked = memory.add_mutually_exclusive_group()
    picked.add_argument("--picks", type=_positive, metavar="m", help="default: each model's")
    picked.add_argument("--keep", nargs="+", type=_fraction, default=[], metavar="FRACTION", help="m = int(keep*M)")
    solvers = benchmarks.add_parser("solvers", parents=[out], help="error and time of each solver")
    solvers.add_argument("--samples", type=_positive, default=128, metavar="M", help="default: %(default)s")
    greedy = benchmarks.add_parser("greedy", parents=[out], help="error of each solver relative to the exact optimum's")
    greedy.add_argument("--samples", type=_positive, default=16, metavar="M", help="at most 16; default: %(default)s")
    for each, count in ((solvers, 20), (greedy, 50)):
        each.add_argument("--minibatches", type=_positive, default=count, help="default: %(default)s")
    looks = benchmarks.add_parser("looks", parents=[out], help="picks from stored looks beside those of a full look")
    refreshes = ["1ep", "2ep", "5ep", "10ep", "never"]
    looks.add_argument("--refresh", nargs="+", type=_refresh, default=refreshes, help="default: 1ep 2ep 5ep 10ep never")
    looks.add_argument(
        "--fill", nargs="+", choices=FILLS, default=["32"], help="rows of a look under BatchNorm; default: 32"
    )
    store = benchmarks.add_parser("store", parents=[out], help="size of a store of looks, and what it loses")
    store.add_argument("--width", nargs="+", type=_positive, default=[16, 64, 256], help="default: 16 64 256")
    store.add_argument("--samples", type=_positive, default=50_000, metavar="N", help="default: %(default)s")
    for each in (looks, store):
        each.add_argument("config", type=Path, metavar="CONFIG", help="a YAML config")
        each.add_argument("overrides", nargs="*", metavar="key=value", help="in the config")
        each.add_argument("--keep", type=_fraction, default=0.1, metavar="FRACTION", help="default: 0.1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: prints a table, and writes it as CSV with ``--out``; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        rows = _measure(parser, arguments)
    except ConfigError as error:
        parser.error(str(error))
    print(_table(rows))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def _measure(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.benchmark == "omp":
        rows = measure_omp(arguments.sizes, arguments.rounds)
    elif arguments.benchmark == "solvers":
        rows = measure_solvers(arguments.samples, count=arguments.minibatches)
    elif arguments.benchmark == "greedy":
        if not 2 <= arguments.samples <= 16:
            parser.error(f"--samples: expected 2 to 16, for all subsets to be tried; got {arguments.samples}")
        picks = sorted({max(1, arguments.samples * i // 8) for i in (1, 2, 3, 4)})
        rows = measure_greedy(arguments.samples, picks, arguments.minibatches)
    elif arguments.benchmark == "memory":
        _check_sizes(parser, arguments)
        expect_small_batches()
        rows = measure_memory(arguments.models, arguments.samples, arguments.picks, arguments.keep)
    else:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.benchmark == "looks":
            return measure_looks(config, arguments.refresh, arguments.fill, arguments.keep)
        rows = measure_store(config, arguments.width, arguments.keep, arguments.samples)
    return rows


def _check_sizes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Sees to it that each minibatch of ``memory`` is larger than what is picked from it."""
    for name in arguments.models:
        model = MODELS[name]
        smallest = min(arguments.samples or model.samples)
        if arguments.keep:
            if smallest < 2:
                parser.error(f"--samples: expected at least 2, of which --keep leaves fewer; got {smallest}")
        elif (picks := arguments.picks or model.picks) >= smallest:
            parser.error(f"--picks: expected fewer than the smallest minibatch of {name}, {smallest}; got {picks}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    sys.exit(main())
