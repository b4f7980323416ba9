"""What looks at an sdist and a wheel finds what is wrong with them, and versions agree; CI builds real ones."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from importlib.metadata import version

import pytest
from package import ROOT, SOURCES, problems_of, tree

import composer_gradmatch

METADATA = "Metadata-Version: 2.4\nName: mine\n\n" + "[a](https://example.org) " * 60


@pytest.fixture
def made(tmp_path):
    """A small tree, and what makes its distributions, with changes."""
    root, dist = tmp_path / "root", tmp_path / "dist"
    dist.mkdir()
    for name in SOURCES:
        path = root / (name if "." in name[1:] or name == "LICENSE" else f"{name}/file.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('version = "1.2"\n')
    (root / "tests/__pycache__").mkdir()
    (root / "tests/__pycache__/file.pyc").touch()

    def make(wheel=(), sdist=(), metadata=METADATA, number="1.2"):
        package, sources = tree(root, "composer_gradmatch"), tree(root, *SOURCES)
        information = {f"mine-{number}.dist-info/METADATA": metadata.encode()}
        with zipfile.ZipFile(dist / f"mine-{number}-py3-none-any.whl", "w") as archive:
            for name, text in {**package, **information, **dict(wheel)}.items():
                archive.writestr(name, text) if text is not None else None
        with tarfile.open(dist / f"mine-{number}.tar.gz", "w:gz") as archive:
            for name, text in {**sources, "PKG-INFO": METADATA.encode(), **dict(sdist)}.items():
                if text is not None:
                    member = tarfile.TarInfo(f"mine-{number}/{name}")
                    member.size = len(text)
                    archive.addfile(member, io.BytesIO(text))
        return problems_of(dist, root)

    return make


def test_distributions_that_hold_the_tree_are_right(made):
    assert made() == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"wheel": {"composer_gradmatch/file.py": b""}}, "composer_gradmatch/file.py differs"),
        ({"wheel": {"tests/file.py": b""}}, "tests/file.py does not belong there"),
        ({"sdist": {"configs/file.py": None}}, "configs/file.py is missing"),
        ({"sdist": {"runs/left.pt": b""}}, "runs/left.pt does not belong there"),
        ({"sdist": {"PKG-INFO": b""}}, "metadata are not the wheel's"),
        ({"number": "1.1"}, "is not of version-1.2"),
        ({"metadata": METADATA + "[b](configs/digits.yaml)"}, "configs/digits.yaml is not absolute"),
        ({"metadata": METADATA + "![b][figure]"}, r"\[figure\] is not defined"),
        ({"metadata": "Name: mine\n\nshort"}, "it is not the README"),
    ],
)
def test_what_is_wrong_with_them_is_found(made, changes, problem):
    assert re.search(problem, "\n".join(made(**changes)))


def test_the_version_is_that_of_the_changelog_and_of_the_installed_package():
    released = re.findall(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", (ROOT / ".github/CHANGELOG.md").read_text(), re.MULTILINE)
    assert f'\nversion = "{released[0]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert sorted(released, reverse=True) == released
    assert composer_gradmatch.__version__ == version("composer-gradmatch")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise composer_gradmatch.PackageNotFoundError(name)

    monkeypatch.setattr(composer_gradmatch, "version", missing)
    with pytest.raises(AttributeError, match="not installed"):
        composer_gradmatch.__version__  # noqa: B018
