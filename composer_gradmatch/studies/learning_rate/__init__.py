"""The learning-rate study: test accuracy over a factor of the learning rate."""

from __future__ import annotations

import argparse

import numpy as np

from composer_gradmatch.studies.options import add_metric, add_seeds, factor
from composer_gradmatch.studies.study import Study

__all__ = ["STUDY"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_seeds(parser)
    parser.add_argument(
        "--factors",
        nargs="+",
        type=factor,
        default=[round(float(f), 4) for f in np.logspace(-1, 1, 9)],
        metavar="BETA",
        help="default: 9 on a logarithmic grid from 0.1 to 10",
    )
    add_metric(parser)


STUDY = Study(
    name="learning-rate",
    help="test accuracy over a factor of the learning rate (App. C.4)",
    strategies=("gradmatch", "loss", "random", "full"),
    keeps=(0.3,),
    options=_add_options,
    plan="composer_gradmatch.studies.learning_rate.plan:plan_learning_rate",
    task="composer_gradmatch.studies.training:training",
    report="composer_gradmatch.studies.learning_rate.report:report_learning_rate",
)
