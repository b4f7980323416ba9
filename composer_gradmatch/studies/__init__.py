"""Does selection pay on my model? The paper's questions on a user's own YAML, or on a function of the user's.

``python -m composer_gradmatch.studies verdict|accuracy|learning-rate|gradient-error|step-time CONFIG --out DIR``; in
Python, ``from composer_gradmatch.studies import verdict, accuracy``.
"""

# The folders of these names first: one that is loaded later would take the function's place.
import composer_gradmatch.studies.accuracy
import composer_gradmatch.studies.verdict  # noqa: F401
from composer_gradmatch.studies.asked import accuracy, verdict

__all__ = ["accuracy", "verdict"]
