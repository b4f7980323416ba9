"""The page on one's own model, as a reader goes through it: in an empty folder, with nothing but the package."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from documents import PACKAGE, blocks, commands, write_files

import composer_gradmatch.studies.__main__ as studies
from composer_gradmatch.studies.building import ByNames
from composer_gradmatch.train.command import main as train

PAGE = (PACKAGE / "train/OWN_MODEL.md").read_text()
COMMANDS = [words for block in blocks(PAGE) if block.language == "bash" for words in commands(block.code)]
SHORT = ["max_duration=2ep", "progress_bar=false"]
MAIN = {"composer_gradmatch.train": train, "composer_gradmatch.studies": studies.main}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(PAGE, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"my_task.py", "my_rule.py"}
    return tmp_path


def test_the_page_from_beginning_to_end(folder, monkeypatch, capsys, nothing_registered):
    monkeypatch.setattr(ByNames, "here", True)
    for words in COMMANDS:
        if words[0].endswith("composer") or "verdict" in words:
            continue  # They start processes.
        module, arguments = words[2], words[3:]
        few = ["--seeds", "1", "--keep", "0.3"] if module.endswith("studies") else []
        few += ["--strategies", "random", "gradmatch"] if few and "--strategies" not in words else []
        assert MAIN[module]([*arguments, *few, *(() if "--init" in words else SHORT)]) == 0, words
    said = capsys.readouterr().out
    assert "Wrote my_task.yaml. Next: python -m composer_gradmatch.train my_task.yaml --register my_task.py" in said
    first, _ = (folder / "runs/my_task/config.yaml").read_text().split("\n", 1)
    assert first.startswith(f"# --register {folder}/my_task.py, SHA-256 ")
    results = (folder / "my_rules_answer/results.csv").read_text()
    assert "middle_losses" in results
    assert "registered my_rule.py" in results
    assert "## Against random" in (folder / "my_answer/summary.md").read_text()


def test_the_page_counts_its_lines():
    code = [block.code for block in blocks(PAGE)][:3]
    assert sum(len([line for line in each.splitlines() if line.strip()]) for each in code) <= 24
    assert "about twenty lines" in " ".join(PAGE.split())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_by_the_commands_themselves(folder):
    """Also on two processes, and in a study's own."""
    for words in COMMANDS:
        few = [] if "--init" in words else [*SHORT]
        few += ["--seeds", "1", "--keep", "0.3"] if "accuracy" in words else []
        few += ["--budget", "30s", "--keep", "0.3"] if "verdict" in words else []
        start = words[1:] if words[0].endswith("python") else ["-m", "composer.cli.launcher", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *start, *few], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
