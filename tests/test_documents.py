"""The READMEs and CONTRIBUTING keep their word: every example runs, every link, figure, command and option is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import MLP, loader
from documents import (
    DOCUMENTS,
    PACKAGE,
    ROOT,
    all_help,
    block_problems,
    blocks,
    command_problems,
    commands,
    file_problems,
    link_problems,
    option_problems,
    override_problems,
    run_python,
    width_problems,
    write_files,
    yaml_problems,
)
from test_imports import MAY_IMPORT

import composer_gradmatch

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
CONTRIBUTING = ROOT / ".github/CONTRIBUTING.md"
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


@pytest.fixture(scope="module")
def known():
    return all_help()


@pytest.fixture
def names():
    """What a reader's own program has: a model with a linear output layer, its data and its optimizer.

    Each document begins with these names, and its Python blocks run in order, each with the names of those before it.
    """
    model = MLP.model()
    return {
        "model": model,
        "train_dataloader": loader(MLP.data(16), 8),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch, nothing_registered):
    """A reader's folder: what is in the repository is there, and what a document's commands write is not in it."""
    for each in ROOT.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@every_document
def test_every_python_block_runs(path, names, tmp_path, monkeypatch, nothing_registered):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    assert run_python(text, path, names) == text.count("```python")


@every_document
def test_every_block_is_of_a_kind_that_is_tested(path):
    assert block_problems(path.read_text()) == []


@every_document
def test_every_link_and_figure_is_there(path):
    assert link_problems(path.read_text(), path) == []


@every_document
def test_every_command_could_be_started(path, folder):
    write_files(path.read_text(), folder)
    assert command_problems(path.read_text()) == []


@every_document
def test_every_yaml_block_is_a_config(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert yaml_problems(path.read_text()) == []


@every_document
def test_what_the_prose_names_is_there(path, known, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert option_problems(text, known) + file_problems(text, path) + override_problems(text) == []


@every_document
def test_lines_can_be_read_in_a_terminal(path):
    assert width_problems(path.read_text(), tables_too=path == ROOT / "README.md") == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 135


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_has_a_readme_that_the_first_one_and_contributing_link_to(folder):
    assert (folder / "README.md").is_file()
    assert (Path(composer_gradmatch.__file__).parent / folder.name / "README.md").is_file(), "not in the wheel"
    target = f"composer_gradmatch/{folder.name}/README.md"
    assert target in (ROOT / "README.md").read_text()
    assert target in CONTRIBUTING.read_text()


def test_contributing_has_the_table_of_imports():
    rows = re.findall(r"^\| (?:\[|`)(\w+)(?:/\]\S+|\.py`) \|.*\| ([\w, ]*)\|$", CONTRIBUTING.read_text(), re.MULTILINE)
    told = {folder: {folder, *filter(None, others.strip().split(", "))} for folder, others in rows}
    assert told == {folder: others for folder, others in MAY_IMPORT.items() if folder != "__init__"}


def test_every_figure_is_shown():
    shown = "".join(path.read_text() for path in DOCUMENTS)
    assert [figure.name for figure in (ROOT / ".github/figures").iterdir() if figure.name not in shown] == []


def test_the_ci_finds_the_test_command():
    _, marked = (ROOT / "README.md").read_text().split("<!-- test command -->\n")
    block = blocks(marked)[0]
    assert block.line == 2
    assert list(commands(block.code))[-1] == [".venv/bin/pytest"]
    assert len(block.code.splitlines()) == 1


# These tests can fail: one broken example for each kind of promise.


def bash(command):
    return f"```bash\n{command}\n```\n"


TRAIN, STUDY = "python -m composer_gradmatch.train", "python -m composer_gradmatch.studies"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bash(f"{TRAIN} configs/digit.yaml"), "There is no config file"),
        (bash(f"{TRAIN} configs/digits.yaml --fast"), "unrecognized arguments: --fast"),
        (bash(f"{TRAIN} configs/digits.yaml algorithms.gradmatch.kep=0.1"), "algorithms.gradmatch.kep: unknown key"),
        (bash(f"{TRAIN} configs/digits.yaml \\\n    max_duration=soon"), "max_duration"),
        (bash("composer -n 2 -m composer_gradmatch.train configs/digits.yaml sed=1"), "sed: unknown key"),
        (bash("composer -n 2 configs/digits.yaml"), "expected -m"),
        (bash("composer --processes 2 -m composer_gradmatch.train configs/digits.yaml"), "unrecognized arguments"),
        (bash(f"{STUDY} precision configs/digits.yaml --out studies/x"), "invalid choice: 'precision'"),
        (bash(f"{STUDY} accuracy configs/digits.yaml --out x --strategies best"), "unknown strategy 'best'"),
        (bash(f'A="--kep 0.1"\n{STUDY} accuracy configs/digits.yaml --out x $A'), "unrecognized arguments: --kep 0.1"),
        (bash(f"{STUDY} accuracy configs/digits.yaml model.depth=3 --out x"), "model.depth: unknown key"),
        (bash("python -m composer_gradmatch.benchmarks memory --models vgg"), "invalid choice: 'vgg'"),
        (bash("python -m composer_gradmatch.tune configs/digits.yaml"), "no test knows this command"),
        (bash("cd configs && ls"), "no test knows this command"),
        (bash("pip install '.[quick]'"), "there is no extra 'quick'"),
        (bash("pip install composer_gradmatch && pip instal ."), "pip cannot install this"),
        (bash("pytest tests/all"), "there is no tests/all"),
        (bash("pytest -k no-such-name"), "in its name"),
        (bash("bash .ci/walk"), "there is no .ci/walk"),
        (bash(f"srun ray symmetric-run --address a:6379 -- {STUDY} accuracy configs/digits.yaml"), "required: --out"),
        (bash(f"srun {STUDY} accuracy configs/digits.yaml --out x"), "expected ray symmetric-run"),
        (f"```yaml\nkind: RayJob\nspec:\n  entrypoint: {STUDY} accuracy configs/digits.yaml\n```\n", "required: --out"),
        (bash("llmfoundry train gone.yaml"), "there is no gone.yaml"),
        (bash("llmfoundry eval configs/digits.yaml"), "expected train and a config"),
        (bash("composer -n 2 -c .venv/bin/llmfoundry train gone.yaml"), "there is no gone.yaml"),
        (bash("composer -n 2 -c llmfound train configs/digits.yaml"), "expected -m"),
        (f"Run `{TRAIN} configs/digit.yaml` once.", "There is no config file"),
    ],
)
def test_a_broken_command_is_found(text, problem, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert any(problem in found for found in command_problems(text)), command_problems(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](gone.md)", "gone.md: there is no such file"),
        ("![a](.github/figures/gone.png)", "gone.png: there is no such file"),
        ("[a](../elsewhere)", "elsewhere: there is no such file"),
        ("[a](#gone)", "#gone: there is no such heading"),
        ("# Here\n[a](#here) [b](composer_gradmatch/studies/README.md#gone)", "#gone: there is no such heading"),
        ("[a][gone]", "[gone] is not defined"),
        ("![a][b]\n\n[b]: gone.png\n", "gone.png: there is no such file"),
    ],
)
def test_a_broken_link_is_found(text, problem):
    (found,) = link_problems(text, ROOT / "README.md", repository=None)
    assert problem in found


def test_links_into_the_repository_are_looked_up_in_it():
    at = "https://example.org/someone/here"
    text = f"[a]({at}) [b]({at}/blob/main/LICENSE) [c](https://example.org) [d]({at}/tree/main/gone) [e](LICENSE)"
    assert link_problems(text, ROOT / "README.md", at) == [
        f"{at}/tree/main/gone: there is no such file",
        "LICENSE: not absolute",
    ]
    assert link_problems("[e](../LICENSE)", CONTRIBUTING, at) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```yaml\nmodel: {name: digits_cmn}\n```\n", "unknown model 'digits_cmn'"),
        ("```yaml\nmax_duration: 1ep\n```\n", "missing"),
        ("```yaml\nmax_epochs: 3\n```\n", "max_epochs: unknown key"),
        ("```yaml\ntokenizer: {}\nalgorithms: {gradmatch: {kep: 0.1}}\n```\n", "gradmatch.kep: unknown key"),
    ],
)
def test_a_broken_config_is_found(text, problem):
    assert any(problem in found for found in yaml_problems(text)), yaml_problems(text)


def test_a_block_that_no_test_looks_at_is_found():
    assert block_problems("```\nx\n```\n") == ["line 2: a block is one of ('python', 'bash', 'yaml'), got ''"]
    assert "not closed" in block_problems("```python\nx\n")[0]
    assert "indented" in block_problems("- a\n  ```python\n  x\n  ```\n")[0]


def test_broken_prose_is_found(known):
    assert option_problems("`--keep`, `--speed 3`", known) == ["--speed: no command has it"]
    assert file_problems("`configs/digits.yaml`, `gone.py`", ROOT / "README.md") == ["gone.py: there is no such file"]
    (found,) = override_problems("`algorithms.gradmatch.solver=swap` and `algorithms.gradmatch.solve=swap`")
    assert found.startswith("algorithms.gradmatch.solve=swap")
    assert width_problems("a" * 121 + "\n|" + "b" * 120, tables_too=False) == ["line 1: 121 characters"]
    assert len(width_problems("|" + "b" * 120, tables_too=True)) == 1


def test_broken_python_is_found(names):
    text = "One\n\n```python\nx = 1\n```\n\n```python\nassert x == 1\nassert model is None\n```\n"
    with pytest.raises(AssertionError) as error:
        run_python(text, ROOT / "README.md", names)
    assert error.traceback[-1].lineno + 1 == 9
    assert re.search("README.md", str(error.traceback[-1].path))
