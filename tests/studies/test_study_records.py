"""Studies are records: what one more of them changes on the command line and in its folder."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import made_up_study
import pytest

from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.registry import STUDIES
from composer_gradmatch.studies.strategies import STRATEGIES

DIGITS = str(Path(__file__).resolve().parents[2] / "configs" / "digits.yaml")


def test_a_row_is_all_that_a_study_needs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["made-up", DIGITS, "--out", str(out), "--keep", "0.5", "0.25", "--seeds", "1", "--answer", "8"]
    with pytest.raises(SystemExit):
        main(command)
    assert "invalid choice: 'made-up'" in capsys.readouterr().err
    monkeypatch.setitem(STUDIES, "made-up", made_up_study.STUDY)
    assert main(command) == 0
    assert "| random | 0.25 |" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert sorted((row["strategy"], row["keep"], row["product"], row["status"]) for row in rows) == [
        ("full", "1.0", "", "failed"),
        ("random", "0.25", "2.0", "done"),
        ("random", "0.5", "4.0", "done"),
    ]
    assert [row["error"] for row in rows if row["status"] == "failed"] == ["ValueError: as told"]
    assert json.loads((out / "study.json").read_text())["answer"] == 8
    assert (out / "made_up.png").read_bytes() == b"a figure"
    assert main([*command[:-1], "9"]) == 2
    assert "holds another study; different: answer (8, now 9)" in capsys.readouterr().err


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_names_what_there_is(study):
    assert STUDIES[study.name] is study
    assert [part.__name__.split("_")[0] for part in study.load()][::2] == ["plan", "report"]
    assert set(study.strategies) <= set(STRATEGIES)


def test_the_help_needs_no_extra_and_a_study_says_what_it_needs(tmp_path):
    program = f"""
import sys
for name in ("pandas", "seaborn"):
    sys.modules[name] = None  # As if it were not installed.
from composer_gradmatch.studies.__main__ import main
try:
    main(["step-time", "--help"])
except SystemExit as end:
    assert end.code == 0
sys.exit(main(["step-time", {DIGITS!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert "--synthetic" in done.stdout
    assert "The studies need: pip install 'composer-gradmatch[studies]'" in done.stderr
    assert not (tmp_path / "out").exists()
