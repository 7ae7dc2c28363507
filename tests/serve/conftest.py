"""A running server for the tests of this folder, and artifacts to break."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankd.demo
from rankd import Client, Ranker
from rankd.engine.backend import EngineConfig
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig

ONE_EXECUTOR = EngineConfig(executors=1)


def copy_version(source: Path, root: Path, name: str, version: str, **changes: str) -> Path:
    """Copy the packaged artifact under another name and version, with other texts in model.toml (key="new value"),
    and its checksum made right again."""
    place = root / name / version
    shutil.copytree(source, place)
    manifest = place / "model.toml"
    text = manifest.read_text().replace('name = "demo"', f'name = "{name}"', 1)
    text = text.replace('version = "1"', f'version = "{version}"', 1)
    for key, value in changes.items():
        text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, flags=re.MULTILINE)
        assert count == 1, key
    write_manifest(place, text)
    return place


def write_manifest(version: Path, text: str) -> None:
    """Give a version another model.toml, with the checksum of it."""
    (version / "model.toml").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (version / "model.toml.sha256").write_text(f"{digest}  model.toml\n")


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with its largest buckets alone: with fewer shapes to run, a server starts in half the time."""
    root = tmp_path_factory.mktemp("models")
    version = copy_version(rankd.demo.MODELS / "demo" / "1", root, "demo", "1")
    text, count = re.subn(
        r"^(\w+_buckets) = \[[^]]*?(\d+),?\s*\]$",
        r"\1 = [\2]",
        (version / "model.toml").read_text(),
        flags=re.MULTILINE,
    )
    assert count == 2
    write_manifest(version, text)
    return root


@pytest.fixture(scope="session")
def demo_ranker(demo_models: Path) -> Iterator[Ranker]:
    """It, loaded in process. Tests must not append events to it."""
    with Ranker.load(demo_models / "demo") as ranker:
        yield ranker


@pytest.fixture(scope="module")
def server(demo_models: Path) -> Iterator[Server]:
    """The packaged model behind real sockets, for a module's tests."""
    with Server(demo_models, ServeConfig(port=0, engine=ONE_EXECUTOR, max_body_bytes=100_000)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of the running server."""
    with Client(server.url) as connected:
        yield connected
