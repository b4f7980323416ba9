"""The gradient-error study: how far each strategy's gradient is from the full one, and what that error is made of."""

from __future__ import annotations

import argparse

from composer_gradmatch.studies.options import add_seeds, epochs, positive
from composer_gradmatch.studies.study import Study

__all__ = ["STUDY"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_seeds(parser)
    parser.add_argument("--minibatches", type=positive, default=200, help="for each seed; default: 200")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=("data", "minibatch"),
        help="data: the distance of training steps to the full data's gradient; minibatch: what the error against the "
        "minibatch's gradient is made of, from explicit gradients of each sample; default: both, but only data where "
        "these would take more than 4 GiB",
    )
    parser.add_argument(
        "--after",
        nargs="+",
        type=epochs,
        default=[0],
        metavar="EPOCHS",
        help="compare after epochs of training on the full batch; default: 0, at initialisation or the checkpoint",
    )
    parser.add_argument(
        "--draws", type=positive, default=8, help="of each minibatch's subset, against the minibatch; default: 8"
    )
    parser.add_argument("--checkpoint", default="", metavar="PATH", help="weights to load; default: at initialisation")
    parser.add_argument(
        "--mode",
        choices=("train", "eval"),
        default="train",
        help="of BatchNorm and dropout, against the data: as in a training step, or as in evaluation; default: train",
    )


STUDY = Study(
    name="gradient-error",
    help="distance of each strategy's gradient to the full data's (§5.3), and what its error is made of",
    strategies=("gradmatch", "loss", "random", "full"),
    keeps=(0.1, 0.3),
    options=_add_options,
    plan="composer_gradmatch.studies.gradient_error.plan:plan_gradient_error",
    task="composer_gradmatch.studies.gradient_error.task:gradient_error_run",
    report="composer_gradmatch.studies.gradient_error.report:report_gradient_error",
)
