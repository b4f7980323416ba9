"""The page on LLM Foundry keeps its word: its configs and its file run, by LLM Foundry's own command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from documents import PACKAGE, shown_files, write_files
from foundry_files import program, write_config

pytest.importorskip("llmfoundry")

PAGE = (PACKAGE / "train/LLM_FOUNDRY.md").read_text()


@pytest.fixture
def folder(files, tmp_path):
    """A reader's folder, with what the page's prose says that there is."""
    for name in ("chats", "tokenizer"):
        (tmp_path / name).symlink_to(files / name)
    write_files(PAGE, tmp_path)
    return tmp_path


@pytest.mark.parametrize("launcher", [[], ["composer", "-n", "2", "-c"]], ids=["one process", "two"])
def test_the_config_runs(folder, launcher):
    command = ["train", "finetune.yaml", "max_duration=3ba"]
    llmfoundry = str(Path(sys.executable).with_name("llmfoundry"))
    program([*launcher, llmfoundry, *command] if launcher else ["llmfoundry", *command], folder)


def test_samples_are_numbered(folder):
    """With a refresh, which fails without numbers; in the second epoch nothing is due."""
    values = yaml.safe_load(shown_files(PAGE)["finetune.yaml"])
    values.update(yaml.safe_load(shown_files(PAGE)["refresh.yaml"]))
    values.update(max_duration="2ep", log_to_console=True, console_log_interval="1ba")
    values["train_loader"]["name"] = "numbered_finetuning"
    write_config(folder / "refresh.yaml", values)
    said = program(["llmfoundry", "train", "refresh.yaml"], folder)
    looked_at = [line.split()[-1] for line in said.splitlines() if "loss_backprop/fraction_looked_at" in line]
    assert len(looked_at) == 12
    assert set(looked_at[:6]) == {"1.0000"}
    assert set(looked_at[6:]) == {"0.0000"}
