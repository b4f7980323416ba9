"""The verdict: what to switch on and what it saves, within a budget."""

from __future__ import annotations

import argparse

from composer_gradmatch.studies.options import add_label_noise, add_metric, duration, factor, fraction, natural
from composer_gradmatch.studies.study import Study

__all__ = ["STUDY"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=duration, required=True, help="the time for all of it: 2h, 90m, 1h30m, 300s")
    parser.add_argument(
        "--margin",
        type=factor,
        default=0.005,
        metavar="ACCURACY",
        help="so much less accurate than the full batch is as good; default: 0.005",
    )
    parser.add_argument(
        "--confidence",
        type=fraction,
        default=0.95,
        metavar="FRACTION",
        help="the probability that nothing that is called decided is wrong; default: 0.95",
    )
    parser.add_argument(
        "--validation",
        type=fraction,
        default=0.1,
        metavar="FRACTION",
        help="the part of the training set that learning rates are chosen on; default: 0.1",
    )
    parser.add_argument("--seed", type=natural, default=0, help="the first of the seeds; default: 0")
    add_label_noise(parser)
    add_metric(parser)


STUDY = Study(
    name="verdict",
    help="what to switch on, and what it saves, within a budget of time",
    strategies=("full", "random", "gradmatch", "loss"),
    keeps=(0.1, 0.3),
    options=_add_options,
    plan="composer_gradmatch.studies.verdict.plan:plan_verdict",
    task="composer_gradmatch.studies.training:training",
    report="composer_gradmatch.studies.verdict.report:report_verdict",
)
