"""Packages that are installed for a test."""

from __future__ import annotations

import importlib
import sys


def install(folder, monkeypatch, source, group, line):
    """Puts a package ``their_package`` with an entry point on the path, as an installer does; workers see it, too."""
    (folder / "their_package.py").write_text(source)
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    monkeypatch.syspath_prepend(str(folder))
    # Another test's package of that name is forgotten, before and after.
    monkeypatch.delitem(sys.modules, "their_package", raising=False)
    monkeypatch.setitem(sys.modules, "their_package", importlib.import_module("their_package"))
