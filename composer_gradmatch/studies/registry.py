"""The studies by name: a new one is a record, with the files it names, and a row here."""

from __future__ import annotations

from composer_gradmatch.studies import accuracy, gradient_error, learning_rate, step_time, verdict
from composer_gradmatch.studies.study import Study

__all__ = ["STUDIES"]

#: Name → study, in the order of the command line.
STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY for module in (verdict, accuracy, learning_rate, gradient_error, step_time)
}
