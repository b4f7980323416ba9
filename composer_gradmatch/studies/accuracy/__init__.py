"""The accuracy study: test accuracy at equal keep and at equal cost."""

from __future__ import annotations

import argparse

from composer_gradmatch.studies.options import add_metric, add_rounds, add_seeds, fraction
from composer_gradmatch.studies.study import Study

__all__ = ["STUDY"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_seeds(parser)
    parser.add_argument(
        "--batch-size",
        choices=("fixed", "scaled"),
        default="fixed",
        help="forward M samples whatever is kept, or M/keep; default: fixed",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose each strategy's learning rate at each keep first, by successive halving on a validation part",
    )
    parser.add_argument(
        "--validation",
        type=fraction,
        default=0.1,
        metavar="FRACTION",
        help="with --tune, the part of the training set that learning rates are chosen on; default: 0.1",
    )
    add_metric(parser)
    add_rounds(parser)


STUDY = Study(
    name="accuracy",
    help="test accuracy at equal keep and at equal cost",
    strategies=("gradmatch", "loss", "random", "full"),
    keeps=(0.05, 0.1, 0.3, 0.5),
    options=_add_options,
    plan="composer_gradmatch.studies.accuracy.plan:plan_accuracy",
    task="composer_gradmatch.studies.training:training",
    report="composer_gradmatch.studies.accuracy.report:report_accuracy",
)
