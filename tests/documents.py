"""What a document promises, taken out of its text and looked at: links, commands, configs, options and examples.

Each check returns a message for each problem that it finds, so that a test can show that it does find them.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import composer.cli.launcher as launcher
import yaml

import composer_gradmatch.benchmarks.__main__ as benchmarks
import composer_gradmatch.studies.__main__ as studies
import composer_gradmatch.studies.picks.report as picks_report
import composer_gradmatch.studies.run_study as run_study
import composer_gradmatch.train.command as train
from composer_gradmatch.train import check_config
from composer_gradmatch.train.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "composer_gradmatch"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")), *sorted(PACKAGE.rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LANGUAGES = ("python", "bash", "yaml")
WIDTH = 120
#: Keys of LLM Foundry's configs that ours have not.
LLM_FOUNDRYS = {"tokenizer", "code_paths"}
_DISTRIBUTION = metadata("composer-gradmatch")
EXTRAS = set(_DISTRIBUTION.get_all("Provides-Extra") or [])
#: The repository's address, once the package has one; until then links are relative.
REPOSITORY = dict(url.split(", ", 1) for url in _DISTRIBUTION.get_all("Project-URL") or []).get("Repository")


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the line of the document that its code begins at."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(each[1], each[2], text.count("\n", 0, each.start(2)) + 1) for each in found]


def prose(text: str) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.replace("\\|", "|").split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def block_problems(text: str) -> list[str]:
    """Blocks that no test would look at: of a language that nothing checks, or not closed."""
    problems = [
        f"line {block.line}: a block is one of {LANGUAGES}, got {block.language!r}"
        for block in blocks(text)
        if block.language not in LANGUAGES
    ]
    fences = len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE))
    if fences != 2 * len(blocks(text)):
        problems.append(f"{fences} fences make {len(blocks(text))} blocks: one is indented, not closed, or made of ~")
    return problems


def width_problems(text: str, tables_too: bool) -> list[str]:
    """Lines that are too long; but for tables, which cannot be broken, where those are let off."""
    return [
        f"line {number}: {len(line)} characters"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > WIDTH and (tables_too or not line.startswith("|"))
    ]


def run_python(text: str, path: Path, names: dict[str, Any]) -> int:
    """Runs a document's Python blocks, one after the other, in one namespace; returns how many there are.

    What imports LLM Foundry is run by ``tests/foundry``, in an environment that has it.
    """
    python = [block for block in blocks(text) if block.language == "python"]
    for block in python:
        if "from llmfoundry import" in block.code:
            compile(block.code, str(path), "exec")
            continue
        # Blank lines first, so that a traceback has the document's own line numbers.
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), names)
    return len(python)


def shown_files(text: str) -> dict[str, str]:
    """The files that a document shows: the blocks whose first line is a comment with their name."""
    code = [block.code for block in blocks(text)]
    return {name[1]: each for each in code if (name := re.match(r"# (\w+\.(?:py|yaml))\n", each))}


def write_files(text: str, folder: Path) -> None:
    """Writes the files that a document shows."""
    for name, code in shown_files(text).items():
        (folder / name).write_text(code)


def link_problems(text: str, path: Path, repository: str | None = REPOSITORY) -> list[str]:
    """Links and figures that lead nowhere.

    The README's links must be absolute once the repository has an address, as package indexes show that file alone.
    """
    without_code = re.sub(r"`[^`]+`", lambda code: re.sub(r"[\[\]()]", "", code[0]), prose(text))
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", without_code, re.MULTILINE))
    used = re.findall(r"\]\[([^\]]+)\]", without_code)
    problems = [f"[{name}] is not defined" for name in used if name not in defined]
    for target in [*re.findall(r"\]\(([^)\s]+)\)", without_code), *defined.values()]:
        if repository and target.startswith(repository):
            inside = re.match(r"/(?:blob|tree|raw)/[^/]+/([^#]+)", target.removeprefix(repository))
            if target.rstrip("/") != repository and not (inside and (ROOT / inside[1]).exists()):
                problems.append(f"{target}: there is no such file")
        elif not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            if file and repository and path == ROOT / "README.md":
                problems.append(f"{target}: not absolute")
            elif not (found.exists() and found.is_relative_to(ROOT)):
                problems.append(f"{target}: there is no such file")
            elif anchor and anchor not in anchors(text if found == path else found.read_text()):
                problems.append(f"{target}: there is no such heading")
    return problems


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def yaml_problems(text: str) -> list[str]:
    """YAML blocks that are no config: whole ones as they are, parts in the place of what ``digits.yaml`` has there."""
    problems = []
    for block in blocks(text):
        if block.language == "yaml":
            if _job(block):
                continue
            config = yaml.safe_load(block.code)
            if not config.keys().isdisjoint(LLM_FOUNDRYS):  # Of which only the strategies are ours.
                config = {"algorithms": config["algorithms"]}
            if "max_duration" not in config:
                config = {**load_config(ROOT / "configs/digits.yaml"), **config}
            problems += [f"line {block.line}: {problem}" for problem in config_problems(config)]
    return problems


def _job(block: Block) -> dict[str, Any] | None:
    """The job for a cluster that a YAML block describes, whose command is a promise, too; None if it is a config."""
    held = yaml.safe_load(block.code)
    return held if held.get("kind") == "RayJob" else None


def config_problems(config: dict[str, Any]) -> list[str]:
    try:
        check_config(config)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a Bash block, as lists of words; of Bash, it knows variables, ``&&`` and ``\\`` at line ends."""
    variables: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        if set_here := re.fullmatch(r'(\w+)="([^"$]*)"', line.strip()):
            variables[set_here[1]] = set_here[2]
            continue
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def command_problems(text: str) -> list[str]:
    """Commands that could not be started as they stand: in Bash blocks, and in the prose where one is whole."""
    whole = r"\S*/bin/|pip install|python -m composer_gradmatch|composer .*-m |pytest "
    inline = [code for code in inline_code(text) if re.match(whole, code)]
    code = [block.code for block in blocks(text) if block.language == "bash"] + inline
    code += [job["spec"]["entrypoint"] for block in blocks(text) if block.language == "yaml" if (job := _job(block))]
    return [f"{shlex.join(words)}: {problem}" for each in code for words in commands(each) for problem in _tried(words)]


def _tried(words: list[str]) -> list[str]:
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "python" and arguments[:1] == ["-m"] and arguments[1] in _MODULES:
        return _MODULES[arguments[1]](arguments[2:])
    if program == "composer":
        return _launched(arguments)
    if program in _PROGRAMS:
        return _PROGRAMS[program](arguments)
    return ["no test knows this command"]


def _exit_of(main: Callable[[list[str]], int], arguments: list[str]) -> list[str]:
    """What a command line says if it refuses its arguments."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    return [] if code == 0 else [said.getvalue().strip() or f"exit code {code}"]


def _trained(arguments: list[str]) -> list[str]:
    configs: list[dict[str, Any]] = []
    with mock.patch.object(train, "train", configs.append):
        problems = _exit_of(train.main, arguments)
    return problems + [problem for config in configs for problem in config_problems(config)]


def _studied(arguments: list[str]) -> list[str]:
    configs: list[dict[str, Any]] = []

    def instead(config: dict[str, Any], name: str, **options: Any) -> int:
        configs.append(config)
        return 0

    with mock.patch.object(run_study, "run_study", instead), mock.patch.object(picks_report, "report_picks"):
        problems = _exit_of(studies.main, arguments)
    return problems + [problem for config in configs for problem in config_problems(config)]


def _benchmarked(arguments: list[str]) -> list[str]:
    measured = [name for name in vars(benchmarks) if name.startswith("measure_")]
    with contextlib.ExitStack() as stack:
        for name in measured:
            stack.enter_context(mock.patch.object(benchmarks, name, return_value=[{"time": 0.0}]))
        return _exit_of(benchmarks.main, arguments)


def _launched(arguments: list[str]) -> list[str]:
    parsed: list[Any] = []

    def parse(words: list[str]) -> int:
        parsed.append(launcher._get_parser().parse_args(words))
        return 0

    if problems := _exit_of(parse, arguments):
        return problems
    if parsed[0].command_mode and parsed[0].training_script == ".venv/bin/llmfoundry":
        return _foundry_trained(parsed[0].training_script_args)
    if not (parsed[0].module_mode and parsed[0].training_script in _MODULES):
        return ["expected -m and a module of this package"]
    return _MODULES[parsed[0].training_script](parsed[0].training_script_args)


def _on_cluster(arguments: list[str]) -> list[str]:
    """What Slurm starts everywhere, and Ray's own launcher then once."""
    if "symmetric-run" not in arguments or "--" not in arguments:
        return ["expected ray symmetric-run ... -- and a command"]
    return _tried(arguments[arguments.index("--") + 1 :])


def _installed(arguments: list[str]) -> list[str]:
    requirements = [word for word in arguments[1:] if word not in ("-e", "--quiet")]
    local = [re.fullmatch(r"\.(?:\[([\w,]+)\])?", word) for word in requirements if word.startswith(".")]
    asked = {extra for match in local if match for extra in (match[1] or "").split(",") if extra}
    problems = [f"there is no extra {extra!r}" for extra in sorted(asked - EXTRAS)]
    return problems if arguments[:1] == ["install"] and all(local) else [*problems, "pip cannot install this"]


def _foundry_trained(arguments: list[str]) -> list[str]:
    """A config that the document shows, and so is beside it; that it runs is shown by ``tests/foundry``."""
    if arguments[:1] != ["train"] or len(arguments) != 2:
        return ["expected train and a config"]
    return _file_there(arguments[1:])


def _tested(arguments: list[str]) -> list[str]:
    problems, words = [], iter(arguments)
    for word in words:
        if word == "-k":
            problems += _no_test_named(next(words))
        elif word != "-rP" and not (ROOT / word).exists():
            problems.append(f"there is no {word}")
    return problems


def _no_test_named(part: str) -> list[str]:
    names = (
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    )
    return [] if any(part in name for name in names) else [f"no test has {part!r} in its name"]


def _file_there(arguments: list[str]) -> list[str]:
    return [
        f"there is no {word}"
        for word in arguments
        if not word.startswith("-") and not (ROOT / word).exists() and not Path(word).exists()
    ]


_MODULES: dict[str, Callable[[list[str]], list[str]]] = {
    "composer_gradmatch.train": _trained,
    "composer_gradmatch.studies": _studied,
    "composer_gradmatch.benchmarks": _benchmarked,
}
_PROGRAMS: dict[str, Callable[[list[str]], list[str]]] = {
    "pip": _installed,
    "pytest": _tested,
    "llmfoundry": _foundry_trained,
    "bash": _file_there,
    "srun": _on_cluster,
    "python3": lambda words: [] if words == ["-m", "venv", ".venv"] else ["only makes the environment"],
    "ruff": lambda words: _file_there(words[1:] if words[0] in ("check", "format") else words),
    "pyright": _file_there,
}


def option_problems(text: str, known: str) -> list[str]:
    """Options that the prose names and no command line has.

    Args:
        text: A document.
        known: What the command lines say of themselves, :func:`all_help`.
    """
    named = {option for code in inline_code(text) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    return [f"{option}: no command has it" for option in sorted(named) if not re.search(rf"{option}(?![\w-])", known)]


def all_help() -> str:
    """The help texts of all command lines."""
    return "\n".join(
        [
            launcher._get_parser().format_help(),
            _help(train.main, "--help"),
            *(
                _help(main, name, "--help")
                for main in (studies.main, benchmarks.main)
                for name in re.findall(r"^ {4}([a-z][\w-]*)", _help(main, "--help"), re.MULTILINE)
            ),
        ]
    )


def _help(main: Callable[[list[str]], int], *words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(list(words))
    return said.getvalue()


def file_problems(text: str, path: Path) -> list[str]:
    """Files that the prose names and that are not there: from the root, from the package, or beside the document."""
    places = (ROOT, PACKAGE, path.parent, ROOT / "configs")
    named = {code for code in inline_code(text) if re.fullmatch(r"[\w./-]+\.(py|yaml)|tests/[\w/]*", code)}
    return [
        f"{name}: there is no such file"
        for name in sorted(named - shown_files(text).keys())
        if not any((at / name).exists() for at in places)
    ]


def override_problems(text: str) -> list[str]:
    """Overrides that the prose names and that no config in ``configs/`` takes; ``key.sub=value`` stands for any."""
    override = r"\w+(\.\w+)+=\S+"
    named = {code for code in inline_code(text) if re.fullmatch(f"{override}( {override})*", code)}
    return [
        f"{code}: no config takes it"
        for code in sorted(named - {"key.sub=value"})
        if all(config_problems(load_config(path, code.split())) for path in CONFIGS)
    ]
