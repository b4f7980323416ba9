from __future__ import annotations

import pytest

from composer_gradmatch.reuse.single_pass import SinglePass


@pytest.fixture
def served(monkeypatch):
    """The numbers of samples that the Trainer's forward was served, call by call."""
    sizes = []
    original = SinglePass._rows

    def rows(self, batch):
        found = original(self, batch)
        sizes.append(None if found is None else len(found))
        return found

    monkeypatch.setattr(SinglePass, "_rows", rows)
    return sizes
