"""Our OpenAPI description is true: schemathesis tries the whole of it against a running server."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rankd.serve.app import create_app
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from tests.serve.conftest import ONE_EXECUTOR

SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"
STATES = "/repository/models/.*/(load|unload)$"


@pytest.fixture
def own_server(demo_models: Path) -> Iterator[Server]:
    """A server that nobody else's tests meet."""
    with Server(demo_models, ServeConfig(port=0, engine=ONE_EXECUTOR)) as running:
        yield running


def schemathesis(server: Server, folder: Path, *arguments: str) -> None:
    """Run schemathesis with a fixed seed over a part of the description; any failure of it is one of ours.

    503 and 504 are answers of ours, described and typed (a request may bring a timeout_ms that nobody can keep).
    """
    settings = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 503, 504]\n'
    (folder / "schemathesis.toml").write_text(settings)
    command = [
        str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", "--phases", "examples,coverage,fuzzing",
        "--seed", "7", "--max-examples", "10", "--workers", "1", "--no-color", *arguments,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "No failures" in result.stdout or "passed" in result.stdout, result.stdout[-2000:]


def test_the_server_does_what_its_description_says(own_server: Server, tmp_path: Path) -> None:
    schemathesis(own_server, tmp_path, "--exclude-path-regex", f"({STATES}|/infer$)")


def test_infer_does_what_its_description_says(own_server: Server, tmp_path: Path) -> None:
    # That a tensor has as many elements as its shape says is beyond a JSON schema: there 400 is a right answer.
    schemathesis(
        own_server, tmp_path, "--include-path-regex", "/infer$", "--exclude-checks", "positive_data_acceptance"
    )


def test_loading_and_unloading_do_what_their_description_says(own_server: Server, tmp_path: Path) -> None:
    schemathesis(own_server, tmp_path, "--include-path-regex", STATES)


def test_every_route_is_described(own_server: Server) -> None:
    described = httpx.get(own_server.url + "/openapi.json").json()["paths"]
    app = create_app(own_server.repository, ServeConfig())
    routes = {route.path: route.methods - {"HEAD"} for route in app.routes}  # type: ignore[attr-defined]
    assert {path: {verb.upper() for verb in verbs} for path, verbs in described.items()} == routes
