"""The gradient-error study: the distance of each strategy's gradient to the full data's."""

from __future__ import annotations

import argparse

from composer_gradmatch.studies.options import add_seeds, positive
from composer_gradmatch.studies.study import Study

__all__ = ["STUDY"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_seeds(parser)
    parser.add_argument("--minibatches", type=positive, default=200, help="for each seed; default: 200")
    parser.add_argument("--checkpoint", default="", metavar="PATH", help="weights to load; default: at initialisation")
    parser.add_argument(
        "--mode",
        choices=("train", "eval"),
        default="train",
        help="of BatchNorm and dropout: as in a training step, or as in evaluation; default: train",
    )


STUDY = Study(
    name="gradient-error",
    help="distance of each strategy's gradient to the full data's (§5.3)",
    strategies=("gradmatch", "loss", "random", "full"),
    keeps=(0.1, 0.3),
    options=_add_options,
    plan="composer_gradmatch.studies.gradient_error.plan:plan_gradient_error",
    task="composer_gradmatch.studies.gradient_error.measure:gradient_error",
    report="composer_gradmatch.studies.gradient_error.report:report_gradient_error",
)
