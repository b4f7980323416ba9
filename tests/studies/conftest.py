from __future__ import annotations

import sys
from pathlib import Path

import pytest

from composer_gradmatch.studies.store import Store

sys.path.insert(0, str(Path(__file__).parent))  # Workers are given this path, too.


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "study", {})
    yield store
    store.close()
