"""Our OpenAPI description is true: schemathesis tries the whole of it against a running server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from tests.serve.conftest import ONE_EXECUTOR


@pytest.fixture(scope="module")
def own_server(demo_models: Path) -> Iterator[Server]:
    """A server that nobody else's tests meet."""
    with Server(demo_models, ServeConfig(port=0, engine=ONE_EXECUTOR)) as running:
        yield running


@pytest.fixture
def description(own_server: Server) -> schemathesis.BaseSchema:
    loaded: schemathesis.BaseSchema = schemathesis.openapi.from_url(own_server.url + "/openapi.json")
    return loaded


schema = schemathesis.pytest.from_fixture("description")
BOUNDS = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@schema.exclude(path_regex="/(infer|unload|load)$").parametrize()
@BOUNDS
def test_the_server_does_what_its_description_says(case: schemathesis.Case) -> None:
    case.call_and_validate()


@schema.include(path_regex="/infer$").parametrize()
@BOUNDS
def test_infer_does_what_its_description_says(case: schemathesis.Case) -> None:
    # That a tensor's data has as many elements as its shape says is beyond a JSON schema: 400 is a right answer.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


@schema.include(path_regex="/(unload|load)$").parametrize()
@BOUNDS
def test_loading_and_unloading_never_fail_badly(case: schemathesis.Case) -> None:
    # What is unloaded may be asked to unload again: not found, by its own description.
    response = case.call()
    assert response.status_code in (200, 400, 404, 405, 413), response.text
    case.validate_response(response, checks=[not_a_server_error])


def test_every_route_is_described(own_server: Server) -> None:
    from rankd.serve.app import create_app

    described = httpx.get(own_server.url + "/openapi.json").json()["paths"]
    app = create_app(own_server.repository, ServeConfig())
    routes = {route.path: route.methods - {"HEAD"} for route in app.routes}  # type: ignore[attr-defined]
    assert {path: {verb.upper() for verb in verbs} for path, verbs in described.items()} == routes
