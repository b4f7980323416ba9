"""Looks at what ``python -m build`` has made: ``python tests/package.py DIST``, a folder with an sdist and a wheel."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The sdist's own part of the tree: folders and files at its top.
SOURCES = ("composer_gradmatch", "configs", "tests", ".github", ".ci", "README.md", "LICENSE", "pyproject.toml")


def tree(root: Path, *tops: str) -> dict[str, bytes]:
    """The files of a tree that belong to it, by their paths: what caches leave does not."""
    files = [path for top in tops for path in ([root / top] if (root / top).is_file() else (root / top).rglob("*"))]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def of_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def of_sdist(sdist: Path) -> dict[str, bytes]:
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {m.name.split("/", 1)[1]: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def differences(found: dict[str, bytes], expected: dict[str, bytes], where: str) -> list[str]:
    """Files that are not what they are in the tree."""
    return [
        *(f"{where}: {name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{where}: {name} does not belong there" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{where}: {name} differs"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ),
    ]


def description_problems(metadata: str) -> list[str]:
    """Links of a description that lead nowhere on a package index, and figures that it has not."""
    text = re.sub(r"```.*?```", "", Parser().parsestr(metadata).get_payload(), flags=re.DOTALL)
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"(?m)^\[[^\]]+\]: (\S+)", text)]
    problems = [f"description: {target} is not absolute" for target in targets if not target.startswith(("http", "#"))]
    problems += [f"description: [{name}] is not defined" for name in re.findall(r"\]\[(\w+)\]", text)]
    return problems if len(text) > 1000 else ["description: it is not the README"]


def problems_of(dist: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with the distributions in a folder."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    in_wheel, in_sdist = of_wheel(wheel), of_sdist(sdist)
    information = {name: in_wheel.pop(name) for name in list(in_wheel) if ".dist-info/" in name}
    metadata = next(text for name, text in information.items() if name.endswith("METADATA")).decode()
    version = re.search(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    own = f"-{version[1]}" if version else "no version"
    return [
        *(f"{path.name}: is not of version{own}" for path in (wheel, sdist) if own not in path.name),
        *differences(in_wheel, tree(root, "composer_gradmatch"), wheel.name),
        *differences(
            {name: text for name, text in in_sdist.items() if name not in ("PKG-INFO", ".gitignore")},
            tree(root, *SOURCES),
            sdist.name,
        ),
        *([] if in_sdist["PKG-INFO"].decode() == metadata else ["the sdist's metadata are not the wheel's"]),
        *description_problems(metadata),
    ]


if __name__ == "__main__":
    found = problems_of(Path(sys.argv[1]))
    print("\n".join(found) or "the sdist and the wheel hold what they should")
    sys.exit(bool(found))
