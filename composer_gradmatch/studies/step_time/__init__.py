"""The step-time study: time per step and where it goes."""

from __future__ import annotations

import argparse

from composer_gradmatch.studies.options import add_rounds
from composer_gradmatch.studies.study import Study

__all__ = ["STUDY"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--synthetic", action="store_true", help="random tensors of the data set's shape")
    add_rounds(parser)


STUDY = Study(
    name="step-time",
    help="time per step and where it goes (Table 1)",
    strategies=("full", "random", "selective_backprop", "loss", "gradmatch"),
    keeps=(0.1, 0.3, 0.5),
    options=_add_options,
    plan="composer_gradmatch.studies.step_time.plan:plan_step_time",
    task="composer_gradmatch.studies.step_time.task:time_steps",
    report="composer_gradmatch.studies.step_time.report:report_step_time",
)
