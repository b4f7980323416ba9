"""What came of a study that was asked for in Python: tables, figures and the answer, from the study's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from composer_gradmatch.studies.html import as_fragment

__all__ = ["Result"]

#: What of ``verdict.json`` is no number of a table.
_NOT_SHOWN = ("curve", "tuning", "time_to_accuracy")


@dataclass(frozen=True)
class Result:
    """A study's results; a notebook shows the report.

    Attributes:
        study (str): ``"verdict"`` or ``"accuracy"``.
        folder (Path): Where all of it is: ``results.csv``, ``summary.md``, ``report.html``, the figures, the runs.
        figures (dict[str, Figure]): The figures by the names of their files. They are not shown until asked for.
    """

    study: str
    folder: Path
    figures: dict[str, Figure] = field(repr=False)

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each run: its settings, accuracies and times, and what it failed of, if it did."""
        return pd.read_csv(self.folder / "results.csv", keep_default_na=False, na_values={"": "", "nan": ""}).drop(
            columns="config"
        )

    @property
    def summary(self) -> pd.DataFrame:
        """A row for each strategy at each keep: accuracy, cost, and differences with the ends of their intervals."""
        if self.study == "verdict":
            found = json.loads((self.folder / "verdict.json").read_text())
            cells = [*found["candidates"], {"strategy": "full", "keep": 1.0, **found["full"]}]
            shown = [{key: value for key, value in cell.items() if key not in _NOT_SHOWN} for cell in cells]
            return pd.json_normalize(shown, sep="_")
        path = self.folder / "comparisons.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame()

    @property
    def answer(self) -> str:
        """The verdict's sentence; of the accuracy study, a line for each strategy at each keep."""
        if self.study == "verdict":
            return json.loads((self.folder / "verdict.json").read_text())["recommended"]["sentence"]
        _, _, section = self._text.partition("\n## Verdict\n")
        return section.partition("\n## ")[0].strip() or self._text.strip().splitlines()[-1]

    @property
    def _text(self) -> str:
        return (self.folder / "summary.md").read_text()

    def __repr__(self) -> str:
        return f"{self.answer}\n({self.study}, {len(self.frame)} runs, in {self.folder})"

    def _repr_html_(self) -> str:
        """Gives the report, for a notebook."""
        return as_fragment(self._text, self.folder)
