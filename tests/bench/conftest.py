"""What the tests of the benchmarks share."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Leave the real runs out with: pytest -m 'not real_run'."""
    config.addinivalue_line("markers", "real_run: starts a real server and a load generator; takes several seconds")
