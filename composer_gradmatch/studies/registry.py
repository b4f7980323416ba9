"""The studies by name: a new one is a record, with the files it names, and a row here."""

from __future__ import annotations

from composer_gradmatch.studies.accuracy import STUDY as ACCURACY
from composer_gradmatch.studies.gradient_error import STUDY as GRADIENT_ERROR
from composer_gradmatch.studies.learning_rate import STUDY as LEARNING_RATE
from composer_gradmatch.studies.step_time import STUDY as STEP_TIME
from composer_gradmatch.studies.study import Study
from composer_gradmatch.studies.verdict import STUDY as VERDICT

__all__ = ["STUDIES"]

#: Name → study, in the order of the command line.
STUDIES: dict[str, Study] = {
    study.name: study for study in (VERDICT, ACCURACY, LEARNING_RATE, GRADIENT_ERROR, STEP_TIME)
}
