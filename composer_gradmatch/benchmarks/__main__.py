"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_gradmatch.benchmarks.memory import measure_memory
from composer_gradmatch.benchmarks.models import MODELS

__all__ = ["main"]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prints a table, and writes it as CSV with ``--out``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m composer_gradmatch.benchmarks")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    memory = benchmarks.add_parser("memory", help="peak memory of the selection pass and of the training step")
    memory.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    memory.add_argument("--samples", nargs="+", type=_positive, default=[], metavar="M", help="default: each model's")
    memory.add_argument("--picks", type=_positive, metavar="m", help="default: each model's")
    memory.add_argument("--out", type=Path, metavar="FILE", help="a CSV file for the table")
    arguments = parser.parse_args(argv)
    smallest = min(arguments.samples or [size for name in arguments.models for size in MODELS[name].samples])
    if arguments.picks is not None and arguments.picks >= smallest:
        parser.error(f"--picks: expected fewer than the smallest minibatch, {smallest}; got {arguments.picks}")
    # Fewer samples than a microbatch, or other work that keeps what it selects: said of each step.
    warnings.filterwarnings("ignore", "Cannot split tensor of length", UserWarning)
    rows = measure_memory(arguments.models, arguments.samples, arguments.picks)
    print(_table(rows))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([f"{v:.0f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    sys.exit(main())
