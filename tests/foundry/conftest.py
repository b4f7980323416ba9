from __future__ import annotations

import pytest
from foundry_files import write_all


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """What configs name: a tokenizer, texts, tokens, a model's config."""
    folder = tmp_path_factory.mktemp("files")
    write_all(folder)
    return folder
