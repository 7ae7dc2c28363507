"""A running server for the tests of this folder, and artifacts to break."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankd import Client
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
    manifest.write_text(text)
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (place / "model.toml.sha256").write_text(f"{digest}  model.toml\n")
    return place


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
