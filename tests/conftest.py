"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import rankd.demo
from rankd import Ranker

LONG_FILES = (
    "tests/deploy/test_deploy_on_ray.py",
    "tests/test_tutorial.py",
    "tests/bench/test_features.py",
    "tests/bench/test_schedule_suite.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, file by file, those that take minutes come first: at the end one would be
    waited for."""
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured on this machine must not decide what tests run on, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo_models() -> Path:
    """The model repository that comes with the package: one model, 'demo', version 1."""
    return rankd.demo.MODELS


@pytest.fixture(scope="session")
def demo_ranker(demo_models: Path) -> Iterator[Ranker]:
    """The packaged model, loaded in process. Tests must not append events to it."""
    with Ranker.load(demo_models / "demo") as ranker:
        yield ranker
