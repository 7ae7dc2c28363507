"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("RANKD_TEST_GPU") != "1":  # benchmarks/gpu.py runs tests of kernels on a GPU
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton: kernels run on the CPU

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores: threads of torch would wait for each other

import pytest
from hypothesis import settings

import rankd.demo
from rankd import Ranker

settings.register_profile("rankd", deadline=None)  # how long an example takes says something of the machine alone
settings.load_profile("rankd")

BEGUN_FIRST = (
    "tests/deploy/test_deploy_on_ray.py",  # minutes, with deadlines: beside it run tests that keep one core and no time
    "tests/compress/",
    "tests/build/",
    "tests/models/",
    "tests/train/",
    "tests/plan/",
    "tests/test_tutorial.py",  # minutes, of both cores
    "tests/bench/",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, file by file, long files are not the last ones: somebody would wait for them."""

    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(BEGUN_FIRST) if item.nodeid.startswith(name)), len(BEGUN_FIRST))

    if hasattr(config, "workerinput"):
        items.sort(key=place)


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
