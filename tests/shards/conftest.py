"""What tests of a ranker with tables elsewhere share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shards.films import build


@pytest.fixture(scope="session")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model `films`."""
    return build(tmp_path_factory.mktemp("models"))
